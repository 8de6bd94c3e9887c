"""A client of the app's page: asks over HTTP as the page in a browser does, without a browser."""

import json
import secrets
import urllib.request
from pathlib import Path
from typing import Any


class PageClient:
    """One session of a page.

    Args:
        address: such as ``http://127.0.0.1:7860``.
    """

    def __init__(self, address: str) -> None:
        self._address, self._session = address, secrets.token_hex(8)
        self._events = {event["api_name"]: number for number, event in enumerate(self._get_json("/config")["dependencies"])}

    def predict(self, path: Path, model: str) -> dict[str, Any]:
        """The answer of a model to an uploaded picture, in plain values."""
        _, _, values, *_ = self._ask("predict", [self.upload(path), model])
        assert isinstance(values, dict)
        return values

    def upload(self, path: Path) -> dict[str, Any]:
        """Upload a file, and return how the page names it."""
        border = secrets.token_hex(16)
        head = f'--{border}\r\nContent-Disposition: form-data; name="files"; filename="{path.name}"\r\n\r\n'
        body = head.encode() + path.read_bytes() + f"\r\n--{border}--\r\n".encode()
        headers = {"Content-Type": f"multipart/form-data; boundary={border}"}
        (place,) = self._post("/gradio_api/upload", body, headers)
        return {"path": place, "orig_name": path.name, "meta": {"_type": "gradio.FileData"}}

    def _ask(self, event: str, values: list[Any]) -> list[Any]:
        content = {"data": values, "fn_index": self._events[event], "session_hash": self._session}
        self._post("/gradio_api/queue/join", json.dumps(content).encode(), {"Content-Type": "application/json"})
        address = f"{self._address}/gradio_api/queue/data?session_hash={self._session}"
        with urllib.request.urlopen(address, timeout=60) as answer:
            for line in answer:
                message = json.loads(line.removeprefix(b"data:")) if line.startswith(b"data:") else {}
                if message.get("msg") == "process_completed":
                    assert message["success"], message
                    found = message["output"]["data"]
                    assert isinstance(found, list)
                    return found
        raise AssertionError("the page has ended the session without an answer")

    def _post(self, path: str, body: bytes, headers: dict[str, str]) -> Any:
        request = urllib.request.Request(self._address + path, body, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def _get_json(self, path: str) -> Any:
        with urllib.request.urlopen(self._address + path, timeout=60) as answer:
            return json.load(answer)
