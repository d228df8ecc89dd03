"""model.json as it is written for Triton's vLLM backend: what asks for nothing that is missing loads."""

import json

import pytest

from flashserve.config import DeviceFacts, EngineConfig, ModelFacts, resolve
from flashserve.errors import ConfigError

MODEL = ModelFacts(
    path="/m", architecture="LlamaForCausalLM", context_len=1000, vocab_size=100, num_layers=2, num_kv_heads=2,
    head_dim=8, checkpoint_dtype="bfloat16", weight_bytes=10_000, eos_token_ids=(1,), tokenizer_file="/m/t.json",
)  # fmt: skip
CPU = DeviceFacts(kind="cpu", name="cpu", total_bytes=1 << 30, free_bytes=1 << 29, num_threads=2)


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


@pytest.mark.parametrize("key", ["block_size", "tensor_parallel_size", "trust_remote_code", "swap_space", "seed"])
def test_null_is_as_if_the_key_were_absent(key):
    assert config(**{key: None}) == config()


ASKS_FOR_NOTHING = {
    "disable_log_requests": "true",
    "swap_space": 4,
    "served_model_name": "name",
    "download_dir": "/d",
    "max_logprobs": 20,
    "distributed_executor_backend": "mp",
    "max_seq_len_to_capture": 8192,
    "max_lora_rank": 16,
}


def test_keys_without_an_effect_are_named_in_the_line_that_says_what_is_used():
    parsed = config(**ASKS_FOR_NOTHING, max_num_seqs=4)
    assert f"no effect here: {', '.join(ASKS_FOR_NOTHING)}" in resolve(parsed, MODEL, CPU).summary()
    assert "no effect" not in resolve(config(max_num_seqs=4), MODEL, CPU).summary()


@pytest.mark.parametrize(
    "values",
    [
        {"tensor_parallel_size": 1, "pipeline_parallel_size": "1", "trust_remote_code": "false"},
        {"load_format": "safetensors", "enable_chunked_prefill": "True", "enable_lora": False},
        {"hf_overrides": {}, "cpu_offload_gb": 0, "speculative_config": {}},
    ],
)
def test_what_is_done_anyway_is_not_worth_a_word(values):
    assert config(**values) == config()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"trust_remote_code": True}, "trust_remote_code=True is not supported; only False is"),
        ({"trust_remote_code": "true"}, "trust_remote_code='true' is not supported"),
        ({"load_format": "dummy"}, "load_format='dummy' is not supported; only 'auto' or 'safetensors' is"),
        ({"hf_overrides": {"rope_theta": 1}}, "hf_overrides={'rope_theta': 1} is not supported"),
        ({"tensor_parallel_size": True}, "tensor_parallel_size=True is not supported; only 1 is"),
        ({"tensor_parallel_size": "2"}, "tensor_parallel_size='2' is not supported"),
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
