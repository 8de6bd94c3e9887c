"""Jobs on many machines: what a run would cost, worked out before anything is started."""
