"""What the settings ask of a KV cache, in the ops' terms."""

from __future__ import annotations

from flashserve.config import EngineConfig, ModelFacts
from flashserve.errors import ConfigError
from flashserve.models.dtypes import CACHE_DTYPES, WEIGHT_DTYPES
from flashserve_kernels import KVCacheSpec, KVScales, Ops


def kv_cache_spec(config: EngineConfig, model: ModelFacts, scales: tuple[tuple[float, float], ...] = ()) -> KVCacheSpec:
    """The cache that an engine of these settings has."""
    dtype = WEIGHT_DTYPES[model.dtype]
    return KVCacheSpec(
        model.num_layers,
        config.block_size,
        model.num_kv_heads,
        model.head_dim,
        dtype,
        CACHE_DTYPES.get(config.kv_cache_dtype, dtype),
        tuple(KVScales(*both) for both in scales),
    )


def kv_block_bytes(ops: Ops, config: EngineConfig, model: ModelFacts) -> int:
    """Bytes of one block. Raises ConfigError for settings that the ops lack."""
    try:
        return ops.kv_block_bytes(kv_cache_spec(config, model))
    except ValueError as error:
        raise ConfigError(f"block_size={config.block_size}, kv_cache_dtype={config.kv_cache_dtype}: {error}") from error
