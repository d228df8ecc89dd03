"""model.json as it is written for Triton's vLLM backend: what asks for nothing that is missing loads."""

import json
from dataclasses import fields, replace

import pytest

from flashserve.config import DeviceFacts, EngineConfig, ModelFacts, resolve
from flashserve.errors import ConfigError
from flashserve.model_json import NO_EFFECT, ONLY_VALUE
from flashserve.protocol import ModelCard

MODEL = ModelFacts(
    architecture="LlamaForCausalLM", context_len=1000, vocab_size=100, num_layers=2, num_kv_heads=2,
    head_dim=8, dtype="bfloat16", weight_bytes=10_000, eos_token_ids=(1,), card=ModelCard("/m/t.json", {}, {}),
)  # fmt: skip
CPU = DeviceFacts(kind="cpu", name="cpu", total_bytes=1 << 30, free_bytes=1 << 29)
BLOCK = 2 * 2 * 2 * 8 * 16 * 2  # bytes: layers, keys and values, heads, their numbers, tokens, bfloat16


def config(**values):
    return EngineConfig.from_mapping({"model": "m", **values})


@pytest.mark.parametrize(
    ("key", "spelled", "meant"),
    [
        ("enforce_eager", "true", True),
        ("enforce_eager", "False", False),
        ("disable_log_stats", "TRUE", True),
        ("enable_log_requests", "true", True),
        ("gpu_memory_utilization", "0.9", 0.9),
        ("gpu_memory_utilization", 1, 1),
        ("max_model_len", "4096", 4096),
        ("max_model_len", 4096.0, 4096),
        ("max_model_len", -1, None),
        ("max_model_len", "-1", None),
        ("max_num_seqs", " 8 ", 8),
        ("dtype", "half", "float16"),
        ("dtype", "float", "float32"),
        ("dtype", "float16", "float16"),
        ("kv_cache_dtype", "fp8_e4m3", "fp8"),
        ("override_generation_config", {"temperature": 0.5}, {"temperature": 0.5}),
    ],
)
def test_spellings_in_use(key, spelled, meant):
    value = getattr(config(**{key: spelled}), key)
    assert (value, type(value)) == (meant, type(meant))


EVERY_KEY = {*(each.name for each in fields(EngineConfig)), *ONLY_VALUE, *NO_EFFECT, "known_to_nobody"} - {"model"}


@pytest.mark.parametrize("key", sorted(EVERY_KEY))
def test_null_is_as_if_the_key_were_absent(key):
    assert config(**{key: None}) == config()


def test_no_key_is_in_two_tables():
    assert not set(ONLY_VALUE) & NO_EFFECT
    assert not {each.name for each in fields(EngineConfig)} & (NO_EFFECT | set(ONLY_VALUE))


ASKS_FOR_NOTHING = {
    "disable_log_requests": "true",
    "swap_space": 4,
    "served_model_name": "name",
    "max_logprobs": 20,
    "distributed_executor_backend": "mp",
    "max_seq_len_to_capture": 8192,
    "max_lora_rank": 16,
}


def test_keys_without_an_effect_are_named_in_the_line_that_says_what_is_used():
    parsed = config(**ASKS_FOR_NOTHING, max_num_seqs=4)
    assert f"no effect here: {', '.join(ASKS_FOR_NOTHING)}" in resolve(parsed, MODEL, CPU, BLOCK).summary()
    assert "no effect" not in resolve(config(max_num_seqs=4), MODEL, CPU, BLOCK).summary()


# vLLM's engine arguments of several versions at their defaults, as tools write them into a file.
VLLM_DEFAULTS = {
    "task": "auto", "runner": "auto", "convert": "auto", "model_impl": "auto", "config_format": "auto",
    "tokenizer_mode": "auto", "skip_tokenizer_init": False, "trust_remote_code": False, "dtype": "auto",
    "load_format": "auto", "model_loader_extra_config": {}, "ignore_patterns": ["original/**/*"],
    "safetensors_load_strategy": "lazy", "pt_load_map_location": "cpu", "use_tqdm_on_load": True,
    "allowed_local_media_path": "", "hf_overrides": {}, "rope_scaling": {}, "override_attention_dtype": None,
    "kv_cache_dtype": "auto", "calculate_kv_scales": False, "kv_sharing_fast_prefill": False, "cpu_offload_gb": 0,
    "swap_space": 4, "gpu_memory_utilization": 0.9, "mamba_cache_dtype": "auto", "mamba_ssm_cache_dtype": "auto",
    "pipeline_parallel_size": 1, "tensor_parallel_size": 1, "data_parallel_size": 1, "data_parallel_backend": "mp",
    "data_parallel_hybrid_lb": False, "decode_context_parallel_size": 1, "prefill_context_parallel_size": 1,
    "enable_expert_parallel": False, "enable_eplb": False, "enable_dbo": False, "disable_custom_all_reduce": False,
    "ray_workers_use_nsight": False, "worker_cls": "auto", "worker_extension_cls": "",
    "max_num_partial_prefills": 1, "max_long_partial_prefills": 1, "long_prefill_token_threshold": 0,
    "num_lookahead_slots": 0, "scheduling_policy": "fcfs", "scheduler_delay_factor": 0.0, "num_scheduler_steps": 1,
    "scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler", "async_scheduling": False,
    "disable_sliding_window": False, "disable_cascade_attn": False, "disable_hybrid_kv_cache_manager": False,
    "disable_chunked_mm_input": False, "enforce_eager": False, "compilation_config": {}, "max_logprobs": 20,
    "logprobs_mode": "raw_logprobs", "enable_lora": False, "enable_lora_bias": False, "max_loras": 1,
    "max_lora_rank": 16, "lora_dtype": "auto", "enable_prompt_adapter": False, "max_prompt_adapters": 1,
    "max_prompt_adapter_token": 0, "tokenizer_pool_size": 0, "limit_mm_per_prompt": {}, "mm_processor_cache_gb": 4,
    "media_io_kwargs": {}, "interleave_mm_strings": False, "skip_mm_profiling": False, "enable_mm_embeds": False,
    "guided_decoding_backend": "auto", "guided_decoding_disable_fallback": False, "reasoning_parser": "",
    "structured_outputs_config": {}, "override_neuron_config": {}, "additional_config": {}, "seed": 0,
    "enable_sleep_mode": False, "aggregate_engine_logging": False, "disable_log_stats": False,
    "generation_config": "auto",
}  # fmt: skip


def test_vllms_defaults_written_out_ask_for_nothing():
    assert replace(config(**VLLM_DEFAULTS), no_effect=()) == config()


@pytest.mark.parametrize(
    "values",
    [
        {"tokenizer_revision": "main"},
        {"tokenizer_revision": "v1", "revision": "v1"},
        {"tokenizer_revision": "main", "revision": "v1", "tokenizer": "org/other"},
    ],
)
def test_the_tokenizers_revision_may_name_the_one_that_is_used(values):
    assert config(**values).no_effect == ("tokenizer_revision",)


@pytest.mark.parametrize(
    ("values", "used"),
    [
        ({"tokenizer_revision": "v2"}, "main"),
        ({"tokenizer_revision": "v2", "revision": "v1"}, "v1"),
        ({"tokenizer_revision": "v1", "revision": "v1", "tokenizer": "org/other"}, "main"),
    ],
)
def test_but_no_other(values, used):
    words = f"tokenizer_revision='{values['tokenizer_revision']}' is not supported; only '{used}' is"
    with pytest.raises(ConfigError, match=words):
        config(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"tensor_parallel_size": 1, "pipeline_parallel_size": "1", "trust_remote_code": "false"},
        {"load_format": "safetensors", "enable_chunked_prefill": "True", "enable_lora": False},
        {"hf_overrides": {}, "cpu_offload_gb": 0, "speculative_config": {}},
        {"scheduling_policy": "fcfs", "ignore_patterns": "original/**/*", "reasoning_parser": ""},
        {"scheduling_policy": "priority", "ignore_patterns": []},
    ],
)
def test_what_is_done_anyway_is_not_worth_a_word(values):
    assert config(**values) == config()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"trust_remote_code": True}, "trust_remote_code=True is not supported; only False is"),
        ({"trust_remote_code": "true"}, "trust_remote_code='true' is not supported"),
        ({"load_format": "dummy"}, "load_format='dummy' is not supported; only 'auto' or 'safetensors' or 'gguf' is"),
        ({"hf_overrides": {"rope_theta": 1}}, "hf_overrides={'rope_theta': 1} is not supported"),
        ({"tensor_parallel_size": True}, "tensor_parallel_size=True is not supported; only 1 is"),
        ({"tensor_parallel_size": "2"}, "tensor_parallel_size='2' is not supported"),
        ({"model_impl": "transformers"}, "model_impl='transformers' is not supported; only 'auto' or 'vllm' is"),
        ({"scheduling_policy": "sjf"}, "scheduling_policy='sjf' is not supported; only 'fcfs' or 'priority' is"),
        ({"ignore_patterns": ["*.json"]}, "ignore_patterns=['*.json'] is not supported"),
        ({"reasoning_parser": "deepseek_r1"}, "reasoning_parser='deepseek_r1' is not supported; only '' is"),
        ({"download_dir": 5}, "download_dir must be a string, not 5"),
        ({"worker_cls": "my.Worker"}, "worker_cls='my.Worker' is not supported; only 'auto' is"),
        ({"decode_context_parallel_size": 2}, "decode_context_parallel_size=2 is not supported; only 1 is"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype must be one of"),
        ({"enforce_eager": "yes"}, "enforce_eager must be true or false, not 'yes'"),
        ({"enforce_eager": 1}, "enforce_eager must be true or false, not 1"),
        ({"max_model_len": "4k"}, "max_model_len must be an integer, not '4k'"),
        ({"max_model_len": 0.5}, "max_model_len must be an integer, not 0.5"),
        ({"max_model_len": -2}, "max_model_len must be at least 1"),
        ({"gpu_memory_utilization": "nan"}, "gpu_memory_utilization must be a number, not 'nan'"),
        ({"dtype": 16}, "dtype must be a string, not 16"),
        ({"override_generation_config": "x"}, "override_generation_config must be an object, not 'x'"),
        ({"no_effect": ["x"]}, "unknown key 'no_effect'"),
    ],
)
def test_what_asks_for_more_is_refused_by_name(values, words):
    with pytest.raises(ConfigError) as caught:
        config(**values)
    assert words in caught.value.message


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path):
    (tmp_path / "model.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"model": "org/name"}).encode())
    assert EngineConfig.from_file(tmp_path / "model.json").model == "org/name"
