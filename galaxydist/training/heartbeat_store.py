"""How processes tell one another their heartbeats through a c10d store, and agree that the run hangs.

While all is well each rank writes one key every few seconds and reads none. Only a rank that is overdue asks; the first that asks
reads all ranks' keys, the others wait for what it finds.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from galaxydist.training.heartbeats import Hang, Heartbeat, find_hang, silent_ranks

# A rank that runs but tells nothing for so many intervals counts as silent.
LOOKS = 4
LEAST_LOOKING_S = 3.0
HUNG, WAIT = "hung", "wait"


class KeyStore(Protocol):
    """What is used of ``torch.distributed.Store``."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def add(self, key: str, value: int) -> int: ...

    def check(self, keys: list[str]) -> bool: ...

    def clone(self) -> "KeyStore": ...


@dataclass(frozen=True)
class Answer:
    """What asking gave.

    Args:
        kind: ``hung``; ``wait``, since some rank still works; ``lost``, since the store does not answer.
        num_living: processes that will end by themselves.
        hang: what was found, on the one rank that tells the user.
        error: why the store was lost.
    """

    kind: Literal["hung", "wait", "lost"]
    num_living: int = 1
    hang: Hang | None = None
    error: str = ""


class HeartbeatStore:
    """One rank's thread that talks to the store; nothing here ever makes another thread wait.

    Args:
        store: of the process group; this thread opens a connection of its own to it.
        heartbeat: this rank's, given the number of times it was told.
        rank, world_size: of the process.
        interval_s: seconds between two tellings.
    """

    def __init__(
        self, store: KeyStore, heartbeat: Callable[[int], Heartbeat], *, rank: int, world_size: int, interval_s: float
    ) -> None:
        # Commands of one connection wait for one another: the main thread's may be what hangs.
        self._store = store.clone()
        self._heartbeat = heartbeat
        self._rank = rank
        self._world_size = world_size
        self._interval_s = interval_s
        self._num_looks = max(LOOKS, round(LEAST_LOOKING_S / interval_s))
        self._serial = 0
        self._asked = threading.Event()
        self._wake = threading.Event()
        self._closing = False
        self._answer: Answer | None = None
        self._error = ""
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
        self._thread.start()

    @property
    def look_s(self) -> float:
        """How long it takes to find a rank silent."""
        return self._num_looks * self._interval_s

    @property
    def patience_s(self) -> float:
        """How long an answer may take before the store counts as lost."""
        return 3 * self.look_s + 2.0

    def ask(self) -> None:
        """Ask whether the run hangs; see ``take_answer``."""
        self._answer = None
        self._asked.set()
        self._wake.set()

    def take_answer(self) -> Answer | None:
        """What the last question gave, once; None while it is being looked into."""
        answer, self._answer = self._answer, None
        return answer or (Answer("lost", error=self._error) if self._error else None)

    def leave_together(self, num_living: int, at_most_s: float) -> None:
        """Wait until all living ranks have written their stacks: launchers end all processes as soon as one has ended, and the
        store ends with rank 0."""
        waiter = threading.Thread(target=self._count_out, args=(num_living, at_most_s), daemon=True)
        waiter.start()
        waiter.join(at_most_s)

    def close(self) -> None:
        """Stop telling, after a last word."""
        self._closing = True
        self._wake.set()
        self._thread.join(2.0)

    def _run(self) -> None:
        try:
            while not self._closing:
                self._tell()
                if self._asked.is_set():
                    self._asked.clear()
                    self._answer = self._confer()
                self._wake.wait(self._interval_s)
                self._wake.clear()
            self._tell()
        except Exception as error:  # the store went away: whatever the backend raises then
            self._error = str(error).splitlines()[0] if str(error) else type(error).__name__

    def _tell(self) -> None:
        self._serial += 1
        self._store.set(f"rank/{self._rank}", self._heartbeat(self._serial).to_json())

    def _confer(self) -> Answer:
        episode = self._store.add("episode", 0)
        if self._store.add(f"judges/{episode}", 1) > 1:
            return self._hear(f"outcome/{episode}") or self._judge(episode)
        return self._judge(episode)

    def _judge(self, episode: int) -> Answer:
        hang = self._look()
        self._store.set(f"outcome/{episode}", f"{WAIT} 0" if hang is None else f"{HUNG} {hang.num_living}")
        if hang is None:
            self._store.add("episode", 1)
            return Answer("wait")
        return Answer("hung", hang.num_living, hang)

    def _hear(self, key: str) -> Answer | None:
        """What another rank found, or None where it does not come to an end."""
        for _ in range(2 * self._num_looks):
            if self._closing:
                break
            if self._store.check([key]):
                kind, _, num_living = self._store.get(key).decode().partition(" ")
                return Answer("hung" if kind == HUNG else "wait", int(num_living))
            self._pause()
        return None

    def _look(self) -> Hang | None:
        """Watch all ranks until each has been heard of anew, or has had the time to.

        The time is counted in looks: a process that was stopped meanwhile looks again before it calls others silent.
        """
        before = self._read()
        after = before
        for _ in range(self._num_looks):
            self._pause()
            after = self._read()
            if self._closing or not silent_ranks(before, after, self._world_size):
                break
        return find_hang(before, after, self._world_size)

    def _read(self) -> dict[int, Heartbeat]:
        keys = ((rank, f"rank/{rank}") for rank in range(self._world_size))
        return {rank: Heartbeat.from_json(self._store.get(key)) for rank, key in keys if self._store.check([key])}

    def _pause(self) -> None:
        self._wake.wait(self._interval_s)
        self._wake.clear()
        self._tell()

    def _count_out(self, num_living: int, at_most_s: float) -> None:
        pause = threading.Event()
        try:
            count = self._store.add("left", 1)
            for _ in range(int(at_most_s / 0.1)):
                if count >= num_living:
                    return
                pause.wait(0.1)
                count = self._store.add("left", 0)
        except Exception:  # rank 0 has left, and the store with it
            return
