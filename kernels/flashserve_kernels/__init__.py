"""Device ops of flashserve: one op per file, a functional interface over (strided) tensors.

Whoever calls an op does not know the device. Each file holds the op's torch implementation, which runs on every
device and defines what the op means; faster ones for a device are chosen inside the same function. Nothing here
knows requests, models or settings.
"""

from flashserve_kernels.activation import gelu_tanh, silu_and_mul
from flashserve_kernels.attention import AttentionBatch, paged_attention
from flashserve_kernels.embedding import embedding
from flashserve_kernels.kv_cache import KVLayer, allocate_kv_cache, write_kv
from flashserve_kernels.linear import linear, pack_linear, packing_pays
from flashserve_kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from flashserve_kernels.rotary import rope_and_cache, rotary_embedding_
from flashserve_kernels.sampling import greedy, mask_tokens_, sample

__all__ = [
    "AttentionBatch",
    "KVLayer",
    "add_layer_norm",
    "add_rms_norm",
    "allocate_kv_cache",
    "embedding",
    "gelu_tanh",
    "greedy",
    "layer_norm",
    "linear",
    "mask_tokens_",
    "pack_linear",
    "packing_pays",
    "paged_attention",
    "rms_norm",
    "rope_and_cache",
    "rotary_embedding_",
    "sample",
    "silu_and_mul",
    "write_kv",
]
