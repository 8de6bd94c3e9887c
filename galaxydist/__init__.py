"""galaxydist: a distributed training toolkit for galaxy morphology."""

__version__ = "0.1.0"
