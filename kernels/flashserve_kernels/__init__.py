"""Device ops of flashserve. Nothing here knows requests, models or settings.

``ops`` is the interface; ``select`` chooses who implements it. The files beside them hold one op each in torch, which
defines what the op means; ``gpu/`` has them in Triton-lang, ``cpu/`` in C++.
"""

from flashserve_kernels.attention import AttentionBatch
from flashserve_kernels.ops import CacheLayer, LinearWeight, Ops, RecordingOps
from flashserve_kernels.select import select_ops

__all__ = ["AttentionBatch", "CacheLayer", "LinearWeight", "Ops", "RecordingOps", "select_ops"]
