"""Names of dtypes, as settings and config.json spell them."""

from __future__ import annotations

import torch

WEIGHT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""In which a model can run."""
CACHE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""In which a KV cache can be, besides the model's own."""
