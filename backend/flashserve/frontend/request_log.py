"""A line of log for each request that ends, where model.json says ``enable_log_requests``."""

from __future__ import annotations

import logging

from flashserve.errors import Cancelled, FlashserveError
from flashserve.frontend.generation import Generation
from flashserve.frontend.responses import request_metrics

log = logging.getLogger(__name__)


def log_end(generation: Generation, reason: str, error: FlashserveError | None) -> None:
    """``request id=… reason=… prompt_tokens=… …``: no text of a user's, and one word per field."""
    timings = request_metrics(generation) if generation.timings is not None else {}
    if isinstance(error, Cancelled):
        reason = str(error.reason)
    fields = {
        "id": _word(generation.name),
        "reason": reason,
        "prompt_tokens": len(generation.message.prompt_token_ids),
        "generated_tokens": generation.num_tokens,
        **{name: value for name, value in timings.items() if value is not None},
    }
    log.info("request %s", " ".join(f"{name}={value}" for name, value in fields.items()))


def _word(text: str) -> str:
    """A client's id without blanks; it is printable already."""
    return text.replace(" ", "_")
