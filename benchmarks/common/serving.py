"""Servers for a benchmark: `flashserve serve` on free ports with a repository made for the occasion, and others'.

Needs the standard library only: a peer's worker uses it too.
"""

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

START_TIMEOUT_S = 600.0  # vLLM's takes two minutes here
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
        command += ["--no-gateway", "--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics)]
        base = f"http://localhost:{http}"
        ready = [f"{base}/v2/models/{name}/ready" for name in models]
        with server(command, ready, log=Path(folder, "server.log")):
            yield Served(base, f"grpc://localhost:{grpc}", f"http://localhost:{metrics}/metrics")


@contextlib.contextmanager
def server(command: list[str], ready_urls: list[str], log: Path | None = None) -> Iterator[None]:
    """Run a server's command; inside, it is ready. ``log``: the file that takes what it says; None: stderr as is."""
    with log.open("wb") if log else contextlib.nullcontext() as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT if log else None)
    try:
        _wait_ready(process, ready_urls, log)
        yield
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


def _wait_ready(process: subprocess.Popen[bytes], urls: list[str], log: Path | None) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not all(_is_ready(url) for url in urls):
        if process.poll() is not None:
            said = log.read_text(errors="replace")[-4000:] if log else "its log says why"
            raise RuntimeError(f"the server ended with status {process.returncode} while it started: {said}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"the server was not ready after {START_TIMEOUT_S:.0f} s")
        time.sleep(0.2)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False
