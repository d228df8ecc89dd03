"""What a prompt must be and where its answer stops, wherever it comes from: the request parser and the offline API
share it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from flashserve.errors import InvalidArgument
from flashserve.protocol import EngineLimits, SamplingParams
from flashserve.text.tokenizer import Tokenizer


def check_prompt(
    name: str, token_ids: list[int], params: SamplingParams, limits: EngineLimits, room: int = 1
) -> list[int]:
    """The prompt, cut as asked. Raises InvalidArgument for what does not fit vocabulary or context.

    ``name``: what the caller calls it. ``room``: the tokens that are to follow at least; 0 for an embedding.
    """
    most = limits.max_model_len - room
    if params.truncate_prompt_tokens is not None:
        token_ids = token_ids[-(most if params.truncate_prompt_tokens == -1 else params.truncate_prompt_tokens) :]
    if not token_ids:
        raise InvalidArgument(f"{name} is empty: a prompt needs at least one token")
    check_vocabulary(name, token_ids, limits)
    check_vocabulary("stop_token_ids", params.stop_token_ids, limits)
    check_vocabulary("logit_bias", [*params.logit_bias], limits)
    check_vocabulary("allowed_token_ids", params.allowed_token_ids, limits)
    if len(token_ids) > most:
        and_output = " (prompt + at least one output token)" if room else ""
        raise InvalidArgument(
            f"prompt has {len(token_ids)} tokens, the model's context takes at most {limits.max_model_len}{and_output}"
        )
    return token_ids


def check_vocabulary(name: str, token_ids: Sequence[int], limits: EngineLimits) -> None:
    """Raises InvalidArgument, naming the first of the ids that the model does not know."""
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < limits.vocab_size:
        unknown = next(token_id for token_id in token_ids if not 0 <= token_id < limits.vocab_size)
        raise InvalidArgument(f"{name}: token id {unknown} is not in the model's range [0, {limits.vocab_size - 1}]")


def stop_at_special_tokens(params: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
    """A stop string that is a special token stops at its id: it never becomes text while those are skipped."""
    if not params.stop or not params.skip_special_tokens:
        return params
    known = tokenizer.special_token_ids
    ids = tuple(known[stop] for stop in params.stop if stop in known and known[stop] not in params.stop_token_ids)
    return msgspec.structs.replace(params, stop_token_ids=params.stop_token_ids + ids) if ids else params
