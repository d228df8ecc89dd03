"""HTTP with bounds that uvicorn lacks: how large a request's head may be, how long it may take, and for how long a
client may leave its answer unread."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from .settings import Limits

_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_ONE_READ = 256 << 10
"""What uvloop hands over at once, at most."""
_LEAST_READ = 64 << 10
"""Of a full buffer, what a client must have taken to be one that reads."""


class BoundedProtocol(HttpToolsProtocol):
    """Counts the bytes of head and trailers, which the parser would collect without end, and the time of a head."""

    limits: Limits
    """Uvicorn takes a class, so each server has its own: :func:`bounded_protocol`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._fields_bytes = 0
        self._is_refused = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._reader_timer: asyncio.TimerHandle | None = None
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_done()
        self._reader_done()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        if self._head_timer is not None:
            self._head_bytes += len(data)
            # What comes with the head's last bytes is the body's beginning: one read of a socket more.
            if self._head_bytes > self.limits.header_bytes + _ONE_READ:
                self._refuse(_TOO_LARGE)
                return
        super().data_received(data)

    # --- a head and its trailers ---------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head_timer is None:  # a further request of the connection
            self._await_head()
        self._fields_bytes = 0

    def on_url(self, url: bytes) -> None:
        if self._fits(len(url)):
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        # Trailers, which come when the head is done, are counted and dropped.
        if self._fits(len(name) + len(value)) and self._head_timer is not None:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._head_done()
        if not self._is_refused:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._is_refused:
            super().on_message_complete()

    def _fits(self, size: int) -> bool:
        self._fields_bytes += size
        if self._fields_bytes > self.limits.header_bytes and not self._is_refused:
            self._refuse(_TOO_LARGE)
        return not self._is_refused

    def _await_head(self) -> None:
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(self.limits.header_timeout_s, self._refuse, _TOO_SLOW)

    def _head_done(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, answer: bytes) -> None:
        self._head_done()
        self._is_refused = True
        if self.transport is not None and not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
                self.transport.write(answer)  # else it would be in the middle of another answer
            self.transport.close()

    # --- a client that does not read -----------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reader_done()
        if self.cycle is not None and self.cycle.response_complete:
            self._await_reader()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_reader()

    def _await_reader(self) -> None:
        """The connection is cut when what is written is not taken in time: to close it would wait for that."""
        if self._reader_timer is None and (unread := self.transport.get_write_buffer_size()):
            wait_s = self.limits.slow_reader_timeout_s
            self._reader_timer = self.loop.call_later(wait_s, self._look_at_reader, unread, self.cycle)

    def _look_at_reader(self, before: int, cycle: RequestResponseCycle) -> None:
        """Of the same request nothing was added since: writing is paused, or its answer is whole."""
        self._reader_timer = None
        if cycle is self.cycle and self.transport.get_write_buffer_size() > max(0, before - _LEAST_READ):
            self.transport.abort()
        else:
            self._await_reader()

    def _reader_done(self) -> None:
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None


def bounded_protocol(limits: Limits) -> type[BoundedProtocol]:
    """The protocol class of one server."""
    return type("ServersProtocol", (BoundedProtocol,), {"limits": limits})
