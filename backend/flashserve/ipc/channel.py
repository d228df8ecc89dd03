"""Typed messages over a local stream socket: a 4-byte little-endian length, then msgpack."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from typing import Any, Generic, TypeVar

import msgspec

Incoming = TypeVar("Incoming")

LENGTH = struct.Struct("<I")
RECEIVE_BYTES = 1 << 20
SOCKET_BUFFER_BYTES = 4 << 20  # a step's message is ~10 kB at 256 requests: the engine never waits for a busy stub


class ChannelClosed(Exception):
    """The other side is gone."""


class Channel(Generic[Incoming]):
    """One end of the connection. Any thread may send; one thread receives."""

    def __init__(self, sock: socket.socket, incoming: Any) -> None:
        """``incoming`` is the union of message types that the other side sends."""
        self._sock = sock
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(incoming)
        self._send_lock = threading.Lock()
        self._buffer = bytearray()
        self._poll = select.poll()  # select.select() fails on descriptors beyond 1023
        self._poll.register(sock, select.POLLIN)

    @property
    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: msgspec.Struct) -> None:
        """Raises ChannelClosed when nobody can receive it."""
        with self._send_lock:
            payload = self._encoder.encode(message)
            try:
                self._sock.sendall(LENGTH.pack(len(payload)) + payload)
            except OSError as error:
                raise ChannelClosed(str(error)) from error

    def receive(self, timeout_s: float | None = None) -> list[Incoming]:
        """Messages that are there, after waiting for the first at most ``timeout_s`` (None: without bound).

        Empty after a timeout. Raises ChannelClosed when the other side has closed and all was read.
        """
        messages: list[Incoming] = []
        # One read takes all that is there. No second look: a busy sender would keep the loop from ever returning.
        while not messages and self._poll.poll(None if timeout_s is None else timeout_s * 1000):
            try:
                data = self._sock.recv(RECEIVE_BYTES)
            except OSError as error:
                raise ChannelClosed(str(error)) from error
            if not data:
                raise ChannelClosed("the other side closed the connection")
            self._buffer += data
            messages = self._complete_messages()
        return messages

    def _complete_messages(self) -> list[Incoming]:
        buffer, position, messages = self._buffer, 0, []
        while len(buffer) - position >= LENGTH.size:
            (length,) = LENGTH.unpack_from(buffer, position)
            end = position + LENGTH.size + length
            if len(buffer) < end:
                break
            messages.append(self._decoder.decode(memoryview(buffer)[position + LENGTH.size : end]))
            position = end
        if position:
            del buffer[:position]
        return messages

    def shutdown(self) -> None:
        """End the connection from any thread: both sides' receivers wake up with ChannelClosed."""
        with contextlib.suppress(OSError):  # the other side may have been first
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Free the descriptor. For the receiving thread only, which might else poll a reused number."""
        self.shutdown()  # a sender that waits for room in the buffer wakes up and gives the lock back
        with self._send_lock:  # none is about to write to a number that the next connection may get
            self._sock.close()
