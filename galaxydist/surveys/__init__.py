"""Where galaxies come from: readers, the simulator, the official split, export to folders of pictures."""
