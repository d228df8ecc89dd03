"""Runs the application on uvicorn, on a socket of our own: a port that is taken has an error with advice."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket

import uvicorn

from .app import create_app
from .protocol import bounded_protocol
from .settings import Settings

log = logging.getLogger("flashserve_gateway")

# Streams may end within that time after SIGTERM. The launcher's promise for everything is ten seconds.
GRACE_S = 5
_KEEP_ALIVE_S = 75  # above what load balancers use, so that they close a connection and not we
_BACKLOG = 2048
_PR_SET_PDEATHSIG = 1


class CannotListen(OSError):
    """The address cannot be listened on; the message says why."""


def serve(settings: Settings, parent: int | None = None) -> None:
    """Serves until SIGINT or SIGTERM. Raises CannotListen, DataFolderError, KeysFileError.

    Args:
        parent: the process with which this one is to end.
    """
    if parent is not None:
        _end_with(parent)
    app = create_app(settings)
    listener = _listen(settings.host, settings.port)
    host, port = listener.getsockname()[:2]
    config = uvicorn.Config(
        app,
        loop="uvloop",
        ws="none",
        http=bounded_protocol(settings.limits),
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    shown = f"[{host}]" if ":" in host else host
    log.info("OpenAI's API at http://%s:%d/v1, in front of %s", shown, port, ", ".join(settings.triton))
    uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)  # of two that bind it at the same time, one fails here
    except OSError as error:
        raise CannotListen(f"port {port} of {host} cannot be listened on: {error.strerror}") from None
    return listener


def _end_with(parent: int) -> None:
    """SIGTERM when the parent is gone, however it died."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it died before that
        raise SystemExit(0)
