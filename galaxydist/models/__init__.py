"""The architectures, and how a recipe becomes a model."""
