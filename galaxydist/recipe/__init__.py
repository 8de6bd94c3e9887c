"""Typed recipes: schema, loading from YAML and ``key=value``, rules, and identity of a run."""
