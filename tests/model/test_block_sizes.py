"""The KV cache takes the memory that the start line says, whatever its block size; others are refused by name."""

from __future__ import annotations

import pytest
import torch

from flashserve.config import EngineConfig
from flashserve.errors import ConfigError
from flashserve.runner.kv_cache import kv_block_bytes
from flashserve_kernels import KVCacheSpec, Ops
from flashserve_kernels.gpu.ops import TritonOps
from model_facts import facts_of
from tiny_models import make_tiny_model

BUDGET = 1 << 20
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"), dtype="bfloat16")


@pytest.mark.parametrize("cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("block_size", [1, 8, 16, 24, 64])
def test_the_bytes_reported_are_the_bytes_allocated(block_size, cache_dtype, folder, drive):
    settings = {"block_size": block_size, "kv_cache_dtype": cache_dtype, "kv_cache_memory_bytes": BUDGET}
    driver = drive(folder, **settings, max_model_len=BUDGET // (1 << 12))
    resolved, layers = driver.resolved, driver.runner.step_model.kv_cache
    assert sum(layer.memory.nbytes for layer in layers) == resolved.kv_cache_bytes
    assert BUDGET - resolved.block_bytes < resolved.kv_cache_bytes <= BUDGET
    assert f"({resolved.kv_cache_bytes / 2**20:.0f} MiB)" in resolved.summary()


@pytest.mark.parametrize("block_size", [1, 24, 64])
def test_torchs_cache_too(block_size):
    ops, spec = Ops(CPU), KVCacheSpec(3, block_size, 2, 8, torch.float16, torch.float16)
    layers = ops.allocate_kv_cache(spec, 5)
    assert sum(layer.k.nbytes + layer.v.nbytes for layer in layers) == 5 * ops.kv_block_bytes(spec)


@pytest.mark.parametrize(
    ("ops", "settings", "words"),
    [
        (TritonOps(CPU), {"block_size": 24}, "block_size=24.*power of two"),
        (TritonOps(CPU), {"kv_cache_dtype": "int8"}, "kv_cache_dtype=int8.*float8_e4m3fn"),
        (Ops(CPU), {"kv_cache_dtype": "int8"}, "kv_cache_dtype=int8.*bfloat16 only"),
        (Ops(CPU), {"kv_cache_dtype": "fp8"}, "kv_cache_dtype=fp8.*bfloat16 only"),
    ],
)
def test_what_the_ops_lack_is_refused_before_weights_are_loaded(ops, settings, words, folder):
    with pytest.raises(ConfigError, match=words):
        kv_block_bytes(ops, EngineConfig(model="m", **settings), facts_of(folder))
