"""The typed recipe: its schema, loading it from YAML and ``key=value``, its identity, and where data lies."""
