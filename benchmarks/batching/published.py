"""Beside what others have published: TorchWeave's figures for TinyLlama-1.1B on a CPU, and Flash-Serve's claim.

Their machines and lengths are not known, so this is an orientation and no comparison.
"""

from __future__ import annotations

from typing import Any

from benchmarks.batching.analysis import latencies
from benchmarks.batching.systems import NAIVE, Processes
from benchmarks.batching.workload import equal_lengths

TORCHWEAVE = {"users": 4, "tokens_per_s": 3.52, "ttft_s": 0.86}
FLASH_SERVE = 2.0
"""Times Hugging Face's throughput, "at least"."""
PROMPT, OUTPUT, LOOPS = 64, 64, 2


def measure_published(processes: Processes, loops: int = LOOPS) -> dict[str, Any]:
    """TinyLlama's shape through Triton, four users that each send one request after the other; and transformers' one by
    one and in static batches of four beside it."""
    users = int(TORCHWEAVE["users"])
    work = equal_lengths(users * loops, PROMPT, OUTPUT, processes.vocab_size)
    for name, batch in (("served", users), ("static", users)):
        processes.run(name, batch, equal_lengths(users, PROMPT, 2, processes.vocab_size))
    served = processes.run("served", users, work)
    # A user's request is sent when its last one has ended: its time to the first token counts from there.
    sent = [first - start for first, start in zip(served.firsts, served.starts, strict=True)]
    static = processes.run("static", users, work.head(users))
    naive = processes.run(NAIVE, 1, work.head(1))
    return {
        "users": users,
        "prompt": PROMPT,
        "output": OUTPUT,
        "tokens_per_s": served.tokens_per_s,
        "ttft_s": sum(sent) / len(sent),
        "latency": latencies(work, served),
        "transformers_static_tokens_per_s": static.tokens_per_s,
        "transformers_one_by_one_tokens_per_s": naive.tokens_per_s,
        "torchweave": TORCHWEAVE,
    }
