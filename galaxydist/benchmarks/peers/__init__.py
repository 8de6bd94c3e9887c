"""Other loaders as their users would set them up. Each module runs in a process of its own, in the environment of that loader,
and imports nothing of galaxydist that an environment without it would miss."""
