"""A gateway in front of an engine that costs nothing, so that what is left is the gateway. Prints its port; serves."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping

import uvicorn

from flashserve_client import AsyncClient, ModelInfo
from flashserve_client.request import InferRequest
from flashserve_client.transport import NO_FILES, Chunk
from flashserve_gateway.app import create_app
from flashserve_gateway.pool import Pool
from flashserve_gateway.protocol import bounded_protocol
from flashserve_gateway.settings import Settings

_WORD = Chunk(" word", "None", 8, 1)


class FreeTransport:
    """Answers with as many words as were asked for, each at once."""

    def open(self, request: InferRequest) -> FreeReader:
        return FreeReader(int((request.sampling or {}).get("max_tokens", 0)))

    async def server_live(self) -> bool:
        return True

    async def model_ready(self, model: str) -> bool:
        return True

    async def models(self) -> list[ModelInfo]:
        return [ModelInfo("free", "1", "READY", "")]

    async def load_model(self, model: str, config: str = "", files: Mapping[str, bytes] = NO_FILES) -> None:
        raise NotImplementedError

    async def unload_model(self, model: str) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        pass


class FreeReader:
    def __init__(self, count: int) -> None:
        self._left = count

    async def read(self) -> Chunk | None:
        await asyncio.sleep(0)  # the other streams' turn, as if this one waited for its engine
        self._left -= 1
        if self._left < 0:
            return None
        return _WORD if self._left else _WORD._replace(finish_reason="length")

    async def aclose(self) -> None:
        pass


def main() -> None:
    settings = Settings(refresh_s=60)
    app = create_app(settings, Pool([AsyncClient(model="free", transport=FreeTransport())], settings.refresh_s))
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(
        app, loop="uvloop", http=bounded_protocol(settings.limits), ws="none", log_config=None, access_log=False
    )
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
