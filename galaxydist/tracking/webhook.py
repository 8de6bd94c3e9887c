"""Alerts of a run, posted to one web address: a webhook of Slack, Mattermost or Discord, or a program of one's own.

The address is a secret, since whoever knows it may post there: no message and no file of a run contains it.
"""

import json
import logging
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from galaxydist.recipe.scalars import check_address
from galaxydist.runs.events import Event
from galaxydist.tracking.run_info import without_secrets

logger = logging.getLogger(__name__)

VARIABLE = "GALAXYDIST_WEBHOOK"
# Seconds that the server may take to accept a connection, and to answer.
TIMEOUT_S = 10.0
# Seconds for the alerts that are left when a run ends.
CLOSING_S = 3.0
# Alerts that wait for a slow server; further ones are dropped.
MOST_WAITING = 20


def find_webhook(configured: str | None, environ: Mapping[str, str]) -> str | None:
    """Return the address of a run: the recipe's ``tracker.webhook``, else that of the environment; None if there is none.

    An address in the environment that is none is left out with a warning, since an alert never stops a run.
    """
    address = configured or environ.get(VARIABLE)
    if not address or configured:
        return address or None
    try:
        return check_address(address)
    except ValueError as error:
        logger.warning("%s is left out, and no alert is posted: it %s", VARIABLE, error)
        return None


def post_event(address: str, run: str, event: Event, timeout_s: float = TIMEOUT_S) -> str:
    """Post an event as JSON.

    Slack and Mattermost show ``text``, Discord shows ``content``; ``run``, ``kind``, ``step`` and ``time`` are for programs.

    Args:
        address: of the webhook.
        run: name of the run.
        event: the event.
        timeout_s: seconds for the connection, and for the answer.

    Returns:
        An empty text, or why the server did not take it, without the address.
    """
    step = "" if event.step is None else f" at step {event.step}"
    text = f"{run}: {event.kind}{step}: {without_secrets(event.text)}"
    content = {"text": text, "content": text, "run": run, "kind": event.kind, "step": event.step, "time": event.time}
    headers = {"Content-Type": "application/json", "User-Agent": "galaxydist"}
    try:
        request = urllib.request.Request(address, json.dumps(content).encode(), headers, method="POST")
        with urllib.request.urlopen(request, timeout=timeout_s):
            return ""
    except urllib.error.HTTPError as error:
        return f"the server answers {error.code}"
    except Exception as error:  # an alert never stops a run; the texts of some errors contain the address
        reason = getattr(error, "reason", error)
        return getattr(reason, "strerror", None) or type(reason).__name__


@dataclass(eq=False)
class Webhook:
    """Posts events in a thread, so that no caller waits for the server.

    Args:
        address: of the webhook; None: nothing is posted.
        run: name of the run.
    """

    address: str | None
    run: str

    def __post_init__(self) -> None:
        self._events: queue.Queue[Event] = queue.Queue(MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._has_failed = False

    def send(self, event: Event) -> None:
        """Post an event soon."""
        if self.address is None:
            return
        try:
            self._events.put_nowait(event)
        except queue.Full:
            self._warn("too many alerts wait for it")
        if self._thread is None:
            self._thread = threading.Thread(target=self._post_all, name="webhook", daemon=True)
            self._thread.start()

    def close(self, wait_s: float = CLOSING_S) -> None:
        """Wait until all events are posted, but no longer than ``wait_s`` seconds. It may be called twice."""
        deadline = time.monotonic() + wait_s
        with self._events.all_tasks_done:
            while self._events.unfinished_tasks and (left_s := deadline - time.monotonic()) > 0:
                self._events.all_tasks_done.wait(left_s)

    def _post_all(self) -> None:
        assert self.address is not None
        while True:
            event = self._events.get()
            if problem := post_event(self.address, self.run, event):
                self._warn(problem)
            self._events.task_done()

    def _warn(self, problem: str) -> None:
        if not self._has_failed:
            logger.warning("an alert could not be posted to tracker.webhook (%s); the run goes on without", problem)
        self._has_failed = True
