"""``model.json`` as it is written: vLLM's engine arguments in the spellings that are in use, made into settings.

What asks for nothing that flashserve lacks is accepted; what asks for more is refused by name. A key that is null is a
key that is not there.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args

from flashserve.coercion import bool_of, integer_of, number_of, plain, same, shorten
from flashserve.errors import ConfigError

# Keys of vLLM whose other values need features that flashserve does not have; the listed values are what it does.
ONLY_VALUE: dict[str, tuple[Any, ...]] = {
    "tensor_parallel_size": (1,),
    "pipeline_parallel_size": (1,),
    "data_parallel_size": (1,),
    "data_parallel_hybrid_lb": (False,),
    "decode_context_parallel_size": (1,),
    "prefill_context_parallel_size": (1,),
    "enable_expert_parallel": (False,),
    "enable_eplb": (False,),
    "enable_dbo": (False,),
    "trust_remote_code": (False,),
    "enable_lora": (False,),
    "enable_prompt_adapter": (False,),
    "enable_prompt_embeds": (False,),
    "enable_mm_embeds": (False,),
    "enable_sleep_mode": (False,),
    "enable_chunked_prefill": (True,),
    "disable_sliding_window": (False,),
    "skip_tokenizer_init": (False,),
    "tokenizer_mode": ("auto",),
    "load_format": ("auto", "safetensors", "gguf"),
    "model_loader_extra_config": ({},),
    "model_impl": ("auto", "vllm"),
    "config_format": ("auto", "hf"),
    "worker_cls": ("auto",),
    "worker_extension_cls": ("",),
    "scheduler_cls": ("vllm.v1.core.sched.scheduler.Scheduler", "vllm.core.scheduler.Scheduler"),
    "task": ("auto", "generate"),
    "runner": ("auto", "generate"),
    "convert": ("auto", "none"),
    "logits_processors": ([],),
    "logits_processor_pattern": (),
    "io_processor_plugin": (),
    "hf_overrides": ({},),
    "hf_config_path": (),
    "rope_scaling": ({},),
    "rope_theta": (),
    "speculative_config": ({},),
    "speculative_model": (),
    "num_speculative_tokens": (0,),
    "kv_transfer_config": ({},),
    "kv_events_config": ({},),
    "pooler_config": ({},),
    "override_pooler_config": ({},),
    "override_neuron_config": ({},),
    "additional_config": ({},),
    "override_attention_dtype": (),
    "quantization_param_path": (),
    "cpu_offload_gb": (0,),
    "num_scheduler_steps": (1,),
    "num_lookahead_slots": (0,),
    "otlp_traces_endpoint": (),
    # A request's priority always counts here; vLLM's "fcfs" is for requests that have none.
    "scheduling_policy": ("fcfs", "priority"),
    # A download leaves out the second copies that vLLM's default names, and nothing else.
    "ignore_patterns": ([], ["original/**/*"], "original/**/*"),
    "reasoning_parser": ("",),
}

# Keys of vLLM whose values change nothing here: how vLLM logs, where it swaps, how it captures, names that are
# Triton's. They are named in the engine's start line.
NO_EFFECT = frozenset(
    (
        *("disable_log_requests", "max_log_len", "served_model_name"),
        *("swap_space", "max_logprobs", "distributed_executor_backend", "worker_use_ray", "engine_use_ray"),
        *("max_seq_len_to_capture", "max_context_len_to_capture", "compilation_config", "cuda_graph_sizes"),
        *("disable_custom_all_reduce", "max_parallel_loading_workers", "ray_workers_use_nsight", "async_scheduling"),
        *("use_v2_block_manager", "disable_async_output_proc", "multi_step_stream_outputs", "preemption_mode"),
        *("max_num_partial_prefills", "max_long_partial_prefills", "long_prefill_token_threshold"),
        *("scheduler_delay_factor", "prefix_caching_hash_algo", "use_tqdm_on_load"),
        *("guided_decoding_backend", "structured_outputs_config", "tokenizer_revision", "code_revision"),
        *("tokenizer_pool_size", "tokenizer_pool_type", "limit_mm_per_prompt", "mm_processor_kwargs"),
        *("disable_mm_preprocessor_cache", "max_loras", "max_lora_rank", "max_cpu_loras", "lora_dtype"),
        *("lora_extra_vocab_size", "fully_sharded_loras", "long_lora_scaling_factors", "collect_detailed_traces"),
        *("enable_lora_bias", "max_prompt_adapters", "max_prompt_adapter_token", "tokenizer_pool_extra_config"),
        *("cudagraph_capture_sizes", "max_cudagraph_capture_size", "disable_cascade_attn", "logprobs_mode"),
        *("disable_hybrid_kv_cache_manager", "kv_sharing_fast_prefill", "mamba_cache_dtype", "mamba_ssm_cache_dtype"),
        *("disable_chunked_mm_input", "mm_processor_cache_gb", "mm_processor_cache_type", "mm_encoder_tp_mode"),
        *("interleave_mm_strings", "media_io_kwargs", "skip_mm_profiling", "video_pruning_rate"),
        *("allowed_local_media_path", "allowed_media_domains", "safetensors_load_strategy"),
        *("pt_load_map_location", "data_parallel_backend", "aggregate_engine_logging"),
        *("guided_decoding_disable_fallback", "guided_decoding_disable_any_whitespace"),
        *("guided_decoding_disable_additional_properties", "show_hidden_metrics_for_version"),
    )
)

SPELLINGS: dict[str, dict[Any, Any]] = {
    "dtype": {"half": "float16", "float": "float32"},
    "kv_cache_dtype": {"fp8_e4m3": "fp8"},
    "quantization": {"gguf": None},  # as it is stored
    "max_model_len": {-1: None},
}
WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string", dict: "an object"}


def read(path: Path) -> dict[str, Any]:
    """The file's JSON object. Raises ConfigError that names the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors write a byte order mark
    except OSError as error:
        raise ConfigError(f"cannot read {path.name}: {error.strerror}; a model folder needs 1/model.json") from error
    except ValueError as error:
        raise ConfigError(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path.name} must hold a JSON object, not {type(values).__name__}")
    return values


def settings(values: Mapping[str, Any], types: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The values of known settings, and the names of keys that change nothing. Raises ConfigError, naming the key.

    types: of each setting its annotation, such as ``int | None``.
    """
    accepted: dict[str, Any] = {}
    no_effect = []
    for key, value in values.items():
        if value is None:
            continue
        if key in types:
            accepted[key] = _coerced(key, value, types[key])
        elif key in ONLY_VALUE:
            _check_only(key, value, ONLY_VALUE[key])
        elif key in NO_EFFECT:
            no_effect.append(key)
        else:
            raise _unknown(key, (*types, *ONLY_VALUE, *NO_EFFECT))
    if "tokenizer_revision" in no_effect:  # the tokenizer comes with the model, or is another's newest
        used = "main" if "tokenizer" in accepted else accepted.get("revision", "main")
        _check_only("tokenizer_revision", values["tokenizer_revision"], (used,))
    return accepted, tuple(no_effect)


def _coerced(key: str, value: Any, annotation: Any) -> Any:
    (kind,) = (each for each in _members(annotation) if each is not type(None))
    found = {bool: bool_of, int: integer_of, float: number_of}.get(kind, lambda given: given)(value)
    if not isinstance(found, (int, float) if kind is float else kind):
        raise ConfigError(f"{key} must be {WORDS[kind]}, not {shorten(value)}")
    return SPELLINGS[key].get(found, found) if key in SPELLINGS else found


def _members(annotation: Any) -> Iterable[type]:
    """The types of a union, without their parameters."""
    members = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return [getattr(member, "__origin__", member) for member in members]


def _check_only(key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if any(same(plain(value), item) or same(value, item) for item in allowed):
        return
    only = f"; only {' or '.join(map(repr, allowed))} is" if allowed else ""
    raise ConfigError(f"{key}={shorten(value)} is not supported{only}")


def _unknown(key: str, known: Iterable[str]) -> ConfigError:
    close = difflib.get_close_matches(key, list(known), n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return ConfigError(f"unknown key {shorten(key)} in model.json{hint}")
