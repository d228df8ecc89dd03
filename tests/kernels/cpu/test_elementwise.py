"""Embedding rows and activations in C++, on every instruction set, eagerly and recorded."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flashserve_kernels.cpu.elementwise import add_embedding_, embedding, gelu_tanh, silu_and_mul
from flashserve_kernels.cpu.program import Program
from flashserve_kernels.recording import TOKENS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Half a unit in the last place of the result, and what a float32 exponential adds.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize("columns", [1, 63, 576])
def test_embedding_copies_rows(pool, dtype, columns):
    table = torch.randint(-100, 100, (50, columns + 3)).to(dtype)[:, :columns]  # rows with a gap
    ids = torch.tensor([49, 0, 7, 7, 13])
    assert torch.equal(embedding(pool, table, ids), table[ids])
    assert embedding(pool, table, ids[:0]).shape == (0, columns)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_embedding(pool, dtype):
    table, x, ids = torch.randn(20, 75).to(dtype), torch.randn(300, 75).to(dtype), torch.randint(20, (300,))
    expected = (x.double() + table[ids].double()).to(dtype)
    assert add_embedding_(pool, x, table, ids) is x
    torch.testing.assert_close(x, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [5, 64, 1537])
@pytest.mark.parametrize("rows", [1, 67])
def test_activations(pool, dtype, columns, rows):
    x = (torch.randn(rows, 2 * columns) * 4).to(dtype)
    x[0, :5] = torch.tensor([0.0, -60.0, 60.0, -150.0, 1e-3]).to(dtype)  # where exponentials overflow
    gate, up = x.double().chunk(2, dim=-1)
    close = {"rtol": TOLERANCE[dtype], "atol": 1e-6}
    torch.testing.assert_close(silu_and_mul(pool, x).double(), F.silu(gate) * up, **close)
    torch.testing.assert_close(gelu_tanh(pool, x).double(), F.gelu(x.double(), approximate="tanh"), **close)


def test_activations_pass_nan_on(pool):
    x = torch.randn(2, 40)
    x[1, 3] = torch.nan
    assert silu_and_mul(pool, x).isnan().nonzero().tolist() == [[1, 3]]
    assert gelu_tanh(pool, x).isnan().nonzero().tolist() == [[1, 3]]


def test_a_recorded_program_serves_every_number_of_tokens(pool):
    table, capacity = torch.randn(30, 64, dtype=torch.bfloat16), 40
    ids = torch.zeros(capacity, dtype=torch.int64)
    program = Program(pool, (capacity, 1, 1))
    program.add_input(ids, TOKENS)
    with program.recording():
        result = gelu_tanh(pool, silu_and_mul(pool, add_embedding_(pool, embedding(pool, table, ids), table, ids)))
    for tokens in (40, 1, 17):
        ids[:tokens] = torch.randint(30, (tokens,))
        result.fill_(torch.nan)
        program.run(tokens, 0, 0)
        x = embedding(pool, table, ids[:tokens])
        expected = gelu_tanh(pool, silu_and_mul(pool, add_embedding_(pool, x, table, ids[:tokens])))
        assert torch.equal(result[:tokens], expected)
        assert result[tokens:].isnan().all()


def test_wrong_arguments_are_refused(pool):
    with pytest.raises(ValueError, match="ids must be"):
        embedding(pool, torch.zeros(3, 4), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="adjacent columns"):
        silu_and_mul(pool, torch.zeros(8, 4).t())
