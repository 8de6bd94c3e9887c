"""What a run folder says, shown by experiment trackers: wandb, trackio, TensorBoard."""
