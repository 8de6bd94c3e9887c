"""The run folder: layout, lock, metrics and checkpoints as plain state. Knows nothing of training."""
