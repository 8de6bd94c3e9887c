"""Imported last by the server of ``forked_runs.py``: its forks need not look through what is imported for garbage."""

import gc

gc.collect()
gc.freeze()
