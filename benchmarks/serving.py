"""Starts a server for a benchmark: `flashserve serve` on free ports with a repository made for the occasion."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 15.0


@dataclass(frozen=True)
class Served:
    """Where the server answers."""

    http: str
    grpc: str
    metrics: str


@contextlib.contextmanager
def serving(models: dict[str, dict[str, Any]]) -> Iterator[Served]:
    """Serve ``models``, each a model.json by name; the server ends with the context."""
    with tempfile.TemporaryDirectory(prefix="flashserve-bench-") as folder:
        for name, settings in models.items():
            version = Path(folder, name, "1")
            version.mkdir(parents=True)
            (version.parent / "config.pbtxt").write_text('backend: "flashserve"\n', encoding="utf-8")
            (version / "model.json").write_text(json.dumps(settings), encoding="utf-8")
        http, grpc, metrics = free_ports(3)
        command = [sys.executable, "-m", "flashserve.cli", "serve", "--model-repository", folder]
        command += ["--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics)]
        log = Path(folder, "server.log")
        with log.open("wb") as sink:
            process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)
        try:
            wait_ready(process, f"http://localhost:{http}", list(models), log)
            yield Served(f"http://localhost:{http}", f"grpc://localhost:{grpc}", f"http://localhost:{metrics}/metrics")
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def wait_ready(process: subprocess.Popen[bytes], url: str, models: list[str], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"the server ended while it started:\n{log.read_text(errors='replace')[-4000:]}")
        if all(_is_ready(f"{url}/v2/models/{name}/ready") for name in models):
            return
        time.sleep(0.2)
    raise SystemExit(f"the server was not ready after {START_TIMEOUT_S:.0f} s")


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False
