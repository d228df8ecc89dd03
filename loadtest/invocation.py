"""Locust's command line for a run."""

from __future__ import annotations

import argparse
import socket
import sys
from pathlib import Path

from .settings import OPTIONS

DEFAULT_USERS = 4


def locust_words(args: argparse.Namespace, urls: list[str]) -> list[str]:
    """Locust's command line for these options."""
    locustfile = Path(__file__).with_name("locustfile.py")
    users = args.users or DEFAULT_USERS if not (args.rate or args.trace) else 1
    words = [sys.executable, "-m", "locust", "-f", str(locustfile), "--headless", "--only-summary"]
    # All users at once: they begin together, at the run's start.
    words += ["--users", str(users), "--spawn-rate", str(max(100, users))]
    if args.processes > 1:
        # Locust's own default, 5557, is for one run on a machine.
        port = free_port()
        words += ["--processes", str(args.processes), "--master-bind-host=127.0.0.1"]
        words += [f"--master-bind-port={port}", f"--master-port={port}"]
    words += [f"--target={url}" for url in urls]
    for flag in OPTIONS:
        value = getattr(args, flag[2:].replace("-", "_"))
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            words += [f"{flag}={item}" for item in (value if isinstance(value, list) else [value])]
    return words


def free_port() -> int:
    """One that nobody listens on just now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
