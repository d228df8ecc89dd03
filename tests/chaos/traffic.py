"""What chaos sends: good requests whose answers are known, and hostile ones."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
from through_gateway import GatewayClient

from flashserve_client import AsyncClient, FlashserveError

Client = AsyncClient | GatewayClient

PIECES = ("def ", "import os\n", "class Node:\n    ", "for x in range(", "return ", "# Sort the list\n", "try:\n    ",
          "with open(", "self.", "raise ValueError(", "print(", "if __name__", "lambda x: ", "assert ")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Good:
    """A request with one right answer."""

    prompt: str
    params: dict[str, Any]

    async def send(self, client: Client, stream: bool, pieces: list[str] | None = None) -> tuple[str, str]:
        """Text and finish reason; ``pieces`` of a stream are there also if it fails."""
        pieces = [] if pieces is None else pieces
        if not stream:
            result = await client.generate(self.prompt, **self.params)
            return result.text, str(result.finish_reason)
        async with client.stream(self.prompt, **self.params) as answer:
            async for delta in answer:
                pieces.append(delta.text)
            return "".join(pieces), str(answer.result.finish_reason)


def good_requests(rng: random.Random, count: int) -> list[Good]:
    """Greedy and sampled, short and long, some with a beginning in common."""
    shared = "".join(rng.choices(PIECES, k=40))
    found = []
    for index in range(count):
        prompt = (
            (shared if rng.random() < 0.5 else "") + "".join(rng.choices(PIECES, k=rng.randint(1, 30))) + str(index)
        )
        params: dict[str, Any] = {"max_tokens": rng.choice((1, 5, 20, 60, 120))}
        if rng.random() < 0.5:
            params["temperature"] = 0
        else:
            params |= {"temperature": 0.8, "top_p": 0.95, "seed": rng.randrange(1 << 40)}
        if rng.random() < 0.2:
            params["stop"] = [rng.choice(("\n\n", "self", "return"))]
        found.append(Good(prompt, params))
    return found


@dataclass
class Tally:
    """What became of all requests."""

    bound_s: float
    """For any request to have its end. Triton gives none to those of a killed stub: their clients do, by it."""
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """Answers that differ, come without their end, or errors that nothing explains."""
    faults: list[float] = field(default_factory=list)
    """When something was broken on purpose, in monotonic seconds."""

    def excuses(self, started: float, grace_s: float) -> bool:
        """Whether a fault lies within a request's life, or so shortly before that its effects do."""
        return any(started - grace_s <= fault <= time.monotonic() for fault in self.faults)


async def ask(good: Good, expected: tuple[str, str], client: Client, stream: bool, tally: Tally) -> bool:
    """Send it and judge what comes; whether there was an answer. An error is right only near a fault; a wrong or cut
    answer never is."""
    started = time.monotonic()
    pieces: list[str] = []
    try:
        answer = await asyncio.wait_for(good.send(client, stream, pieces), tally.bound_s + 5)
    except FlashserveError as error:
        kind = type(error).__name__
        tally.counts[f"answered {kind}"] += 1
        if not expected[0].startswith("".join(pieces)):
            tally.wrong.append(f"before {kind}: {good}\n    expected {expected[0]}\n    began    {''.join(pieces)}")
        if not tally.excuses(started, tally.bound_s):
            tally.wrong.append(f"{kind} without a fault: {error}")
        return False
    except asyncio.TimeoutError:
        tally.counts["no end"] += 1
        tally.wrong.append(f"no end within {tally.bound_s + 5:.0f} s: {good}")
        return False
    tally.counts["right" if answer == expected else "wrong"] += 1
    if answer != expected:
        tally.wrong.append(f"{good}\n    expected {expected}\n    got      {answer}")
    return True


async def leave(good: Good, client: Client, rng: random.Random, tally: Tally) -> None:
    """Go away in the middle."""
    task = asyncio.create_task(good.send(client, stream=True))
    await asyncio.sleep(rng.random() * 0.5)
    task.cancel()
    await asyncio.wait([task], timeout=tally.bound_s)
    tally.counts["left"] += 1
    if not task.done():
        tally.wrong.append("a cancelled request did not end")


HOSTILE: tuple[dict[str, Any], ...] = (
    {"text_input": "x", "temperature": -1},
    {"text_input": "x", "sampling_parameters": "{"},
    {"text_input": "x", "sampling_parameters": '{"stop": [""]}'},
    {"text_input": "x", "nonsense": 1},
    {"text_input": "word " * 200_000},
    {"text_input": "\ud800"},
    {"chat_request": '{"messages": []}'},
    {"prompt_token_ids": "[1, 999999999]"},
    {"text_input": "x", "embedding_request": "{}"},
    {"text_input": ["a", "b"]},
    {},
)


async def offend(url: str, rng: random.Random, tally: Tally) -> None:
    """A hostile request over HTTP: refused with a status and without a traceback."""
    body = rng.choice(HOSTILE)
    verb = rng.choice(("generate", "generate_stream"))
    started = time.monotonic()
    try:
        async with httpx.AsyncClient(trust_env=False, timeout=tally.bound_s) as http:
            response = await http.post(f"{url}/{verb}", content=json.dumps(body).encode())
    except httpx.HTTPError as error:
        tally.counts["hostile: no answer"] += 1
        if not tally.excuses(started, tally.bound_s):
            tally.wrong.append(f"hostile {str(body)[:80]}: {error!r} without a fault")
        return
    tally.counts["hostile: refused"] += 1
    if response.status_code < 400 or "Traceback" in response.text:
        tally.wrong.append(f"hostile {str(body)[:80]}: {response.status_code} {response.text[:200]}")
