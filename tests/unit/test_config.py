"""model.json: what is accepted, what is refused and how, and how open settings are resolved."""

import json
from dataclasses import replace

import pytest

from flashserve.config import DeviceFacts, EngineConfig, ModelFacts, resolve, resolve_dtype
from flashserve.errors import ConfigError
from flashserve.protocol import ModelCard

MODEL = ModelFacts(
    architecture="LlamaForCausalLM", context_len=1000, vocab_size=100, num_layers=2, num_kv_heads=2,
    head_dim=8, dtype="bfloat16", weight_bytes=10_000, eos_token_ids=(1,), card=ModelCard("/m/t.json", {}, {}),
)  # fmt: skip
CPU = DeviceFacts(kind="cpu", name="cpu", total_bytes=1 << 30, free_bytes=1 << 29)
BLOCK = 2 * 2 * 2 * 8 * 16 * 2  # bytes: layers, keys and values, heads, their numbers, tokens, bfloat16
GPU = DeviceFacts(kind="cuda", name="gpu", total_bytes=1 << 30, free_bytes=(1 << 30) - (1 << 20))


def config(**values):
    return EngineConfig.from_mapping({"model": "m", **values})


def test_a_vllm_model_json_is_accepted():
    parsed = config(disable_log_requests=True, gpu_memory_utilization=0.5, enforce_eager=True, tensor_parallel_size=1)
    assert parsed.gpu_memory_utilization == 0.5


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_model_length": 5}, "did you mean max_model_len"),
        ({"zzz": 5}, "unknown key 'zzz'"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2 is not supported"),
        ({"trust_remote_code": True}, "trust_remote_code=True is not supported"),
        ({"max_model_len": "5 tokens"}, "max_model_len must be an integer"),
        ({"max_num_seqs": True}, "max_num_seqs must be"),
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"watermark": 1.0}, "watermark must be in"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization must be in"),
        ({"drain_timeout_s": -1}, "drain_timeout_s must be in"),
        ({"model": None}, 'needs "model"'),
        ({"model": 5}, "model must be a string"),
    ],
)
def test_wrong_settings_are_refused_by_name(values, words):
    with pytest.raises(ConfigError) as caught:
        config(**values)
    assert words in caught.value.message


def test_the_model_key_is_required():
    with pytest.raises(ConfigError, match='needs "model"'):
        EngineConfig.from_mapping({})


def test_a_relative_folder_is_resolved_against_the_version_folder(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "model.json").write_text(json.dumps({"model": "weights"}))
    assert EngineConfig.from_file(tmp_path / "model.json").model == str(tmp_path / "weights")


@pytest.mark.parametrize(("given", "used"), [("hub", "{folder}/hub"), ("/hub", "/hub"), ("~/hub", "/home/me/hub")])
def test_downloads_go_to_the_folder_that_is_named(tmp_path, monkeypatch, given, used):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "model.json").write_text(json.dumps({"model": "org/name", "download_dir": given}))
    assert EngineConfig.from_file(tmp_path / "model.json").download_dir == used.format(folder=tmp_path)


def test_a_hub_id_stays_as_it_is(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps({"model": "org/name"}))
    assert EngineConfig.from_file(tmp_path / "model.json").model == "org/name"


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "{'model': 1}"])
def test_malformed_files_are_config_errors(tmp_path, text):
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(ConfigError, match=r"model\.json"):
        EngineConfig.from_file(tmp_path / "model.json")


def test_a_missing_file_says_what_is_needed(tmp_path):
    with pytest.raises(ConfigError, match=r"needs 1/model\.json"):
        EngineConfig.from_file(tmp_path / "model.json")


def test_float16_runs_in_bfloat16_on_a_cpu_only():
    assert resolve_dtype(config(), "float16", CPU) == "bfloat16"
    assert resolve_dtype(config(), "float16", GPU) == "float16"
    assert resolve_dtype(config(dtype="float16"), "float32", CPU) == "float16"


def test_defaults_depend_on_the_device():
    assert resolve(config(), MODEL, CPU, BLOCK).max_num_seqs == 128
    assert resolve(config(), MODEL, GPU, BLOCK).max_num_seqs == 256
    assert resolve(config(), MODEL, GPU, BLOCK).max_num_batched_tokens == 8192


def test_blocks_never_exceed_what_all_requests_can_use():
    resolved = resolve(config(max_num_seqs=2, max_model_len=100), MODEL, CPU, BLOCK)
    assert resolved.num_blocks == -(-2 * 100 // 16)


def test_blocks_fit_the_memory_given():
    resolved = resolve(config(kv_cache_memory_bytes=BLOCK * 70), MODEL, CPU, BLOCK)
    assert resolved.num_blocks == 70
    assert resolved.kv_cache_bytes == 70 * BLOCK


def test_weights_count_towards_the_gpu_share():
    gpu = replace(GPU, used_bytes=GPU.total_bytes // 2)
    with pytest.raises(ConfigError, match="no memory for the KV cache"):
        resolve(config(gpu_memory_utilization=0.5), MODEL, gpu, BLOCK)


def test_other_engines_on_a_gpu_leave_what_is_free_and_do_not_count_towards_the_share():
    gpu = replace(GPU, free_bytes=50 * BLOCK, used_bytes=0)
    resolved = resolve(config(gpu_memory_utilization=0.5, max_num_seqs=64), MODEL, gpu, BLOCK)
    assert resolved.num_blocks == 50


def test_a_gpu_without_bfloat16_runs_in_float16():
    old = replace(GPU, supports_bfloat16=False)
    assert resolve_dtype(config(), "bfloat16", old) == "float16"
    with pytest.raises(ConfigError, match="no bfloat16; use dtype float16"):
        resolve_dtype(config(dtype="bfloat16"), "bfloat16", old)


def test_the_context_is_cut_to_the_cache_only_if_nobody_asked_for_it():
    resolved = resolve(config(num_gpu_blocks_override=10), MODEL, CPU, BLOCK)
    assert resolved.max_model_len == 160
    assert "context cut from 1000 to 160" in resolved.summary()
    with pytest.raises(ConfigError, match="needs 63 KV blocks, there are 10"):
        resolve(config(num_gpu_blocks_override=10, max_model_len=1000), MODEL, CPU, BLOCK)


def test_contradictions_are_refused():
    with pytest.raises(ConfigError, match="exceeds the model's context"):
        resolve(config(max_model_len=2000), MODEL, CPU, BLOCK)
    with pytest.raises(ConfigError, match="must be at least max_num_seqs"):
        resolve(config(max_num_seqs=64, max_num_batched_tokens=32), MODEL, CPU, BLOCK)
