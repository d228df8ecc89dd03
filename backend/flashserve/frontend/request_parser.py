"""Triton requests to checked, frozen values. Everything a client can get wrong is an InvalidArgument from here.

Knows Triton's request objects only by the few methods that :func:`read_raw` calls.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from flashserve.coercion import bool_of, shorten
from flashserve.config import EngineConfig
from flashserve.errors import ConfigError, InvalidArgument
from flashserve.frontend.embedding_request import check_embedding_options, read_embedding_request
from flashserve.frontend.tensor_spec import INPUT_BY_NAME, INPUTS
from flashserve.pooling_params import EMBEDDING_PARAMS
from flashserve.protocol import EngineLimits, EngineReady, GenerateRequest, PoolingParams, SamplingParams
from flashserve.sampling_params import (
    PARAMETERS,
    Parameters,
    RequestOptions,
    coerce_all,
    parse_parameters,
    parse_sampling_params,
)
from flashserve.text.chat_template import ChatRequest, ChatTemplate
from flashserve.text.generation_defaults import GenerationDefaults, read_generation_defaults
from flashserve.text.prompt import check_prompt, check_vocabulary, stop_at_special_tokens
from flashserve.text.strict_json import parse_object
from flashserve.text.tokenizer import Tokenizer
from flashserve.text.words import with_word_ids

FLAGS = tuple(spec.name for spec in INPUTS if spec.dtype == "BOOL")
PROMPTS = ("text_input", "chat_request", "tokenize_request", "embedding_request")
TRITONS_OWN = "triton_enable_empty_final_response"  # the one such key that Triton takes from clients
DEFAULT_MAX_TOKENS = 16  # of a text, as in vLLM: clients of its Triton backend send none and expect it


# --- what goes in --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RawRequest:
    """A Triton request without Triton."""

    inputs: Mapping[str, Any] = field(default_factory=dict)
    """numpy arrays by input name."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    request_id: str = ""
    timeout_us: int = 0
    """0: none."""


def read_raw(request: Any) -> RawRequest:
    """Take what matters from a Triton request. Raises InvalidArgument for tensors that cannot be read."""
    inputs: dict[str, Any] = {}
    for tensor in request.inputs():
        name = tensor.name()
        try:
            inputs[name] = tensor.as_numpy()
        except Exception as error:  # a string tensor whose lengths do not add up
            raise InvalidArgument(f"{name} cannot be read: {type(error).__name__}") from error
    parameters = request.parameters()  # JSON in a string
    if isinstance(parameters, str):
        parameters = parse_object(parameters, "the request's parameters") if parameters else {}
    return RawRequest(inputs, parameters, request.request_id(), request.timeout())


@dataclass(frozen=True)
class ParserContext:
    """What a model's requests are checked against."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate
    limits: EngineLimits
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    """The model's own."""
    now: Callable[[], float] = time.monotonic

    @classmethod
    def of_engine(cls, config: EngineConfig, engine: EngineReady) -> ParserContext:
        """The model's tokenizer, chat template and sampling defaults. Raises ConfigError."""
        tokenizer = Tokenizer.from_card(engine.card)
        own = engine.card.generation_config if config.generation_config == "auto" else {}
        defaults = read_generation_defaults(own, config.override_generation_config)
        try:
            parse_sampling_params({}, defaults.parameters)
        except InvalidArgument as error:
            raise ConfigError(
                f"the model's generation_config.json, or override_generation_config in model.json: {error.message} "
                '("generation_config": "vllm" ignores the file)'
            ) from error
        assert tokenizer.longest_token  # computed now (30 ms for 150k tokens), not for the first request
        chat_template = ChatTemplate(tokenizer.config.get("chat_template"), tokenizer.special_tokens)
        return cls(tokenizer, chat_template, engine.limits, defaults)

    @property
    def max_prompt_tokens(self) -> int:
        return self.limits.max_model_len - 1


# --- what comes out ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OutputFlags:
    """The outputs that were asked for beside text_output."""

    finish_reason: bool = False
    num_input_tokens: bool = False
    num_output_tokens: bool = False
    request_metrics: bool = False
    progress: bool = False
    logprobs: bool = False
    cumulative_logprob: bool = False


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A request to generate, checked against everything that the stub knows."""

    message: GenerateRequest
    """What the engine gets. Its max_tokens is never None here."""
    prompt_text: str
    """The input as text where the output is to repeat it, else empty."""
    stream: bool
    outputs: OutputFlags
    request_id: str
    """The client's own; may be empty."""
    traceparent: str = ""
    """The client's trace, as W3C writes it."""
    shows_logprobs: bool = False
    """Whether ``logprobs`` is set; else the output of that name is null where it is asked for, as by vLLM."""

    @property
    def needs_every_token(self) -> bool:
        """Tokens must be looked at as they come: they are streamed, or a stop string may end the request."""
        return self.stream or bool(self.message.params.stop)


@dataclass(frozen=True, slots=True)
class ParsedTokenize:
    """A request that was answered by the parser."""

    answer: str
    """JSON for text_output."""
    request_id: str


# --- parsing -------------------------------------------------------------------------------------------------


def parse(request: RawRequest, context: ParserContext, internal_id: int) -> ParsedRequest | ParsedTokenize:
    """Check and resolve a request. Raises InvalidArgument, naming the field and what it takes.

    ``internal_id``: by which the engine knows it.
    """
    arrival = context.now()
    texts, flags, values = _read_inputs(request)
    parameters = parse_parameters(values, context.defaults.parameters)
    options = parameters.options
    source = _prompt_source(texts, options)
    if source == "tokenize_request":
        if unused := [name for name in values if not PARAMETERS[name].of_request]:
            raise InvalidArgument(f"tokenize_request takes no sampling parameters, but {unused[0]} is given")
        return ParsedTokenize(_tokenize(texts[source], context), options.request_id)

    stream = flags.get("stream", False)
    if flags.get("return_progress") and not stream:
        raise InvalidArgument("return_progress=true: only a stream tells how far its prompt is")
    pooling: PoolingParams | None = None
    if source == "embedding_request":
        check_embedding_options(values, flags)
        token_ids, pooling = read_embedding_request(
            texts[source], parameters.sampling, context.tokenizer, context.limits
        )
        text, params = "", EMBEDDING_PARAMS
    else:
        token_ids, text, params = _to_generate(source, texts, flags, parameters, context)
    outputs = OutputFlags(**{name: flags.get(f"return_{name}", False) for name in OutputFlags.__slots__})
    message = GenerateRequest(
        request_id=internal_id,
        prompt_token_ids=token_ids,
        params=_with_shown_logprobs(params, outputs),
        arrival=arrival,
        priority=options.priority,
        deadline=None if options.timeout_s is None else arrival + options.timeout_s,
        cache_salt=options.cache_salt,
        pooling=pooling,
        return_progress=flags.get("return_progress", False),
    )
    shows_logprobs = parameters.sampling.logprobs is not None
    return ParsedRequest(message, text, stream, outputs, options.request_id, options.traceparent, shows_logprobs)


def _to_generate(
    source: str, texts: Mapping[str, str], flags: Mapping[str, bool], parameters: Parameters, context: ParserContext
) -> tuple[list[int], str, SamplingParams]:
    """Of a request for tokens: its prompt, the text that the output is to repeat, and its parameters."""
    stream = flags.get("stream", False)
    exclude_input = flags.get("exclude_input_in_output", stream)
    if stream and not exclude_input:
        raise InvalidArgument("When streaming, `exclude_input_in_output` = False is not allowed.")  # vLLM's words
    token_ids, text = _prompt(source, texts, parameters, context)
    if exclude_input:
        text = ""
    elif text is None:
        text = context.tokenizer.decode(token_ids, skip_special_tokens=parameters.sampling.skip_special_tokens)
    token_ids = check_prompt(source, token_ids, parameters.sampling, context.limits)
    params = _with_max_tokens(parameters.sampling, source, len(token_ids), context)
    params = stop_at_special_tokens(params, context.tokenizer)
    return token_ids, text, with_word_ids(params, context.tokenizer, context.limits)


def _prompt_source(texts: Mapping[str, str], options: RequestOptions) -> str:
    """The one input that says what to do."""
    given = [name for name in PROMPTS if name in texts]
    if options.prompt_token_ids is not None:
        given.append("prompt_token_ids")
    if len(given) != 1:
        found = f"{' and '.join(given)} are" if given else "none is"
        raise InvalidArgument(f"exactly one of {', '.join(PROMPTS)}, prompt_token_ids is needed; {found} given")
    return given[0]


def _prompt(
    source: str, texts: Mapping[str, str], parameters: Parameters, context: ParserContext
) -> tuple[list[int], str | None]:
    """The prompt's token ids, uncut, and its text if there is one."""
    if source == "prompt_token_ids":
        return parameters.options.prompt_token_ids or [], None
    text = texts[source]
    if source == "chat_request":
        text = context.chat_template.render(ChatRequest.from_mapping(parse_object(text, source)))
    token_ids = context.tokenizer.encode(
        text,
        add_special_tokens=source == "text_input",  # templates write them out
        max_tokens=context.max_prompt_tokens,
        overlong=parameters.sampling.truncate_prompt_tokens is not None,
        field=source,
    )
    return token_ids, text


def _with_shown_logprobs(params: SamplingParams, outputs: OutputFlags) -> SamplingParams:
    """With no more log-probabilities than the outputs show; their sum takes the chosen tokens'."""
    shown = params.logprobs if outputs.logprobs else None
    if shown is None and outputs.cumulative_logprob:
        shown = 0
    return params if shown == params.logprobs else msgspec.structs.replace(params, logprobs=shown)


def _with_max_tokens(params: SamplingParams, source: str, prompt_tokens: int, context: ParserContext) -> SamplingParams:
    """With a max_tokens that fits the context."""
    max_tokens = params.max_tokens or _default_max_tokens(params, source, prompt_tokens, context)
    max_tokens = min(max_tokens, context.limits.max_model_len - prompt_tokens)
    min_tokens = min(params.min_tokens, max_tokens)  # a context that is full ends the request anyway
    return msgspec.structs.replace(params, max_tokens=max_tokens, min_tokens=min_tokens)


def _default_max_tokens(params: SamplingParams, source: str, prompt_tokens: int, context: ParserContext) -> int:
    """Of a request that names none, by a model whose files name no ``max_new_tokens``: a chat ends by itself."""
    if source == "chat_request":
        return context.limits.max_model_len
    max_length = context.defaults.max_length
    if max_length is not None and max_length > prompt_tokens:
        return max(max_length - prompt_tokens, params.min_tokens)
    return max(DEFAULT_MAX_TOKENS, params.min_tokens)


def _tokenize(text: str, context: ParserContext) -> str:
    """Answer a tokenize_request."""
    name = "tokenize_request"
    request = parse_object(text, name)
    kinds = [key for key in ("text", "messages", "token_ids") if key in request]
    if len(kinds) != 1:
        raise InvalidArgument(f"{name} needs exactly one of text, messages, token_ids")
    if kinds != ["messages"] and len(request) > 1:
        extra = next(key for key in request if key not in kinds)
        raise InvalidArgument(f"unknown key {shorten(extra)} in {name} with {kinds[0]}")
    answer: dict[str, Any]
    if kinds == ["token_ids"]:
        ids = coerce_all({"prompt_token_ids": request["token_ids"]}).get("prompt_token_ids", [])
        check_vocabulary(f"{name}.token_ids", ids, context.limits)
        answer = {"text": context.tokenizer.decode(ids, skip_special_tokens=False)}
    else:
        if kinds == ["messages"]:
            prompt = context.chat_template.render(ChatRequest.from_mapping(request, name))
        else:
            prompt = request["text"]
            if not isinstance(prompt, str):
                raise InvalidArgument(f"{name}.text must be a string, not {shorten(prompt)}")
        ids = context.tokenizer.encode(
            prompt,
            add_special_tokens=kinds == ["text"],
            max_tokens=context.max_prompt_tokens,
            overlong=True,
            field=f"{name}.{kinds[0]}",
        )
        answer = {"token_ids": ids, "count": len(ids), "max_model_len": context.limits.max_model_len}
        if kinds == ["messages"]:
            answer["prompt"] = prompt
    return json.dumps(answer, ensure_ascii=False)


# --- tensors and parameters ----------------------------------------------------------------------------------


def _read_inputs(request: RawRequest) -> tuple[dict[str, str], dict[str, bool], dict[str, Any]]:
    """All inputs by kind: prompts, flags, and parameters merged from their three places."""
    elements = {name: _element(name, array) for name, array in request.inputs.items()}
    texts = {name: elements[name] for name in PROMPTS if name in elements}
    flags = {name: elements[name] for name in FLAGS if name in elements}
    in_json: dict[str, Any] = {}
    if "sampling_parameters" in elements:
        in_json = parse_object(elements["sampling_parameters"], "sampling_parameters")
        for name in in_json:
            if name in INPUT_BY_NAME and name not in PARAMETERS:
                raise InvalidArgument(f"{name} is an input of its own; it cannot be in sampling_parameters")

    own: dict[str, Any] = {}
    for name, value in request.parameters.items():
        if name in FLAGS:
            flags[name] = _merged(name, flags.get(name), _flag(name, value))
        elif name in INPUT_BY_NAME and name not in PARAMETERS:
            raise InvalidArgument(f"{name} must be an input tensor, not a request parameter")
        elif name != TRITONS_OWN:
            own[name] = value
    tritons = {"timeout": request.timeout_us or None, "id": request.request_id or None}

    values: dict[str, Any] = {}
    for source in (own, tritons, {"max_tokens": elements.get("max_tokens")}, in_json):
        for name, value in coerce_all(source).items():
            values[name] = _merged(name, values.get(name), value)
    return texts, flags, values


def _merged(name: str, one: Any, other: Any) -> Any:
    """A value that may be given in several places, but not with several meanings."""
    if one is not None and one != other:
        raise InvalidArgument(f"{name} is given twice, as {shorten(one)} and as {shorten(other)}")
    return other


def _flag(name: str, value: Any) -> bool:
    flag = bool_of(value)
    if flag is None:
        raise InvalidArgument(f"{name} must be true or false, not {shorten(value)}")
    return flag


def _element(name: str, array: Any) -> Any:
    """The single element of an input tensor as str, bool or int."""
    spec = INPUT_BY_NAME.get(name)
    if spec is None:
        raise InvalidArgument(f"unknown input {shorten(name)}")
    if name == "image":
        raise InvalidArgument("image is not supported: multimodal models cannot be served yet")
    if array.size != 1:
        raise InvalidArgument(f"{name} must have exactly one element, not {array.size}")
    value = array.reshape(-1)[0]
    if spec.dtype == "STRING" and isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise InvalidArgument(f"{name} is not valid UTF-8 at byte {error.start}") from None
    if spec.dtype == "STRING" and isinstance(value, str):
        return str(value)
    if spec.dtype == "BOOL" and array.dtype.kind == "b":
        return bool(value)
    if spec.dtype == "INT32" and array.dtype.kind in "iu":
        return int(value)
    raise InvalidArgument(f"{name} must be a tensor of type {spec.dtype}, not of numpy type {array.dtype}")
