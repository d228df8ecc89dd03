"""Chooses and checks the ports before tritonserver starts, which would only say "failed to start"."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from flashserve.launcher.errors import LauncherError


@dataclass(frozen=True)
class Endpoints:
    """Where the server listens. ``host`` is the address to bind."""

    host: str
    http: int
    grpc: int
    metrics: int

    @property
    def local_host(self) -> str:
        """The address under which this machine reaches the server."""
        return "127.0.0.1" if self.host in ("0.0.0.0", "::", "") else self.host

    @property
    def http_address(self) -> str:
        """``host:port`` of the HTTP endpoint, as this machine reaches it."""
        return f"{self.local_host}:{self.http}"


def is_free(host: str, port: int) -> bool:
    """True if a server can listen there now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As tritonserver does: a port whose old connections are in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError:
            return False
    return True


def free_port(host: str = "127.0.0.1") -> int:
    """A port that was free a moment ago."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def choose(host: str, http: int, grpc: int, metrics: int) -> Endpoints:
    """Check the ports; 0 means any free one. Raises LauncherError that names the port and its option."""
    chosen: dict[str, int] = {}
    for option, port in (("--http-port", http), ("--grpc-port", grpc), ("--metrics-port", metrics)):
        if port == 0:
            port = free_port(host)
        elif not is_free(host, port):
            raise LauncherError(
                f"port {port} is taken on {host}",
                f"choose another with {option} PORT (0 takes any free one), or find who listens: "
                f"ss -ltnp 'sport = :{port}'",
            )
        if port in chosen.values():
            raise LauncherError(f"port {port} is given twice", f"give {option} a port of its own")
        chosen[option] = port
    return Endpoints(host, *chosen.values())
