"""How fast and how large: measured figures, with commands that users can run."""
