"""Penalties, biases and bans through a real tritonserver, and that nobody else notices them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from flashserve_client import AsyncClient
from harness import Server
from requests_helper import generate, wait_idle

GREEDY = {"model": "llama", "text_input": "a b c", "temperature": 0, "max_tokens": 12, "exclude_input_in_output": True,
          "ignore_eos": True}  # fmt: skip
EVERYTHING = {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.3, "logit_bias": {"50": 3},
              "bad_words": ["a", "xyz"], "dry_multiplier": 1.0, "xtc_probability": 0.5}  # fmt: skip


def ask(server: Server, **sampling: Any) -> str:
    return generate(server, **GREEDY, sampling_parameters=json.dumps(sampling))["text_output"]


def test_what_each_of_them_does_to_a_text(server: Server) -> None:
    plain = ask(server)
    assert ask(server, logit_bias={"44": 100}) == "J" * 12
    assert ask(server, logit_bias={"44": 100, "45": 90}, frequency_penalty=2, presence_penalty=2).count("J") < 12
    assert ask(server, logit_bias={"44": 100}, bad_words=["JJJ"]).count("JJJ") == 0
    banned = next(letter for letter in plain if letter.isascii() and letter.isprintable() and letter != " ")
    assert banned not in ask(server, bad_words=[banned])
    assert ask(server, logit_bias={"44": 20}, dry_multiplier=50, dry_allowed_length=2).count("JJJJ") == 0
    assert ask(server) == plain
    wait_idle(server, "llama")


async def test_greedy_neighbours_say_what_they_say_alone(server: Server) -> None:
    """Between requests that want everything, half of which leave early."""
    async with AsyncClient(f"grpc://{server.grpc}", model="llama") as client:

        async def greedy(index: int) -> str:
            prompt = f"neighbour {index}"
            return (await client.generate(prompt, max_tokens=40, temperature=0, ignore_eos=True)).text

        async def demanding(index: int) -> None:
            stream = client.stream("b " * index, max_tokens=60, seed=index, ignore_eos=True, **EVERYTHING)
            async with stream:
                count = 0
                async for _ in stream:
                    count += 1
                    if index % 2 and count == 3 + index:
                        return

        alone = [await greedy(index) for index in range(6)]
        together = await asyncio.gather(
            *(greedy(index) for index in range(6)), *(demanding(index) for index in range(1, 13))
        )
    assert together[:6] == alone
    wait_idle(server, "llama")
