"""Searches: sweeps whose runs, the trials, get their values when they start."""
