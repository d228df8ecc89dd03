"""Two ranks, each with its part of the weights, compute what one process does. Here a rank is a thread."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flashserve.errors import ConfigError
from flashserve.layers.embedding import load_embedding_and_head
from flashserve.layers.linear import GatedLinear, Linear
from flashserve.layers.parallel import Ranks
from flashserve.layers.weight_format import WEIGHT_FORMATS
from flashserve.models.checkpoint import Checkpoint, CheckpointWeights
from flashserve.models.model_input import ModelInput
from flashserve.models.registry import find_architecture
from flashserve_kernels import AttentionBatch, KVCacheSpec, Ops
from memory_files import MemoryWeights
from tiny_models import VOCAB_SIZE, make_tiny_model

CPU = torch.device("cpu")
HIDDEN = 24


class Meeting:
    """What two ranks hand to each other."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=30)
        self._given: list[torch.Tensor | None] = [None] * size
        self.ranks = [
            Ranks(
                rank,
                size,
                lambda x, rank=rank: sum(self._all(rank, x)),
                lambda x, rank=rank: torch.cat(self._all(rank, x), -1),
            )
            for rank in range(size)
        ]

    def _all(self, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        self._given[rank] = x.clone()
        self._barrier.wait()
        given = list(self._given)
        self._barrier.wait()  # nobody overwrites what another has yet to read
        return given


def on_every_rank(function, size: int = 2) -> list:
    """``function(ranks)`` on each of them at once: their results."""
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(torch.inference_mode()(function), Meeting(size).ranks))


def assert_same(found: list[torch.Tensor], expected: torch.Tensor) -> None:
    """Up to what float32 rounds where terms are summed in another order."""
    for each in found:
        torch.testing.assert_close(each, expected, rtol=0, atol=3e-6 * float(expected.abs().max()))


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_linears_of_split_outputs_and_inputs():
    """Fused shards, a bias on each, a transposed checkpoint, and a gated unit between them."""
    tensors = random_weights({
        "q.weight": (16, HIDDEN), "k.weight": (8, HIDDEN), "q.bias": (16,), "k.bias": (8,), "o.weight": (24, HIDDEN),
        "o.bias": (HIDDEN,), "gate.weight": (32, HIDDEN), "up.weight": (32, HIDDEN), "down.weight": (32, HIDDEN),
    })  # fmt: skip
    x = torch.randn(5, HIDDEN)

    def run(ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor]:
        weights = MemoryWeights(tensors, torch.float32, CPU, Ops(CPU), ranks)
        own = Linear(weights, "", HIDDEN, [("q", 16), ("k", 8)], bias=True, split="outputs")(x)
        assert own.shape == (5, 24 // ranks.size)
        joined = Linear(weights, "", 24, [("o", HIDDEN)], bias=True, transposed=True, split="inputs")(own)
        gated = GatedLinear(weights, "", HIDDEN, ("gate", "up"), 32, False, "gelu", split="outputs")(x)
        down = Linear(weights, "", 32, [("down", HIDDEN)], transposed=True, split="inputs")(gated)
        weights.finish(())
        return joined, down

    # The first of the two gets q's and k's upper halves, so the order of the columns between them is another.
    alone = run(Ranks())
    order = torch.tensor([*range(8), *range(16, 20), *range(8, 16), *range(20, 24)])
    tensors["o.weight"] = tensors["o.weight"][order]
    for whole, parts in zip(alone, zip(*on_every_rank(run), strict=True), strict=True):
        assert_same(list(parts), whole)


@pytest.mark.parametrize("vocab_size", [300, 301])
@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary(vocab_size, tied):
    tensors = random_weights({"table": (vocab_size, HIDDEN)} | ({} if tied else {"head": (vocab_size, HIDDEN)}))
    ids, x = torch.tensor([0, 149, 150, 151, vocab_size - 1, 7]), torch.randn(3, HIDDEN)

    def run(ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor]:
        weights = MemoryWeights(tensors, torch.float32, CPU, Ops(CPU), ranks)
        embedding, head = load_embedding_and_head(
            weights, "table", None if tied else "head", vocab_size, HIDDEN, scale=3.0, softcap=5.0
        )
        weights.finish(())
        return embedding(ids), head(x)

    alone = run(Ranks())
    assert torch.equal(alone[0], tensors["table"][ids] * 3)
    assert alone[1].abs().max() < 5
    for whole, parts in zip(alone, zip(*on_every_rank(run), strict=True), strict=True):
        assert_same(list(parts), whole)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_whole_model(family, tmp_path, random_prompts):
    checkpoint = Checkpoint(make_tiny_model(family, tmp_path))
    prompt = random_prompts([37])[0]

    def run(ranks: Ranks) -> torch.Tensor:
        config, model_class = read_config(tmp_path)
        weights = CheckpointWeights(checkpoint, torch.float32, CPU, Ops(CPU), WEIGHT_FORMATS[None], ranks)
        model = model_class(config, weights, 64)
        weights.finish(model_class.ignored_weights(config))
        return logits_of(model, model_class.read_shape(config), prompt, ranks)

    alone = torch.inference_mode()(run)(Ranks())
    assert alone.shape == (len(prompt), VOCAB_SIZE)
    assert_same(on_every_rank(run), alone)


def read_config(folder):
    config = {
        key: value for key, value in json.loads((folder / "config.json").read_text()).items() if value is not None
    }
    return config, find_architecture(config)[1]


def logits_of(model, shape, prompt: list[int], ranks: Ranks) -> torch.Tensor:
    """Of every position: [T, V]."""
    ops, count = Ops(CPU), len(prompt)
    heads = ranks.share(shape.num_kv_heads, "KV heads")
    spec = KVCacheSpec(shape.num_layers, 16, heads, shape.head_dim, torch.float32, torch.float32)
    places = torch.arange(count)
    attention = AttentionBatch(
        query_start_loc=torch.tensor([0, count], dtype=torch.int32),
        seq_lens=torch.tensor([count], dtype=torch.int32),
        block_tables=torch.arange(-(-count // 16), dtype=torch.int32)[None],
        slot_mapping=places,
        block_size=16,
        max_query_len=count,
        host_query_lens=[count],
        host_seq_lens=[count],
    )
    inputs = ModelInput(torch.tensor(prompt), places, attention, places)
    return model.logits(model.forward(inputs, ops.allocate_kv_cache(spec, 4)))


def test_what_cannot_be_shared_is_refused():
    tensors = random_weights({"q.weight": (9, HIDDEN)})
    weights = MemoryWeights(tensors, torch.float32, CPU, Ops(CPU), Ranks(0, 2))
    with pytest.raises(ConfigError, match="9 outputs of a linear layer cannot be shared by 2 ranks"):
        Linear(weights, "", HIDDEN, [("q", 9)], split="outputs")
