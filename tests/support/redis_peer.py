"""A real redis-server (apt install redis-server): on a socket in a folder of its own, keeping nothing on disk."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

PROGRAM = shutil.which("redis-server")


class RedisPeer:
    """Starts, stops and is killed as a test says."""

    def __init__(self, folder: Path) -> None:
        self._socket = folder / "redis.sock"
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"unix://{self._socket}"

    def start(self) -> None:
        """Empty. Returns when it answers."""
        assert PROGRAM is not None
        line = [PROGRAM, "--port", "0", "--unixsocket", str(self._socket), "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        until = time.monotonic() + 10
        while True:
            try:
                self.client().ping()
                return
            except redis.ConnectionError:
                assert self._process.poll() is None and time.monotonic() < until, "redis-server does not start"
                time.sleep(0.01)

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url)

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextmanager
def redis_server() -> Iterator[RedisPeer]:
    """One that runs until the block ends."""
    with tempfile.TemporaryDirectory(prefix="redis-") as folder:  # a socket's path has 107 bytes at most
        peer = RedisPeer(Path(folder))
        try:
            peer.start()
            yield peer
        finally:
            peer.kill()
