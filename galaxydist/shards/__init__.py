"""WebDataset shards of galaxies: format, order of reading, writing and remote access."""
