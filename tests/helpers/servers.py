"""moto's S3 server for tests, in a process of its own on loopback."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def s3_server(folder: Path, log: Path) -> Iterator[str]:
    """moto's S3 server in a process of its own, with the files of ``folder`` in the bucket ``galaxies`` under ``shards/``.

    Yields:
        its address. ``log`` gets a line a request.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environ)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(address, server)
        _fill_bucket(address, folder)
        yield address
    finally:
        server.terminate()
        server.wait()


def _wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 300
    while True:
        try:
            urllib.request.urlopen(f"{address}/moto-api/", timeout=5).close()
            return
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, "moto's server does not start"
            time.sleep(0.05)


def _fill_bucket(address: str, folder: Path) -> None:
    import botocore.session

    client = botocore.session.Session().create_client(
        "s3", region_name="us-east-1", endpoint_url=address, aws_access_key_id="test", aws_secret_access_key="test"
    )
    client.create_bucket(Bucket="galaxies")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            client.put_object(Bucket="galaxies", Key=f"shards/{path.relative_to(folder)}", Body=path.read_bytes())
