"""HTTP with bounds that uvicorn lacks: how large a request's head may be, and how long it may take."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .settings import Limits

_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


def bounded_protocol(limits: Limits) -> type[HttpToolsProtocol]:
    """The protocol class of one server."""

    class BoundedProtocol(HttpToolsProtocol):
        """Counts the bytes of a head, which the parser would collect without end, and the time it takes."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._fields_bytes = 0
            self._is_refused = False
            self._head_timer: asyncio.TimerHandle | None = None
            self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_done()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._head_timer is not None:
                self._head_bytes += len(data)
                # What comes with the head's last bytes is the body's beginning: one read of a socket more.
                if self._head_bytes > limits.header_bytes + _ONE_READ:
                    self._refuse(_TOO_LARGE)
                    return
            super().data_received(data)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            if self._head_timer is None:  # a further request of the connection
                self._await_head()
            self._fields_bytes = 0

        def on_url(self, url: bytes) -> None:
            self._count(len(url))
            super().on_url(url)

        def on_header(self, name: bytes, value: bytes) -> None:
            self._count(len(name) + len(value))
            super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._head_done()
            if self._fields_bytes > limits.header_bytes:
                self._refuse(_TOO_LARGE)
                return
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            if not self._is_refused:
                super().on_body(body)

        def on_message_complete(self) -> None:
            if not self._is_refused:
                super().on_message_complete()

        def _count(self, size: int) -> None:
            self._fields_bytes += size

        def _await_head(self) -> None:
            self._head_bytes = 0
            self._head_timer = self.loop.call_later(limits.header_timeout_s, self._refuse, _TOO_SLOW)

        def _head_done(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _refuse(self, answer: bytes) -> None:
            self._head_done()
            self._is_refused = True
            if self.transport is not None and not self.transport.is_closing():
                self.transport.write(answer)
                self.transport.close()

    return BoundedProtocol


_ONE_READ = 256 << 10
"""What uvloop hands over at once, at most."""
