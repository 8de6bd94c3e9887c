"""Waits of ranks for one another, failures of one rank, and the end of a process that has failed."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import PrefixStore
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from galaxydist import distributed
from galaxydist.distributed import World, init_distributed, open_world
from galaxydist.errors import (
    EveryRankError,
    OneRankFailedError,
    PeerFailedError,
    RunFailedError,
    UserError,
    exit_code_of,
    is_known_to_all,
)
from galaxydist.rank_store import RankFailure, RankStore
from galaxydist.training.launch import launch
from tests.helpers.forked_runs import forked, wait_for_exits


@pytest.fixture
def server() -> TCPStore:
    return TCPStore("127.0.0.1", 0, 1, True)


def ranks_of(server: TCPStore, size: int) -> list[RankStore]:
    """Each rank with a connection of its own."""
    return [RankStore(PrefixStore("test", server), rank, size).connect() for rank in range(size)]


def test_ranks_wait_for_rank_0_and_for_all_and_the_store_does_not_grow(server: TCPStore) -> None:
    stores, entered = ranks_of(server, 3), list[tuple[int, int]]()

    def work(ranks: RankStore) -> None:
        for number in range(20):
            if ranks.rank == 0:
                time.sleep(0.002)
                entered.append((number, 0))
            ranks.wait_for_main()
            assert (number, 0) in entered
            entered.append((number, ranks.rank + 1))
            ranks.wait_for_all()
            assert {(number, rank + 1) for rank in range(3)} <= {*entered}

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(work, stores)) == [None] * 3
        keys = server.num_keys()
        assert list(threads.map(work, stores)) == [None] * 3
    assert server.num_keys() == keys < 6


def test_a_failure_wakes_a_rank_that_waits_and_the_first_failure_counts(server: TCPStore) -> None:
    _, waiting, failing, late = ranks_of(server, 4)
    with ThreadPoolExecutor(1) as thread:
        waits = thread.submit(waiting.wait_for_main)
        first = RankFailure.of(2, UserError("the disk is full\nand more"))
        assert failing.announce(first) == first
        error = waits.exception(20)
    assert isinstance(error, PeerFailedError) and exit_code_of(error) == 2
    assert str(error) == f"rank 2 ({first.host}, process {os.getpid()}) failed: the disk is full"
    assert late.announce(RankFailure.of(3, RuntimeError("connection closed"))) == first == waiting.failure()
    assert isinstance(late.announce_error(RuntimeError("connection closed")), PeerFailedError)


def test_rank_0_keeps_its_store_until_the_others_have_read_of_the_failure(server: TCPStore) -> None:
    main, *others = ranks_of(server, 3)
    assert main.announce_error(bug := KeyError("a bug")) is bug
    with ThreadPoolExecutor(1) as thread:
        waits = thread.submit(main.wait_until_seen)
        for other in others:
            assert not waits.done()
            failure = other.failure()
            assert failure is not None and failure.text == "KeyError: 'a bug'"
            other.acknowledge()
        waits.result(20)


def test_waits_end_with_an_error_if_the_store_is_lost_or_the_time_is_over() -> None:
    server = TCPStore("127.0.0.1", 0, 1, True)
    _, waiting = ranks_of(server, 2)
    with pytest.raises(OneRankFailedError, match="has not finished its work within 0:00:00"):
        waiting.wait_for_main(timedelta(seconds=0.05))
    del server
    with pytest.raises(OneRankFailedError, match="rank 0 cannot be reached"):
        waiting.wait_for_main()
    assert waiting.failure() is None
    assert "rank 0 cannot be reached" in str(waiting.announce_error(RuntimeError("connection closed by peer")))
    assert waiting.announce_error(bug := KeyError("a bug")) is bug


def test_errors_that_all_ranks_know_of_are_told_from_those_of_one() -> None:
    explained = OneRankFailedError("no memory")
    explained.__cause__ = known = ValueError("in run_on_all")
    assert not is_known_to_all(explained)
    known.is_known_to_all = True  # type: ignore[attr-defined]
    assert all(map(is_known_to_all, (explained, EveryRankError("x"), RunFailedError("x"), PeerFailedError("x", 2))))
    assert not any(map(is_known_to_all, (UserError("x"), OneRankFailedError("x"), KeyError("x"), KeyboardInterrupt())))


END = """
import sys, threading, time
from galaxydist import rank_store
from galaxydist.rank_store import end_process
rank_store.END_S = 0.5
def block(): threading.Event().wait()
def fail(): raise OSError
threading.Thread(target=block).start()  # the interpreter's own end would wait for it
works = [(block, 0.1), (block, 1000), (fail, 9), (lambda: sys.stdout.write("done"), 9)]
threads = [threading.Thread(target=end_process, args=(7, works)) for _ in range(2)]
[thread.start() for thread in threads]
block()
"""


def test_end_process_gives_each_work_its_time_does_them_once_and_flushes() -> None:
    done = subprocess.run([sys.executable, "-c", END], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, "done", "")


def wait_long() -> None:
    """Rank 0 works for longer than the group's timeout; so does one rank of all."""
    with open_world("no", os.environ, timeout=timedelta(seconds=5)) as world:
        assert world.run_on_main(lambda: time.sleep(7) or world.rank) == 0
        assert world.run_on_all(lambda: time.sleep(7 * world.rank) or world.rank) == world.rank
        time.sleep(7 * world.rank)
        assert world.all_gather(world.rank) == [0, 1]
        world.barrier()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_waits_for_rank_0_and_for_all_outlast_the_timeout_of_the_process_group(tmp_path: Path) -> None:
    with forked(wait_long, folder=tmp_path, size=2) as run:
        assert run.wait() == [0, 0], run.text("err")


def fail_alone(world: World) -> None:
    if world.rank == 2:
        raise UserError("the disk of this node is full")
    if world.rank == 1:
        world.run_on_main(lambda: None)
    while world.store is not None and world.store.failure() is None:
        time.sleep(0.05)
    world.barrier()


def launch_refused() -> int:
    """Work of three processes that rank 0 refuses; as with NCCL, its broadcast returns before the others take part."""
    broadcast = torch.distributed.broadcast_object_list

    def begin(*arguments: object, **named: object) -> None:
        threading.Thread(target=broadcast, args=arguments, kwargs=named, daemon=True).start()

    def refuse() -> None:
        time.sleep(1)  # the others ask the store less often by now
        raise UserError("there are no galaxies")

    def work(_: None, environ: object, _leave: Callable[..., None]) -> int:
        with open_world("no", environ) as world:  # type: ignore[arg-type]
            if world.is_main:
                torch.distributed.broadcast_object_list = begin
            world.run_on_main(refuse)
        return 0

    return launch(None, os.environ, work=work)


@pytest.mark.multiprocess
def test_rank_0_leaves_after_an_error_of_all_ranks_once_the_others_have_it(tmp_path: Path) -> None:
    with forked(launch_refused, folder=tmp_path, size=3) as run:
        wait_for_exits(run.processes, 100)
        assert run.exit_codes == [2, 2, 2], run.text("err")
        assert run.text("err") == "galaxydist: error: there are no galaxies\n"


def launch_failing() -> int:
    """Work of three processes without a watchdog, such as an evaluation; destroying the group never ends."""
    torch.distributed.destroy_process_group = lambda: threading.Event().wait()

    def work(_: None, environ: object, _leave: Callable[..., None]) -> int:
        with open_world("no", environ) as world:  # type: ignore[arg-type]
            fail_alone(world)
        return 0

    return launch(None, os.environ, work=work)


@pytest.mark.multiprocess
def test_a_rank_that_fails_alone_wakes_the_others_where_there_is_no_watchdog(tmp_path: Path) -> None:
    with forked(launch_failing, folder=tmp_path, size=3) as run:
        wait_for_exits(run.processes, 100)
        assert run.exit_codes == [2, 2, 2], run.text("err")
        assert run.said(2, "err") == "galaxydist: error (rank 2): the disk of this node is full\n"
        assert f"process {run.pids[2]}) failed: the disk of this node is full" in run.said(0, "err")
        assert run.said(1, "err") == ""


@pytest.fixture
def used_port() -> Iterator[int]:
    """The port of a program that ends each connection, as one does that is spoken to in a language not its own."""
    with socket.create_server(("", 0)) as server:

        def refuse() -> None:
            with suppress(OSError):  # the test is over
                while True:
                    server.accept()[0].close()

        thread = threading.Thread(target=refuse)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize(
    ("rank", "said"),
    [
        (0, "Rank 0 cannot listen at MASTER_ADDR=127.0.0.1, MASTER_PORT={port}: another"),
        (1, "Rank 1 has not met the other processes of the run, 2 in all, at MASTER_ADDR=127.0.0.1, MASTER_PORT={port}: "),
    ],
)
def test_ranks_that_do_not_meet_are_told_where_they_should_have(
    rank: int, said: str, used_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The port is another program's."""
    monkeypatch.setattr(distributed, "MEETING_TIMEOUT", timedelta(seconds=1))
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**variables, "MASTER_PORT": str(used_port)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OneRankFailedError, match=said.format(port=used_port)):
        init_distributed("no", os.environ)


def launch_start(fault: str) -> int:
    """Work of which rank 1 fails alone: between the start of the group and the work, or in work of all ranks."""

    def fail(*_: object) -> None:
        raise OneRankFailedError("no memory left") if fault == "work of all" else KeyError("a bug")

    def work(_: None, environ: object, _leave: Callable[..., None]) -> int:
        is_faulty = os.environ["RANK"] == "1"
        if fault == "start" and is_faulty:
            distributed.MixedPrecision = fail  # type: ignore[assignment, misc]
        with open_world("no", environ) as world:  # type: ignore[arg-type]
            world.run_on_all(fail if is_faulty else lambda: None)
        return 0

    return launch(None, os.environ, work=work)


@pytest.mark.multiprocess
def test_a_rank_that_fails_at_its_start_wakes_the_others(tmp_path: Path) -> None:
    with forked(launch_start, "start", folder=tmp_path, size=3) as run:
        wait_for_exits(run.processes, 100)
        assert run.exit_codes == [1, 1, 1], run.text("err")
        assert f"process {run.pids[1]}) failed: KeyError: 'a bug'" in run.said(0, "err")
        assert "Traceback" in run.said(1, "err") and "Traceback" not in run.said(0, "err") + run.said(2, "err")


@pytest.mark.multiprocess
def test_an_explained_failure_in_work_of_all_ranks_is_logged_once(tmp_path: Path) -> None:
    with forked(launch_start, "work of all", folder=tmp_path, size=3) as run:
        wait_for_exits(run.processes, 100)
        assert run.exit_codes == [1, 1, 1]
        assert run.text("err") == "galaxydist: error: rank 1 failed: no memory left\n"


def test_a_connection_that_breaks_without_a_message_is_explained(server: TCPStore) -> None:
    ranks = ranks_of(server, 2)[1]
    explained = ranks.announce_error(RuntimeError("[gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer. GLHF!"))
    assert isinstance(explained, OneRankFailedError) and "that process was killed" in str(explained)
    failure = ranks.failure()
    assert failure is not None and failure.text.startswith("the connection to another rank has broken")
