"""flashserve through Triton: `flashserve serve`, and a client that streams over gRPC on the same cores."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from importlib.metadata import version

from benchmarks.common.protocol import PeerEngine, Run, Workload
from benchmarks.common.serving import serving
from benchmarks.common.streaming import run_users


class Served(PeerEngine):
    def load(self, work: Workload) -> None:
        self.work = work
        self.settings = work.flashserve_settings()
        self.versions = {name: version(name) for name in ("tritonclient", "nvidia-pytriton")}
        self.server = contextlib.ExitStack()
        self.urls = self.server.enter_context(serving({"m": {"model": work.model, **self.settings}}))

    def stream(
        self, users: int, prompts: list[list[int]], outputs: Sequence[int], arrivals: Sequence[float] = ()
    ) -> Run:
        return asyncio.run(self._stream(users, prompts, outputs, arrivals))

    async def _stream(
        self, users: int, prompts: list[list[int]], outputs: Sequence[int], arrivals: Sequence[float]
    ) -> Run:
        from flashserve_client import AsyncClient

        async with AsyncClient(self.urls.grpc, model="m") as client:
            await client.models()  # connects

            async def stream(prompt: list[int], max_tokens: int) -> AsyncIterator[float]:
                async for delta in client.stream(prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True):
                    yield delta.completion_tokens

            return await run_users(users, prompts, outputs, stream, arrivals)

    def close(self) -> None:
        self.server.close()
