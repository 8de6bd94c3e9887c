"""The names in a folder of checkpoints: known to the module that writes them, and to what must answer without torch."""

import json
import re
from pathlib import Path
from typing import Any

LATEST, BEST = "latest", "best"
STATE_FILE = "checkpoint.json"
# Step, and number of the save.
FOLDER_NAME = re.compile(r"step-(\d+)-(\d+)")


def read_newest_state(checkpoints_dir: Path) -> dict[str, Any] | None:
    """The plain values of the newest checkpoint that can be read, its files not checked; None where there is none."""
    names = [match for path in checkpoints_dir.glob("step-*") if (match := FOLDER_NAME.fullmatch(path.name))]
    for match in sorted(names, key=lambda match: int(match[2]), reverse=True):
        try:
            state: dict[str, Any] = json.loads((checkpoints_dir / match[0] / STATE_FILE).read_bytes())["content"]["state"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(state, dict) and isinstance(state.get("data"), dict):
            return state
    return None
