"""HTTP/1.1 over a socket: what the kernel has is read at once and stamped, then taken apart.

Sockets of the standard library, which Locust makes cooperative. An HTTP library's `iter_lines` would gather several
tokens into one piece and falsify the times between them.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from ..record import CONNECTION, TIMEOUT, RequestFailed

READ_BYTES = 65536  # more than a server sends within a step; a read returns what is there
CONNECT_TIMEOUT_S = 10.0
MAX_HEAD_BYTES = 65536
IDLE_S = 20.0  # servers drop idle connections after some time; ours must be the one that is dropped earlier


class Connection:
    """One connection, one request at a time."""

    def __init__(self, host: str, port: int, secure: bool) -> None:
        try:
            self._socket = socket.create_connection((host, port), CONNECT_TIMEOUT_S)
        except OSError as error:
            raise RequestFailed(CONNECTION, f"no server at {host}:{port} ({error})") from None
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if secure:
            self._socket = ssl.create_default_context().wrap_socket(self._socket, server_hostname=host)
        self._buffer = b""
        self.arrival = 0.0
        """When the bytes that are being taken apart came."""
        self.idle_since = 0.0
        self.reusable = False

    def send(self, data: bytes, timeout_s: float) -> None:
        self.reusable = False
        self._deadline = time.perf_counter() + timeout_s
        self._socket.settimeout(timeout_s)
        self._socket.sendall(data)

    def _receive(self) -> bool:
        """Adds what comes next to the buffer; False at the end of the connection."""
        left = self._deadline - time.perf_counter()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
        data = self._socket.recv(READ_BYTES)
        self.arrival = time.perf_counter()
        self._buffer += data
        return bool(data)

    def _take_until(self, mark: bytes) -> bytes:
        while (end := self._buffer.find(mark)) < 0:
            if len(self._buffer) > MAX_HEAD_BYTES or not self._receive():
                raise ConnectionError("the connection ended within an answer")
        found, self._buffer = self._buffer[:end], self._buffer[end + len(mark) :]
        return found

    def _take(self, count: int) -> bytes:
        while len(self._buffer) < count:
            if not self._receive():
                raise ConnectionError("the connection ended within an answer")
        found, self._buffer = self._buffer[:count], self._buffer[count:]
        return found

    def head(self) -> tuple[int, dict[str, str]]:
        """The answer's status and headers, names in lower case."""
        lines = self._take_until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        try:
            status = int(lines[0].split(" ", 2)[1])
        except (IndexError, ValueError):
            raise ConnectionError(f"no HTTP: {lines[0][:80]!r}") from None
        return status, {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])
        }

    def body(self, headers: Mapping[str, str]) -> Iterator[bytes]:
        """The body's pieces as they come; `arrival` is when."""
        if "chunked" in headers.get("transfer-encoding", "").lower():
            while size := int(self._take_until(b"\r\n").split(b";")[0], 16):
                yield self._take(size)
                self._take(2)
            while self._take_until(b"\r\n"):
                pass  # trailers
        elif "content-length" in headers:
            left = int(headers["content-length"])
            while left:
                piece = self._buffer[:left] or (self._receive() and self._buffer[:left])
                if not piece:
                    raise ConnectionError("the connection ended within an answer")
                self._buffer = self._buffer[len(piece) :]
                left -= len(piece)
                yield piece
        else:
            if self._buffer:
                yield self._buffer
            self._buffer = b""
            while self._receive():
                piece, self._buffer = self._buffer, b""
                yield piece
            return
        self.reusable = headers.get("connection", "").lower() != "close"
        self.idle_since = time.perf_counter()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.close()


class Pool:
    """Connections to one server: as many as there are requests, used again afterwards."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._secure = parts.scheme == "https"
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if self._secure else 80)
        self._netloc = parts.netloc.rpartition("@")[2]
        self._idle: list[Connection] = []

    @contextlib.contextmanager
    def post(
        self, path: str, body: bytes, headers: Mapping[str, str], timeout_s: float
    ) -> Iterator[tuple[int, Iterator[bytes], Connection]]:
        """Sends a request; yields status, body and connection. RequestFailed says what went wrong with the wire."""
        lines = [f"POST {path} HTTP/1.1", f"Host: {self._netloc}", f"Content-Length: {len(body)}"]
        lines += ["Content-Type: application/json", *(f"{name}: {value}" for name, value in headers.items())]
        data = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body
        connection: Connection | None = None
        try:
            connection, status, answer = self._ask(data, timeout_s)
            yield status, connection.body(answer), connection
        except TimeoutError:
            raise RequestFailed(TIMEOUT, f"no end within {timeout_s:g} s") from None
        except (OSError, ValueError) as error:  # ValueError: a length that is no number
            raise RequestFailed(CONNECTION, str(error)) from None
        finally:
            if connection is not None and connection.reusable:
                self._idle.append(connection)
            elif connection is not None:
                connection.close()

    def _ask(self, data: bytes, timeout_s: float) -> tuple[Connection, int, dict[str, str]]:
        while self._idle:
            connection = self._idle.pop()
            if time.perf_counter() - connection.idle_since < IDLE_S:
                try:
                    connection.send(data, timeout_s)
                    return connection, *connection.head()
                except TimeoutError:
                    connection.close()
                    raise
                except OSError:
                    pass  # the server closed it meanwhile and has not read the request
            connection.close()
        connection = Connection(self._host, self._port, self._secure)
        try:
            connection.send(data, timeout_s)
            return connection, *connection.head()
        except BaseException:
            connection.close()
            raise

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()


def events(pieces: Iterator[bytes], connection: Connection) -> Iterator[tuple[float, bytes]]:
    """The data of server-sent events, each with the arrival of its last byte."""
    rest = b""
    for piece in pieces:
        rest += piece
        while (end := rest.find(b"\n")) >= 0:
            line, rest = rest[:end].rstrip(b"\r"), rest[end + 1 :]
            if line.startswith(b"data:"):
                yield connection.arrival, line[5:].strip()
