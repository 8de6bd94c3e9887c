"""The names in a folder of checkpoints: known to the module that writes them, and to what must answer without torch."""

import re

LATEST, BEST = "latest", "best"
# Step, and number of the save.
FOLDER_NAME = re.compile(r"step-(\d+)-(\d+)")
