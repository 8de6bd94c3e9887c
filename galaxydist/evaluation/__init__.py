"""Exact counts, and the metrics, tables and figures that derive from them."""
