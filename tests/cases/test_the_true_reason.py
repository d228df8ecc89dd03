"""An address or port that cannot be listened on is refused with its own reason; a name becomes an address first."""

from __future__ import annotations

import errno
import os
import socket

import pytest

from flashserve.launcher import ports
from flashserve.launcher.errors import LauncherError
from flashserve.launcher.ports import Endpoints


def refusal(host: str, http: int = 0) -> LauncherError:
    with pytest.raises(LauncherError) as caught:
        ports.choose(host, http, 0, 0)
    assert "taken" not in str(caught.value)
    assert caught.value.advice
    return caught.value


def test_an_address_of_another_machine() -> None:
    assert "192.0.2.1 is no address of this machine" in str(refusal("192.0.2.1"))
    assert "192.0.2.1 is no address of this machine" in str(refusal("192.0.2.1", 8000))


@pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 64])
def test_a_name_without_an_address(host: str) -> None:
    assert f"--host {host}: this name has no address" in str(refusal(host))


def test_an_ipv6_address() -> None:
    assert "::1 is an IPv6 address" in str(refusal("::1"))


def test_a_port_that_needs_rights(monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(self: socket.socket, address: tuple[str, int]) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(socket.socket, "bind", bind)
    assert "port 80 needs rights" in str(refusal("127.0.0.1", 80))


def test_a_name_becomes_its_address() -> None:
    """Triton takes a name for 255.255.255.255, and never becomes ready."""
    assert ports.choose("localhost", 0, 0, 0).host == "127.0.0.1"
    assert Endpoints("0.0.0.0", 1, 2, 3).http_address == "127.0.0.1:1"
