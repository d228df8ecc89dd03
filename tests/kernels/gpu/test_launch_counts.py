"""How many kernels a step starts on a GPU: at batch 1 the starts are a large part of its time. Nothing runs here: the
launchers and torch's products are counted over tensors without memory."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common.shapes import SHAPES
from benchmarks.gpu.models import RandomWeights
from flashserve.models.registry import find_architecture
from flashserve.runner.row_lengths import RowLengths
from flashserve.runner.sampler_state import SamplerState
from flashserve.runner.staging import StepSizes, num_bytes, tensor_fields
from flashserve.runner.step_model import StepModel
from flashserve_kernels import KVCacheSpec, Stage
from flashserve_kernels.gpu.device import H200
from flashserve_kernels.gpu.launch import record
from flashserve_kernels.gpu.ops import TritonOps

META = torch.device("meta")
MAX_BLOCKS = 2048

# Kernels of a layer of Qwen3-8B. Beside prompts decodes are a launch of attention of their own.
LAYER = {
    "aten.mm": 4,  # qkv, output, gate and up, down
    "norm_kernel": 2,  # before attention and MLP
    "rope_and_cache_kernel": 1,  # with the norms of queries and keys
    "attention_kernel": 1,
    "activate_and_mul_kernel": 1,
}
MIXED = LAYER | {"attention_kernel": 2}


class Products(TorchDispatchMode):
    """Counts what torch itself starts: all that makes or changes numbers."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and not name.startswith(("empty", "new_empty", "detach")):
            self._found[f"aten.{name}"] += 1
        return func(*args, **(kwargs or {}))


def count(layers: int, sizes: StepSizes, lengths: RowLengths) -> Counter[str]:
    """Kernels by name of a greedy step of a Qwen3-8B with so many layers."""
    config = {**SHAPES["qwen3-8b"], "num_hidden_layers": layers}
    ops = TritonOps(META)
    _, model_class = find_architecture(config)
    model = model_class(config, RandomWeights(torch.bfloat16, META, ops), 32768)
    spec = KVCacheSpec(layers, 16, 8, 128, torch.bfloat16, torch.bfloat16)
    slots = 257
    step_model = StepModel(
        model=model,
        ops=ops,
        kv_cache=ops.allocate_kv_cache(spec, 8),
        block_size=16,
        block_table=torch.zeros((slots, MAX_BLOCKS), dtype=torch.int32, device=META),
        last_tokens=torch.zeros(slots, dtype=torch.int64, device=META),
        sampler=SamplerState(slots, META, late=True).columns,
        every_stage=Stage(0),
    )
    fields = tensor_fields(torch.zeros(num_bytes(sizes), dtype=torch.uint8, device=META), sizes)
    found: Counter[str] = Counter()

    def step() -> None:
        with Products(found):
            step_model.sample(fields, step_model.logits(fields, lengths), Stage(0))

    found.update(variant.name.rpartition(".")[2] for variant in record(H200, step))
    return found


@pytest.mark.parametrize("sizes, lengths, table, of_36_layers", [
    pytest.param(StepSizes(1, 1, 1), RowLengths(1), LAYER, 335, id="1 decode"),
    pytest.param(StepSizes(256, 256, 256), RowLengths(1), LAYER, 335, id="256 decodes"),
    pytest.param(StepSizes(2048, 256, 256), RowLengths(2048, 0, 256), MIXED, 371, id="mixed"),
])  # fmt: skip
def test_kernels_of_a_step(sizes, lengths, table, of_36_layers):
    one, two = (count(layers, sizes, lengths) for layers in (1, 2))
    per_layer = two - one
    assert dict(per_layer) == table
    rest = one - per_layer
    assert sum(rest.values()) + 36 * sum(table.values()) == of_36_layers
