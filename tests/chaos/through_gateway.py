"""A client of the gateway's /v1/completions with the methods of our own client, so that chaos asks both alike."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx

from flashserve_client import ConnectionFailed, FlashserveError, NotFound, Timeout, Unavailable


@dataclass(frozen=True)
class Piece:
    text: str


@dataclass
class Result:
    text: str = ""
    finish_reason: str | None = None


class GatewayClient:
    """Raises FlashserveError for whatever is no whole answer, also when there is no end within `timeout_s`."""

    def __init__(self, url: str, model: str, timeout_s: float, key: str) -> None:
        self._http = httpx.AsyncClient(
            base_url=url, trust_env=False, verify=False, timeout=timeout_s, headers={"authorization": f"Bearer {key}"}
        )
        self._model = model
        self._timeout_s = timeout_s

    async def __aenter__(self) -> GatewayClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def generate(self, prompt: str, **params: Any) -> Result:
        with _typed():
            sending = self._http.post("/v1/completions", json=self._body(prompt, params))
            response = await asyncio.wait_for(sending, self._timeout_s)
            if response.status_code != 200:
                raise _refusal(response.status_code, response.text)
            (choice,) = response.json()["choices"]
            return Result(choice["text"], choice["finish_reason"])

    def stream(self, prompt: str, **params: Any) -> GatewayStream:
        return GatewayStream(self._http, {**self._body(prompt, params), "stream": True}, self._timeout_s)

    def _body(self, prompt: str, params: dict[str, Any]) -> dict[str, Any]:
        return {"model": self._model, "prompt": prompt, **params}


class GatewayStream:
    """The events of one answer. One that does not say its end was broken off: the gateway may be killed in the middle
    of an event, and an answer must not look whole then."""

    def __init__(self, http: httpx.AsyncClient, body: dict[str, Any], timeout_s: float) -> None:
        self._http = http
        self._body = body
        self._timeout_s = timeout_s
        self.result = Result()

    async def __aenter__(self) -> GatewayStream:
        self._until = asyncio.get_running_loop().time() + self._timeout_s
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    async def __aiter__(self) -> AsyncIterator[Piece]:
        with _typed():
            async with self._http.stream("POST", "/v1/completions", json=self._body) as response:
                if response.status_code != 200:
                    raise _refusal(response.status_code, (await response.aread()).decode())
                lines = response.aiter_lines()
                while (line := await self._line(lines)) != "data: [DONE]":
                    if line is None:
                        raise ConnectionFailed("the stream was broken off")
                    if not line.startswith("data: "):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise _refusal(500 if event["error"]["code"] == "internal_error" else 503, line)
                    (choice,) = event["choices"]
                    self.result.finish_reason = choice["finish_reason"] or self.result.finish_reason
                    yield Piece(choice["text"])

    async def _line(self, lines: AsyncIterator[str]) -> str | None:
        left_s = self._until - asyncio.get_running_loop().time()
        return await asyncio.wait_for(anext(lines, None), max(0.0, left_s))


@contextlib.contextmanager
def _typed() -> Any:
    try:
        yield
    except (httpx.TimeoutException, asyncio.TimeoutError) as error:
        raise Timeout("no end in time") from error
    except httpx.TransportError as error:
        raise ConnectionFailed(repr(error)) from error


def _refusal(status: int, text: str) -> FlashserveError:
    kinds = {404: NotFound, 429: Unavailable, 503: Unavailable}  # 404: while the model is loaded anew
    assert status in kinds, f"{status}: {text}"
    return kinds[status](text)
