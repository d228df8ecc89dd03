"""A process holds what is its own."""

from __future__ import annotations

import socket
from pathlib import Path

import psutil

from harness import Server
from null_models import null_model, write_null_model
from requests_helper import generate


def test_a_model_that_is_loaded_later_holds_no_port_and_no_clients_connection(tmp_path: Path) -> None:
    with Server({"m": null_model(write_null_model(tmp_path / "null"))}) as server:
        host, port = server.http.removeprefix("http://").split(":")
        client = socket.create_connection((host, int(port)))
        client.sendall(b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200" in client.recv(1000)
        server.unload("m")
        server.load("m")
        assert generate(server, model="m", text_input="hello", max_tokens=3)["text_output"]
        (stub,) = server.stubs("m")
        servers_ports = {int(address.rsplit(":", 1)[1].split("/")[0]) for address in
                         (server.http, server.grpc, server.metrics)}  # fmt: skip
        held = [one for one in psutil.Process(stub.pid).net_connections("inet") if one.laddr.port in servers_ports]
        assert not held
        client.close()
