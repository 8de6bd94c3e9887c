"""Jobs on a SLURM cluster: profiles, submission, requeue, sweeps, status, logs and cancellation."""
