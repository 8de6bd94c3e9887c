"""Many runs together: the results matrix, the observations, statistics across runs, as a page and as tables for a paper."""
