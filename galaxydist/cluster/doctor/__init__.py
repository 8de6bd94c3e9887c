"""Whether this machine, and the nodes of a cluster, are ready for a run."""
