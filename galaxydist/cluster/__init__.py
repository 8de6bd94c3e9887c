"""Jobs on many machines: what a run would cost, sending it, what becomes of it, and whether a cluster is ready."""
