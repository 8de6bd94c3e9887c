"""The run folder: layout, lock and metrics log, independent of training."""
