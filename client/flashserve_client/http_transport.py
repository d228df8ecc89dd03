"""HTTP: `generate` as JSON, `generate_stream` as server-sent events."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import socket
from collections.abc import AsyncGenerator, Mapping
from typing import Any
from urllib.request import getproxies, proxy_bypass

import httpx
from httpx_sse import EventSource, ServerSentEvent, SSEError

from .errors import ConnectionFailed, FlashserveError, InternalError, InvalidRequest, Timeout, error_from_message
from .request import InferRequest
from .results import ModelInfo
from .transport import NO_FILES, Address, Chunk, with_unlisted

_UNARY_TIMEOUT_S = 10.0
_LOAD_TIMEOUT_S = 600.0  # a large model reads for minutes

# Triton 2.51 does not decode paths: the model of /v2/models/a%40b is called "a%40b". So a name is sent as it is, which
# HTTP allows for visible ASCII, and Triton's own search for the verb ends at a slash.
_PATH_SEGMENT = re.compile(r"[!-\"$-.0->@-~]+")

# Statuses that a proxy in between gives; tritonserver answers errors of requests with 400 and a JSON body.
_STATUS_CODES = {404: "NOT_FOUND", 429: "UNAVAILABLE", 502: "UNAVAILABLE", 503: "UNAVAILABLE", 504: "UNAVAILABLE"}


class HttpTransport:
    """A pool of HTTP/1.1 connections, one per running request."""

    def __init__(self, address: Address, headers: Mapping[str, str], connect_timeout_s: float) -> None:
        self.url = address.url
        proxy = _proxy(address)
        self.client = httpx.AsyncClient(
            base_url=address.url,
            headers=dict(headers),
            timeout=httpx.Timeout(None, connect=connect_timeout_s),
            transport=httpx.AsyncHTTPTransport(
                # Reading the certificates takes 150 ms; nothing here follows a redirect from http to https.
                verify=address.secure,
                # httpx's default of 100 connections would make the 101st stream wait in the client.
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=30),
                socket_options=_socket_options(),
                proxy=proxy,
            ),
        )
        self._has_proxy = proxy is not None

    def open(self, request: InferRequest) -> SseReader | JsonReader:
        return SseReader(self, request) if request.stream else JsonReader(self, request)

    async def server_live(self) -> bool:
        return (await self._send("GET", "/v2/health/live")).status_code == 200

    async def model_ready(self, model: str) -> bool:
        return (await self._send("GET", model_path(model, "ready"))).status_code == 200

    async def models(self) -> list[ModelInfo]:
        response = await self._send("POST", "/v2/repository/index", content=b"{}")
        rows = _json_or_raise(response)
        if not isinstance(rows, list):
            raise InternalError(f"{self.url} sent a repository index that is no list")
        stats = _json_or_raise(await self._send("GET", "/v2/models/stats"))
        ready = stats.get("model_stats", []) if isinstance(stats, dict) else []
        return with_unlisted(
            [ModelInfo(m.get("name", ""), m.get("version", ""), m.get("state", ""), m.get("reason", "")) for m in rows],
            [(m.get("name", ""), m.get("version", "")) for m in ready],
        )

    async def load_model(self, model: str, config: str = "", files: Mapping[str, bytes] = NO_FILES) -> None:
        parameters = {"config": config} if config else {}
        for path, content in files.items():
            parameters[f"file:{path}"] = base64.b64encode(content).decode("ascii")
        await self._control(model, "load", {"parameters": parameters} if parameters else {})

    async def unload_model(self, model: str) -> None:
        await self._control(model, "unload")

    async def aclose(self) -> None:
        await self.client.aclose()

    async def _control(self, model: str, verb: str, body: Mapping[str, Any] = NO_FILES) -> None:
        path = f"/v2/repository{model_path(model, verb).removeprefix('/v2')}"
        response = await self._send("POST", path, content=json.dumps(dict(body)).encode(), timeout_s=_LOAD_TIMEOUT_S)
        if response.status_code != 200:
            raise _response_error(response)

    def as_it_is(self, path: str) -> dict[str, Any]:
        """httpx's extensions by which a path reaches the server unquoted; none where httpx would not quote it. Raises
        InvalidRequest where a proxy is between, whose own target the extension would replace."""
        target = path.encode("ascii")
        if httpx.URL(f"http://host{path}").raw_path == target:
            return {}
        if self._has_proxy:
            raise InvalidRequest(f"the path {path!r} cannot be sent through a proxy, use grpc://")
        return {"target": target}

    async def _send(
        self, method: str, path: str, content: bytes | None = None, timeout_s: float = _UNARY_TIMEOUT_S
    ) -> httpx.Response:
        timeout = httpx.Timeout(timeout_s, connect=self.client.timeout.connect)
        try:
            return await self.client.request(
                method, path, content=content, timeout=timeout, extensions=self.as_it_is(path)
            )
        except httpx.HTTPError as error:
            raise transport_error(error, self.url) from None


class JsonReader:
    """One request, one JSON answer.

    Closing it ends the wait and the connection, but Triton does not tell the backend of it (server#8982): the
    generation ends by itself or at its deadline. Streams do not have this gap.
    """

    def __init__(self, transport: HttpTransport, request: InferRequest) -> None:
        self._transport = transport
        self._request = request
        self._sent = False

    async def read(self) -> Chunk | None:
        if self._sent:
            return None
        self._sent = True
        transport = self._transport
        path, body = request_path(self._request, "generate"), request_body(self._request)
        try:
            response = await transport.client.post(path, content=body, extensions=transport.as_it_is(path))
        except httpx.HTTPError as error:
            raise transport_error(error, transport.url) from None
        return parse_event(_json_or_raise(response))

    async def aclose(self) -> None:
        self._sent = True


class SseReader:
    """The events of one streamed answer."""

    def __init__(self, transport: HttpTransport, request: InferRequest) -> None:
        self._transport = transport
        self._request = request
        self._response: httpx.Response | None = None
        self._events: AsyncGenerator[ServerSentEvent, None] | None = None

    async def read(self) -> Chunk | None:
        try:
            if self._events is None:
                self._events = await self._open()
            event = await self._events.__anext__()
        except StopAsyncIteration:
            return None
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise transport_error(error, self._transport.url) from None
        except SSEError as error:
            raise InternalError(f"{self._transport.url} sent no event stream ({error})") from None
        return parse_event(_loads(event.data))

    async def aclose(self) -> None:
        events, self._events = self._events, None
        if self._response is not None:
            await self._response.aclose()  # closes the connection, for the answer is not at its end
        if events is not None:
            with contextlib.suppress(RuntimeError):  # a read still runs: the closed connection ends it
                await events.aclose()

    async def _open(self) -> AsyncGenerator[ServerSentEvent, None]:
        client = self._transport.client
        path, body = request_path(self._request, "generate_stream"), request_body(self._request)
        headers = {"Accept": "text/event-stream"}
        request = client.build_request(
            "POST", path, content=body, headers=headers, extensions=self._transport.as_it_is(path)
        )
        self._response = await client.send(request, stream=True)
        if self._response.status_code != 200:
            await self._response.aread()
            raise _response_error(self._response)
        return EventSource(self._response).aiter_sse()


def parse_event(event: Any) -> Chunk:
    """Reads the JSON object of a response. Raises the server's error if it holds one."""
    if not isinstance(event, dict):
        raise InternalError(f"the server sent a response that is no JSON object: {str(event)[:200]}")
    if "error" in event:
        raise error_from_message(str(event["error"]))
    get = event.get
    if type(get("text_output")) is list:
        return _samples(event)
    chunk = Chunk(
        get("text_output", ""),
        get("finish_reason"),
        get("num_input_tokens"),
        get("num_output_tokens"),
        get("request_metrics"),
        get("logprobs"),
        get("cumulative_logprob"),
        get("prompt_logprobs"),
        get("prompt_progress"),
    )
    if type(chunk.text) is not str or type(chunk.output_tokens) not in (int, _NoneType):
        raise InternalError(f"the server sent a response that cannot be read: {str(event)[:200]}")
    return chunk


def _samples(event: dict[str, Any]) -> Chunk:
    """Reads the response of a request for several samples, whose outputs are lists."""
    texts = event["text_output"]
    none = [None] * len(texts)
    try:
        pieces = zip(texts, event.get("finish_reason", none), event.get("num_output_tokens", none), strict=True)
        # Through this module's one check of types.
        chunks = [
            parse_event({"text_output": text, "finish_reason": reason, "num_output_tokens": tokens})
            for text, reason, tokens in pieces
        ]
    except (TypeError, ValueError):
        raise InternalError(f"the server sent a response that cannot be read: {str(event)[:200]}") from None
    return chunks[0]._replace(
        input_tokens=event.get("num_input_tokens"),
        metrics=event.get("request_metrics"),
        progress=event.get("prompt_progress"),
        others=tuple(chunks[1:]),
    )


_NoneType = type(None)


def transport_error(error: Exception, url: str) -> FlashserveError:
    """The typed error of httpx's failure to talk to a server."""
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
        return ConnectionFailed(f"no server at {url} ({error or type(error).__name__})", reason="unreachable")
    if isinstance(error, httpx.TimeoutException):
        return Timeout(f"no answer from {url} in time")
    return ConnectionFailed(f"the connection to {url} broke ({type(error).__name__}: {error})")


def _json_or_raise(response: httpx.Response) -> Any:
    if response.status_code != 200:
        raise _response_error(response)
    return _loads(response.text)


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise InternalError(f"the server sent what is not JSON: {text[:200]!r}") from None


def _response_error(response: httpx.Response) -> FlashserveError:
    # generate_stream answers an error with status 400 and a body that is still an event: "data: {...}".
    try:
        return error_from_message(str(json.loads(response.text.removeprefix("data: "))["error"]))
    except (ValueError, KeyError, TypeError):
        code = _STATUS_CODES.get(response.status_code, "INTERNAL")
        return error_from_message(f"HTTP {response.status_code}: {response.text[:200]} [code={code}]")


def request_path(request: InferRequest, verb: str) -> str:
    return model_path(request.model, verb)


def model_path(model: str, verb: str) -> str:
    """The path of a request about a model. Raises InvalidRequest for a name that no path can say."""
    if not model.isascii() or not _PATH_SEGMENT.fullmatch(model):
        raise InvalidRequest(f"the model name {model!r} cannot be sent over HTTP, use grpc://")
    return f"/v2/models/{model}/{verb}"


def request_body(request: InferRequest) -> bytes:
    values: dict[str, Any] = {**request.strings, **dict.fromkeys(request.flags, True), "id": request.request_id}
    return json.dumps(values, ensure_ascii=False).encode()


def _proxy(address: Address) -> str | None:
    """The environment's proxy, as httpx would choose it; asked for here because of the transport of our own."""
    if address.loopback or proxy_bypass(address.host):
        return None
    return getproxies().get(address.scheme)


def _socket_options() -> list[tuple[int, int, int]]:
    """TCP keep-alive, which notices a host that vanished after 30 + 3 x 10 s; streams themselves may be silent."""
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)]
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # macOS lacks the first
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    return options
