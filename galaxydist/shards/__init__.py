"""How galaxies are stored in WebDataset shards and streamed out again."""
