"""`AsyncClient`: the client itself; `Client` wraps it."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from .connect import DEFAULT_URL, parse_url, transport_class
from .deadline import Deadline
from .errors import FlashserveError, InternalError, Timeout, Unavailable
from .request import (
    DEFAULT_MODEL,
    InferRequest,
    Prompt,
    detokenize_body,
    embed_request,
    generate_request,
    tokenize_body,
    tokenize_request,
)
from .results import EmbedResult, GenerateResult, Health, ModelInfo
from .stream import CLIENT_GRACE_S, AsyncStream
from .transport import NO_FILES, Transport

_TOKENIZE_TIMEOUT_S = 30.0
_PROBE_PRIORITY = -1_000_000  # lower goes first: a health check must not wait behind the queue it asks about


class AsyncClient:
    """Talks to one server, over gRPC or HTTP as the URL says, from one event loop.

    Args:
        url: `grpc://host:8001` or `http://host:8000` (`grpcs://`, `https://` with TLS).
        model: the model that is meant where a call names none.
        timeout_s: the deadline of a request that names none, in seconds; None waits for ever.
        retries: how often a request that the server refused as Unavailable is sent again, after the time that the
            server asked for; never once a token has come.
        headers: sent with every request (gRPC: as metadata).
        connect_timeout_s: seconds to reach the server.
        transport: what carries the requests instead of the URL's protocol; closed with the client.

    Raises ValueError for a bad URL. Requests raise `FlashserveError`s; see `errors`.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        model: str = DEFAULT_MODEL,
        timeout_s: float | None = None,
        retries: int = 0,
        headers: Mapping[str, str] | None = None,
        connect_timeout_s: float = 5.0,
        transport: Transport | None = None,
    ) -> None:
        self._address = parse_url(url)
        self.url = self._address.url
        self._make_transport = transport_class(self._address.scheme)
        self._model = model
        self._timeout_s = timeout_s
        self._retries = retries
        self._headers = dict(headers or {})
        self._connect_timeout_s = connect_timeout_s
        self._transport = transport
        self._closed = False
        self._streams: weakref.WeakSet[AsyncStream] = weakref.WeakSet()

    async def generate(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        timeout_s: float | None = None,
        priority: int | None = None,
        request_id: str | None = None,
        **params: Any,
    ) -> GenerateResult:
        """Generates a whole answer; the server sends it at once.

        Args:
            prompt: text, a list of token ids, or a list of chat messages.
            timeout_s: seconds until the server gives up (DeadlineExceeded); one more and the client does (Timeout).
            priority: lower goes first; the default is 0.
            request_id: what the server logs; one is made up otherwise.
            params: sampling parameters by name (max_tokens, temperature, ...; None means "not given"), and for
                messages also tools, chat_template_kwargs, add_generation_prompt, continue_final_message.
        """
        # Not `self.stream`: a single response costs the server 100-170 µs, one per token as many times more.
        return await _finish(self._open(prompt, False, model, timeout_s, priority, request_id, params))

    def stream(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        timeout_s: float | None = None,
        priority: int | None = None,
        request_id: str | None = None,
        return_progress: bool = False,
        **params: Any,
    ) -> AsyncStream:
        """Like `generate`, but iterates over `Delta`s as they come; `.result` of the stream has the whole.

        Args:
            return_progress: also say after each step that computed a part of the prompt how far it is.
        """
        if return_progress:
            params["return_progress"] = True
        return self._open(prompt, True, model, timeout_s, priority, request_id, params)

    async def embed(
        self,
        prompt: str | Sequence[int],
        *,
        pooling: str | None = None,
        dimensions: int | None = None,
        normalize: bool | None = None,
        model: str | None = None,
        timeout_s: float | None = None,
        priority: int | None = None,
        request_id: str | None = None,
        **params: Any,
    ) -> EmbedResult:
        """The embedding of a text or of token ids.

        Args:
            pooling: "last" (the default), "mean" or "cls": which tokens' final hidden states it is made of.
            dimensions: keep the first of them; the default is all that the model has.
            normalize: to length 1; the default is yes.
            params: truncate_prompt_tokens, cache_salt. The others are those of `generate`.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        request = embed_request(
            prompt,
            model=model or self._model,
            pooling_params={"pooling": pooling, "dimensions": dimensions, "normalize": normalize},
            timeout_s=timeout_s,
            priority=priority,
            request_id=request_id,
            params=params,
        )
        answer = await _finish(self._begin(request, timeout_s, self._retries))
        try:
            return EmbedResult.of_answer(answer)
        except ValueError as error:
            raise InternalError(f"the server's answer is no embedding ({error})") from None

    async def tokenize(
        self, prompt: str | Sequence[Mapping[str, Any]], *, model: str | None = None, **template: Any
    ) -> list[int]:
        """The token ids of a text, or of chat messages rendered with the model's template, whose other fields (tools,
        chat_template_kwargs, ...) may be given."""
        answer = await self._ask_tokenizer({**tokenize_body(prompt), **template}, model)
        ids = answer.get("token_ids")
        if not isinstance(ids, list):
            raise InternalError("the server's answer to tokenize has no token_ids")
        return ids

    async def render(self, messages: Sequence[Mapping[str, Any]], *, model: str | None = None, **template: Any) -> str:
        """The prompt that the model's chat template makes of messages. `template`: tools, chat_template_kwargs, ..."""
        answer = await self._ask_tokenizer({**tokenize_body(messages), **template}, model)
        prompt = answer.get("prompt")
        if not isinstance(prompt, str):
            raise InternalError("the server's answer to tokenize has no prompt")
        return prompt

    async def detokenize(self, token_ids: Sequence[int], *, model: str | None = None) -> str:
        """The text of token ids."""
        answer = await self._ask_tokenizer(detokenize_body(token_ids), model)
        text = answer.get("text")
        if not isinstance(text, str):
            raise InternalError("the server's answer to detokenize has no text")
        return text

    async def health(self, *, model: str | None = None, timeout_s: float = 5.0) -> Health:
        """Asks tritonserver, the model and, through a request for one token, the engine. Does not raise.

        Triton itself calls a model ready whose engine is dead: only a request tells. Takes `timeout_s` at most.
        """
        model = model or self._model
        transport = self._connected()
        server_live = model_ready = False
        deadline = Deadline(timeout_s)
        try:
            with deadline:
                server_live = await transport.server_live()
                model_ready = server_live and await transport.model_ready(model)
                if not model_ready:
                    detail = f"model {model!r} is not ready" if server_live else "the server is not live"
                    return Health(server_live, False, False, detail)
                await self._probe(model, deadline.remaining() or timeout_s)
        except Timeout:
            return Health(server_live, model_ready, False, f"no answer within {timeout_s:g} s")
        except FlashserveError as error:
            # A full queue is the engine's own answer: it is busy, not dead, and must not be restarted for it.
            busy = isinstance(error, Unavailable) and error.is_full
            return Health(server_live, model_ready, busy, str(error))
        finally:
            deadline.cancel()
        return Health(True, True, True, "ok")

    async def models(self) -> list[ModelInfo]:
        """The models that the server knows, loaded or not."""
        return await self._connected().models()

    async def load_model(
        self, name: str, *, config: Mapping[str, Any] | None = None, files: Mapping[str, bytes] = NO_FILES
    ) -> None:
        """Loads or reloads a model; returns when it is ready (10 minutes at most).

        Args:
            config: the model's configuration in place of the repository's config.pbtxt.
            files: by path, such as "1/model.json": all of the model's files, in place of those of the repository,
                which need not know the name. Triton wants ``config`` with them.
        """
        await self._connected().load_model(name, "" if config is None else json.dumps(dict(config)), files)

    async def unload_model(self, name: str) -> None:
        """Starts to unload a model, and returns while its running requests drain."""
        await self._connected().unload_model(name)

    async def aclose(self) -> None:
        """Ends the running requests and closes the connections. May be called several times."""
        self._closed = True
        transport, self._transport = self._transport, None
        for stream in list(self._streams):
            await stream.aclose()
        if transport is not None:
            await transport.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _connected(self) -> Transport:
        if self._closed:
            raise RuntimeError("the client is closed")
        if self._transport is None:
            # Not in __init__: both libraries bind to the event loop that runs at this moment.
            self._transport = self._make_transport(self._address, self._headers, self._connect_timeout_s)
        return self._transport

    def _open(
        self,
        prompt: Prompt,
        stream: bool,
        model: str | None,
        timeout_s: float | None,
        priority: int | None,
        request_id: str | None,
        params: Mapping[str, Any],
        retries: int | None = None,
    ) -> AsyncStream:
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        request = generate_request(
            prompt,
            model=model or self._model,
            stream=stream,
            timeout_s=timeout_s,
            priority=priority,
            request_id=request_id,
            params=params,
        )
        return self._begin(request, timeout_s, self._retries if retries is None else retries)

    def _begin(self, request: InferRequest, timeout_s: float | None, retries: int) -> AsyncStream:
        opened = AsyncStream(self._connected(), request, timeout_s, retries)
        self._streams.add(opened)
        return opened

    async def _ask_tokenizer(self, body: Mapping[str, Any], model: str | None) -> dict[str, Any]:
        reader = self._connected().open(tokenize_request(body, model=model or self._model))
        deadline = Deadline(_TOKENIZE_TIMEOUT_S)
        try:
            with deadline:
                chunk = await reader.read()
        finally:
            deadline.cancel()
            await reader.aclose()
        try:
            answer = json.loads(chunk.text if chunk is not None else "")
        except ValueError as error:
            raise InternalError(f"the server's answer is not JSON ({error})") from None
        if not isinstance(answer, dict):
            raise InternalError("the server's answer is no JSON object")
        return answer

    async def _probe(self, model: str, timeout_s: float) -> None:
        """Has the engine generate one token; raises why it did not."""
        budget_s = max(timeout_s - CLIENT_GRACE_S, 0.1)
        await _finish(self._open([0], False, model, budget_s, _PROBE_PRIORITY, None, {"max_tokens": 1}, retries=0))


async def _finish(stream: AsyncStream) -> GenerateResult:
    async with stream:
        async for _ in stream:
            pass
    return stream.result
