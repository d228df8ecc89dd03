"""What a person at a terminal reads: answers as they come, errors that say what to do."""

from __future__ import annotations

import sys

from .errors import ConnectionFailed, FlashserveError, NotFound, Unavailable
from .results import GenerateResult
from .sync_client import Stream


def show(stream: Stream) -> None:
    """Writes the pieces as they come, and ends the line, also after an error."""
    shown = False
    try:
        for delta in stream:
            write(delta.text)
            shown = True
    finally:
        write("\n" if shown else "")


def write(text: str) -> None:
    """Writes to standard output at once; pipes and files would else wait for 8 KiB."""
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def answers(result: GenerateResult) -> str:
    """A whole answer; several under a line each that counts them."""
    samples = result.completions
    if len(samples) == 1:
        return result.text
    return "\n".join(f"--- {sample.index + 1} of {len(samples)}\n{sample.text}" for sample in samples)


def describe(result: GenerateResult, streamed: bool) -> str:
    """A line about an answer's size and speed."""
    cached = f" ({result.timings.cached_tokens} cached)" if result.timings.cached_tokens else ""
    parts = [
        f"{result.prompt_tokens} prompt tokens{cached}",
        f"{result.completion_tokens} generated",
        f"finish reason {result.finish_reason}",
    ]
    if streamed and result.ttft_s is not None:
        parts.append(f"first token after {result.ttft_s * 1000:.0f} ms")
    if streamed and result.tokens_per_s is not None:
        parts.append(f"{result.tokens_per_s:.1f} tokens/s")
    if not streamed:
        parts.append(f"{result.latency_s * 1000:.0f} ms in all")
    if result.timings.queue_ms is not None:
        parts.append(f"queued {result.timings.queue_ms:.0f} ms")
    return "[" + ", ".join(parts) + "]"


def explain(error: FlashserveError, url: str) -> str:
    """The error in words that say what to do."""
    if isinstance(error, ConnectionFailed) and error.reason == "unreachable":
        return f"no server at {url}: start one with `flashserve serve`, or give another --url"
    if isinstance(error, NotFound):
        return f"{error.message} (`flashserve models` lists what the server has)"
    if isinstance(error, Unavailable):
        wait = f" in {error.retry_after_ms / 1000:.1f} s" if error.retry_after_ms is not None else ""
        return f"{error.message}: try again{wait}, or let --retries do it"
    return error.message


def fail(message: str, code: int) -> int:
    """Prints an error and returns the exit code."""
    print(f"flashserve: {message}", file=sys.stderr)
    return code
