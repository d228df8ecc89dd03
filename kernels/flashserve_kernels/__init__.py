"""Device ops of flashserve. Nothing here knows requests, models or settings.

``ops`` is what they are and their definition in torch, with one file per op beside it; ``gpu/`` overrides them in
Triton-lang, ``cpu/`` in C++; ``select`` chooses.
"""

from flashserve_kernels.activation import Activation
from flashserve_kernels.attention import AttentionBatch
from flashserve_kernels.kv_cache import KVCacheSpec, KVScales
from flashserve_kernels.logprobs import MAX_TOP, Logprobs
from flashserve_kernels.ops import CacheLayer, LinearWeight, Ops, SamplerColumns
from flashserve_kernels.sampling import Stage
from flashserve_kernels.select import select_ops

__all__ = [
    "MAX_TOP",
    "Activation",
    "AttentionBatch",
    "CacheLayer",
    "KVCacheSpec",
    "KVScales",
    "LinearWeight",
    "Logprobs",
    "Ops",
    "SamplerColumns",
    "Stage",
    "select_ops",
]
