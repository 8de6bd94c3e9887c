"""The only place that imports onnxruntime: its builds from 1.29 on send telemetry unless they are told not to before."""

import os
from typing import Any


def import_onnxruntime() -> Any:
    """Import onnxruntime with its telemetry switched off, and return the module.

    Without this variable its Linux builds send names of models and facts about the machine, and keep a device id and a database
    in the user's home (https://github.com/microsoft/onnxruntime/blob/main/docs/Privacy.md). It counts only before onnxruntime
    starts.

    Raises:
        ImportError: onnxruntime is not installed.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    return onnxruntime
