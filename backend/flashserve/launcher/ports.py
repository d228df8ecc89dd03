"""Chooses and checks address and ports before tritonserver starts, which would only say "failed to start"."""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass

from flashserve.launcher.errors import LauncherError

ALL_ADDRESSES = "0.0.0.0"
GATEWAY_OPTION = "--gateway-port"


@dataclass(frozen=True)
class Endpoints:
    """Where the server listens. ``host`` is an address in numbers: Triton takes a name for 255.255.255.255."""

    host: str
    http: int
    grpc: int
    metrics: int
    gateway: int | None = None
    """None: there is none."""

    @property
    def local_host(self) -> str:
        """The address under which this machine reaches the server."""
        return "127.0.0.1" if self.host == ALL_ADDRESSES else self.host

    @property
    def http_address(self) -> str:
        """``host:port`` of the HTTP endpoint, as this machine reaches it."""
        return f"{self.local_host}:{self.http}"

    @property
    def metrics_address(self) -> str:
        """``host:port`` of the metrics endpoint, likewise."""
        return f"{self.local_host}:{self.metrics}"


def resolve(host: str) -> str:
    """The IPv4 address that ``--host`` means. Raises LauncherError for what Triton 2.51 could not listen on."""
    try:
        found = socket.getaddrinfo(host or ALL_ADDRESSES, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # a label of more than 63 characters is no name at all
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise LauncherError(
            f"--host {host}: this name has no address ({reason})",
            "give an address of this machine (ip -brief address lists them), or 0.0.0.0 for all of them",
        ) from None
    addresses = [str(address[0]) for family, _, _, _, address in found if family == socket.AF_INET]
    if not addresses:
        raise LauncherError(
            f"--host {host} is an IPv6 address, on which this tritonserver cannot listen",
            "give an IPv4 address, or put a proxy that listens on IPv6 before the server",
        )
    return addresses[0]


def refusal(host: str, port: int) -> OSError | None:
    """Why a server cannot listen there now; None if it can."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As tritonserver does: a port whose old connections are in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            return error
    return None


def is_free(host: str, port: int) -> bool:
    """True if a server can listen there now."""
    return refusal(host, port) is None


def free_port(host: str = "127.0.0.1") -> int:
    """A port that was free a moment ago."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def choose(host: str, http: int, grpc: int, metrics: int, gateway: int | None = None) -> Endpoints:
    """Check the ports; 0 means any free one. Raises LauncherError that names what is wrong and its option."""
    address = resolve(host)
    chosen: dict[str, int] = {}
    wanted = [("--http-port", http), ("--grpc-port", grpc), ("--metrics-port", metrics)]
    if gateway is not None:
        wanted.append((GATEWAY_OPTION, gateway))
    for option, port in wanted:
        error = refusal(address, port)
        if error is not None:
            raise _explain(error, host, option, port)
        if port == 0:
            port = free_port(address)
        if port in chosen.values():
            raise LauncherError(f"port {port} is given twice", f"give {option} a port of its own")
        chosen[option] = port
    return Endpoints(address, *chosen.values())


def _explain(error: OSError, host: str, option: str, port: int) -> LauncherError:
    """Each cause has a remedy of its own."""
    if error.errno == errno.EADDRINUSE:
        without = ", serve without it (--no-gateway)" if option == GATEWAY_OPTION else ""
        return LauncherError(
            f"port {port} is taken on {host}",
            f"choose another with {option} PORT (0 takes any free one){without}, or find who listens: "
            f"ss -ltnp 'sport = :{port}'",
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return LauncherError(
            f"--host {host} is no address of this machine",
            "ip -brief address lists those that are; 0.0.0.0 means all of them",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return LauncherError(
            f"port {port} needs rights that this user does not have ({os.strerror(error.errno)})",
            f"choose one from 1024 on with {option} PORT, or put a proxy before the server",
        )
    return LauncherError(
        f"port {port} cannot be listened on at {host}: {error.strerror}", f"--host, or {option}, says otherwise"
    )
