"""A stub keeps none of the sockets that it inherited, and everything else."""

import os
import socket

from flashserve.frontend.inherited import close_sockets


def test_sockets_are_closed_and_nothing_else():
    """In a child: this process has sockets of its own."""
    listening = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listening.getsockname())
    accepted, _ = listening.accept()
    six = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    left, right = socket.socketpair()
    sockets = (listening, client, accepted, six, left, right)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        closed = close_sockets()
        gone = 0
        for one in sockets:
            try:
                os.fstat(one.fileno())
            except OSError:
                gone += 1
        os.write(writer, f"{closed >= len(sockets)} {gone}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 100) == f"True {len(sockets)}".encode()
    accepted.send(b"x")
    assert client.recv(1) == b"x", "the parent's own are open"
    for one in sockets:
        one.close()
    os.close(reader)
    os.close(writer)
