"""Experiment trackers, wandb, trackio and TensorBoard: what a run folder says is shown by their programs."""
