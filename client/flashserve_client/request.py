"""Builds requests: the one place that knows the names of the server's inputs."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, TypeAlias

from .errors import InvalidRequest

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or chat messages ({"role": ..., "content": ...})."""

DEFAULT_MODEL = "smollm2"
"""What `flashserve serve` serves where nobody says."""
DEFAULT_MAX_TOKENS = 256
"""Of a request that names none. The server's own default is 16 for a text, as in vLLM; a chat may fill the context."""

# Keyword arguments that belong to the chat template and not to sampling.
_CHAT_FIELDS = ("tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
_ASK_FOR = (
    "exclude_input_in_output",
    "return_finish_reason",
    "return_num_input_tokens",
    "return_num_output_tokens",
    "return_request_metrics",
)

_ASK_FOR_LOGPROBS = ("return_logprobs", "return_cumulative_logprob")


@dataclass(frozen=True)
class InferRequest:
    """One request, ready for either protocol.

    Attributes:
        model: the model's name.
        request_id: sent as Triton's request id.
        strings: STRING inputs of shape [1] by name.
        flags: BOOL inputs of shape [1] that are true.
        sampling: what `strings["sampling_parameters"]` holds.
        stream: many responses instead of one.
        samples: how many texts a response holds.
    """

    model: str
    request_id: str
    strings: Mapping[str, str]
    flags: tuple[str, ...] = ()
    sampling: Mapping[str, Any] | None = None
    stream: bool = False
    samples: int = 1

    def with_timeout(self, timeout_s: float) -> InferRequest:
        """The same request with `timeout_s` seconds left until its deadline (for sending it again)."""
        sampling = {**(self.sampling or {}), "timeout_ms": _timeout_ms(timeout_s)}
        strings = {**self.strings, "sampling_parameters": _sampling_json(sampling)}
        return replace(self, sampling=sampling, strings=strings)


def generate_request(
    prompt: Prompt,
    *,
    model: str,
    stream: bool,
    timeout_s: float | None,
    priority: int | None,
    request_id: str | None,
    params: Mapping[str, Any],
) -> InferRequest:
    """The request for `generate` and `stream`. Raises InvalidRequest for what cannot be sent."""
    params = {name: value for name, value in params.items() if value is not None}
    chat = {name: params.pop(name) for name in _CHAT_FIELDS if name in params}
    params.setdefault("max_tokens", DEFAULT_MAX_TOKENS)
    samples = params.get("n", 1)
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise InvalidRequest(f"n: a positive number of samples is needed, got {samples!r:.80}")
    progress = params.pop("return_progress", False)
    if progress and not stream:
        raise InvalidRequest("return_progress: only a stream tells how far its prompt is")
    if timeout_s is not None:
        params["timeout_ms"] = _timeout_ms(timeout_s)
    if priority is not None:
        params["priority"] = priority
    strings: dict[str, str] = {}
    if isinstance(prompt, str):
        strings["text_input"] = _valid_text("prompt", prompt)
    elif (messages := _messages(prompt)) is not None:
        body = {"messages": messages, **chat}
        strings["chat_request"] = _valid_text("messages", _to_json("messages", body))
    else:
        params["prompt_token_ids"] = _token_ids(prompt)
    if chat and "chat_request" not in strings:
        raise InvalidRequest(f"{next(iter(chat))}: belongs to a prompt that is a list of messages")
    strings["sampling_parameters"] = _sampling_json(params)
    flags = (*_ASK_FOR, *(["stream"] if stream else []), *(["return_progress"] if progress else []))
    if params.get("logprobs") is not None:
        flags += _ASK_FOR_LOGPROBS
    return InferRequest(_model(model), request_id or new_request_id(), strings, flags, params, stream, samples)


def embed_request(
    prompt: str | Sequence[int],
    *,
    model: str,
    pooling_params: Mapping[str, Any],
    timeout_s: float | None,
    priority: int | None,
    request_id: str | None,
    params: Mapping[str, Any],
) -> InferRequest:
    """The request for `embed`. Raises InvalidRequest for what cannot be sent."""
    params = {name: value for name, value in params.items() if value is not None}
    if timeout_s is not None:
        params["timeout_ms"] = _timeout_ms(timeout_s)
    if priority is not None:
        params["priority"] = priority
    body = {
        "input": prompt if isinstance(prompt, str) else _token_ids(prompt),
        "pooling_params": {name: value for name, value in pooling_params.items() if value is not None},
    }
    strings = {
        "embedding_request": _valid_text("prompt", _to_json("prompt", body)),
        "sampling_parameters": _sampling_json(params),
    }
    return InferRequest(_model(model), request_id or new_request_id(), strings, _ASK_FOR, params)


def tokenize_request(body: Mapping[str, Any], *, model: str) -> InferRequest:
    """The request behind `tokenize` and `detokenize`: `body` holds text, messages or token_ids."""
    text = _valid_text("tokenize", _to_json("tokenize", dict(body)))
    return InferRequest(_model(model), new_request_id(), {"tokenize_request": text})


def tokenize_body(prompt: str | Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The body that asks for the token ids of a text or of rendered chat messages."""
    return {"text": prompt} if isinstance(prompt, str) else {"messages": _messages(prompt)}


def detokenize_body(token_ids: Sequence[int]) -> dict[str, Any]:
    """The body that asks for the text of token ids."""
    return {"token_ids": _token_ids(token_ids, allow_empty=True)}


def new_request_id() -> str:
    """A fresh id of 16 hexadecimal digits, so that a request can be found in the server's log."""
    return secrets.token_hex(8)


def _model(model: str) -> str:
    if not model or not isinstance(model, str):
        raise InvalidRequest(f"model: a name is needed, got {model!r}")
    return _valid_text("model", model)


def _timeout_ms(timeout_s: float) -> int:
    if not isinstance(timeout_s, (int, float)) or not math.isfinite(timeout_s) or timeout_s <= 0:
        raise InvalidRequest(f"timeout_s: a positive number of seconds is needed, got {timeout_s!r}")
    return max(1, math.ceil(timeout_s * 1000))


def _messages(prompt: Any) -> list[dict[str, Any]] | None:
    """A prompt's chat messages; None if it holds token ids."""
    prompt = _as_list(prompt)
    if isinstance(prompt, (str, bytes, Mapping)) or not isinstance(prompt, Sequence) or len(prompt) == 0:
        raise InvalidRequest(
            "prompt: a string, a non-empty list of token ids or a non-empty list of messages is needed, "
            f"got {type(prompt).__name__}"
        )
    if not isinstance(prompt[0], Mapping):
        return None
    for index, message in enumerate(prompt):
        if not isinstance(message, Mapping):
            raise InvalidRequest(f"messages: item {index} is {message!r:.80}, not a mapping with role and content")
    return [dict(message) for message in prompt]


def _token_ids(ids: Any, allow_empty: bool = False) -> list[int]:
    ids = _as_list(ids)
    if not isinstance(ids, Sequence) or isinstance(ids, (str, bytes)) or not (ids or allow_empty):
        raise InvalidRequest(f"token ids: a list of ints is needed, got {type(ids).__name__}")
    for index, value in enumerate(ids):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise InvalidRequest(f"token ids: item {index} is {value!r:.80}, not an int")
    return [int(value) for value in ids]


def _as_list(value: Any) -> Any:
    """A numpy or torch array as a list; told by its method, for numpy takes 100 ms to import."""
    return value.tolist() if hasattr(value, "tolist") else value


def _sampling_json(params: Mapping[str, Any]) -> str:
    try:
        return _valid_text(
            "sampling parameters", json.dumps(params, allow_nan=False, ensure_ascii=False, default=_plain)
        )
    except InvalidRequest:
        raise
    except (TypeError, ValueError, RecursionError):
        for name, value in params.items():  # say which one it was
            _to_json(f"sampling parameter {name!r}", value)
        raise


def _to_json(what: str, value: Any) -> str:
    try:
        # Not ASCII only: a lone surrogate must be found here, and Chinese text must not triple in size.
        return json.dumps(value, allow_nan=False, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{what}: cannot be sent as JSON ({error})") from None


def _plain(value: Any) -> Any:
    """numpy numbers and arrays, which come out of data sets, as plain Python values."""
    plain = _as_list(value)
    if plain is value:
        raise TypeError(f"{type(value).__name__} is not a JSON value")
    return plain


def _valid_text(what: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{what}: not valid Unicode: lone surrogate at position {error.start}") from None
    return text
