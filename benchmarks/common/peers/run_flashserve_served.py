"""flashserve through Triton: `flashserve serve`, and a client that streams over gRPC on the same cores."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from importlib.metadata import version

from benchmarks.common.protocol import EngineSetup, PeerEngine, Requests, Run, serve
from benchmarks.common.serving import serving
from benchmarks.common.streaming import run_users
from flashserve_client import AsyncClient


async def stream_tokens(client: AsyncClient, prompt: list[int], max_tokens: int) -> AsyncIterator[float]:
    """How many tokens each response brings."""
    async for delta in client.stream(prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True):
        yield delta.completion_tokens


class Served(PeerEngine):
    def load(self, setup: EngineSetup) -> None:
        self.settings = setup.flashserve_settings()
        self.versions = {name: version(name) for name in ("tritonclient", "nvidia-pytriton")}
        self.server = contextlib.ExitStack()
        self.urls = self.server.enter_context(serving({"m": {"model": setup.model, **self.settings}}))

    def run(self, requests: Requests, batch: int, mode: str) -> Run:
        """At most ``batch`` requests at once; the others wait in the client, as long as they must."""
        return asyncio.run(self._run(requests, batch))

    async def _run(self, requests: Requests, users: int) -> Run:
        async with AsyncClient(self.urls.grpc, model="m") as client:
            await client.models()  # connects
            return await run_users(users, requests, partial(stream_tokens, client))

    def close(self) -> None:
        self.server.close()


if __name__ == "__main__":
    serve(Served())
