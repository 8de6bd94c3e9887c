"""Sources of galaxies: survey readers, the simulator, the official split and export to image folders."""
