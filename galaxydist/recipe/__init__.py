"""The recipe: what a run is, typed, checked and read from YAML and the command line."""
