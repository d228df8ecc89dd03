"""The batch-invariant mode: a request's numbers to the last bit, alone and in any company."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from driver import Engine, random_prompts, sampled_logits
from flashserve.errors import ConfigError
from flashserve_kernels.gpu import attention, invariant_linear
from flashserve_kernels.gpu.device import PRESETS
from flashserve_kernels.gpu.launch import ModelShape
from flashserve_kernels.gpu.ops import BatchInvariantOps
from kernel_comparison import DTYPES, assert_as_exact_as_torch, random
from tiny_models import make_tiny_model

VOCAB_SIZE = 300
NUM_TOKENS = 3


@pytest.fixture(autouse=True)
def products_as_on_a_gpu(monkeypatch):
    """The interpreter's are numpy's, whose library sums a row in an order that follows the row's place in the tile. A
    tensor core treats all rows alike."""
    if torch.cuda.is_available():
        return
    from triton.runtime import interpreter

    def create_dot(self, a, b, acc, input_precision, max_num_imprecise_acc):
        total = np.zeros_like(acc.data)
        for k in range(a.data.shape[1]):
            total += a.data[:, k : k + 1] * b.data[k]
        return interpreter.TensorHandle(total + acc.data, acc.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture
def start(load_on_kernels):
    def make(folder, **settings) -> Engine:
        settings = {"batch_invariant": True, "max_num_batched_tokens": 48, **settings}
        return Engine(load_on_kernels(folder, **settings), max_tokens=NUM_TOKENS, logprobs=1)

    return make


def logits_of(engine: Engine, first_id: int, prompts: list[list[int]]) -> torch.Tensor:
    return sampled_logits(engine, first_id, prompts, NUM_TOKENS)


def in_any_company(folder, start, **settings) -> list[torch.Tensor]:
    """The logits of one request: alone, with its beginning in the cache, beside others, and in other chunks."""
    prompt, *others = random_prompts([40, 3, 50], vocab_size=VOCAB_SIZE)
    engine = start(folder, **settings)
    alone = logits_of(engine, 0, [prompt])
    cached = logits_of(engine, 10, [prompt, *others])
    assert engine.core.scheduler.stats().prefix_cache_hits > 0
    beside_others = logits_of(start(folder, **settings), 0, [prompt, *others])
    in_chunks = logits_of(start(folder, **{**settings, "max_num_batched_tokens": 7}), 0, [prompt, *others])
    return [alone, cached, beside_others, in_chunks]


@pytest.mark.parametrize("family", ["llama", "qwen3", pytest.param("mistral", marks=pytest.mark.slow)])
def test_logits_do_not_depend_on_the_batch(family, start, tmp_path):
    """Mistral's windows are of 30 tokens."""
    options = {"sliding_window": 30} if family == "mistral" else {}
    alone, *others = in_any_company(make_tiny_model(family, tmp_path, vocab_size=VOCAB_SIZE, **options), start)
    assert alone.isfinite().all()
    assert [torch.equal(alone, found) for found in others] == [True] * 3


def test_without_the_mode_they_do(start, tmp_path):
    """So that the test before this one can fail."""
    folder = make_tiny_model("llama", tmp_path, vocab_size=VOCAB_SIZE)
    alone, *others = in_any_company(folder, start, batch_invariant=False)
    assert not any(torch.equal(alone, found) for found in others)


@pytest.mark.slow
def test_attention_takes_part(start, tmp_path, monkeypatch):
    """Products with one tile are not enough: the usual attention computes decodes and prompts apart."""
    monkeypatch.setattr(BatchInvariantOps, "paged_attention", usual_attention)
    folder = make_tiny_model("llama", tmp_path, vocab_size=VOCAB_SIZE)
    alone, *others = in_any_company(folder, start)
    assert [torch.equal(alone, found) for found in others] != [True] * 3


def usual_attention(self, q, cache, batch, scale, window=None, softcap=None) -> torch.Tensor:
    return attention.paged_attention(q, cache, batch, scale, window, softcap, arrivals=self._arrivals)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, outputs, inputs", [(1, 48, 576), (70, 33, 100), (130, 64, 64)])
def test_linear(dtype, rows, outputs, inputs, device):
    """Of sizes that are no multiples of a tile's; each row as if it were alone, or in another place."""
    x, weight = random(rows, inputs, dtype=dtype), random(outputs, inputs, dtype=dtype, seed=1, scale=inputs**-0.5)
    bias = random(outputs, dtype=dtype, seed=2)
    on_device = weight.to(device), bias.to(device)
    found = invariant_linear.linear(x.to(device), *on_device)
    exact = x.double() @ weight.double().t() + bias.double()
    assert_as_exact_as_torch(found, x @ weight.t() + bias, exact)
    assert torch.equal(invariant_linear.linear(x.roll(5, 0).to(device), *on_device), found.roll(5, 0))
    for row in range(0, rows, 9):
        assert torch.equal(invariant_linear.linear(x[row : row + 1].to(device), *on_device)[0], found[row])
    plain = invariant_linear.linear(torch.cat((x, x), 1).to(device)[:, inputs:], on_device[0])
    assert_as_exact_as_torch(plain, x @ weight.t(), exact - bias.double())


@pytest.mark.parametrize("properties", PRESETS, ids=lambda properties: properties.name)
def test_attention_has_one_kernel_and_one_loop(properties):
    """The interpreter fuses no product with a sum, so it rounds the scores of all loops alike: a GPU does not."""
    shape = ModelShape(4096, 32, 8, 128, 12288, 151936)
    (variant,) = attention.variants(properties, shape, batch_invariant=True)
    constants = dict(variant.constants)
    assert constants["MASK_ALL"] and not constants["SPLITS"] and not constants["FIXED_TILES"]


def test_quantised_weights_are_refused(start, tmp_path):
    folder = make_tiny_model("llama", tmp_path, vocab_size=VOCAB_SIZE)
    with pytest.raises(ConfigError, match=r"int4.* is not to be had with Triton-lang, batch-invariant ops"):
        start(folder, quantization="int4")


@pytest.mark.parametrize("kernels, name", [("torch", "torch"), ("", "native|torch")])
def test_a_cpu_refuses_it(kernels, name, start, tmp_path, monkeypatch):
    folder = make_tiny_model("llama", tmp_path, vocab_size=VOCAB_SIZE)
    monkeypatch.setenv("FLASHSERVE_KERNELS", kernels)
    with pytest.raises(ConfigError, match=f"batch_invariant is not to be had with ({name}).* it needs a GPU"):
        start(folder)
