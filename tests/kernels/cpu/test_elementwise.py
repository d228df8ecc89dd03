"""Embedding rows and activations in C++, on every instruction set, eagerly and recorded."""

from __future__ import annotations

import pytest
import torch

from flashserve_kernels import activation as reference
from flashserve_kernels.cpu.elementwise import ACTIVATIONS, activate, add_embedding_, embedding, soft_cap_
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
def test_embedding_scales_rows(pool, dtype):
    table, ids = torch.randn(20, 75).to(dtype), torch.randint(20, (300,))
    expected = (table[ids].float() * 25.298).to(dtype)
    torch.testing.assert_close(embedding(pool, table, ids, 25.298), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [5, 64, 1537])
@pytest.mark.parametrize("rows", [1, 67])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(pool, dtype, columns, rows, activation):
    x = (torch.randn(rows, columns) * 4).to(dtype)
    x[0, :5] = torch.tensor([0.0, -60.0, 60.0, -150.0, 1e-3]).to(dtype)  # where exponentials overflow
    exact = reference.activate(x.double(), activation)
    torch.testing.assert_close(activate(pool, x, activation).double(), exact, rtol=TOLERANCE[dtype], atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_what_is_no_number_or_huge(pool, activation):
    x = torch.randn(2, 40)
    x[1, 3] = torch.nan
    x[0, 5] = 1e30
    out = activate(pool, x, activation)
    assert out.isnan().nonzero().tolist() == [[1, 3]]
    assert out[0, 5] == x[0, 5]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [5.0, 30.0])
def test_soft_cap(pool, dtype, cap):
    x = (torch.randn(5, 1037) * 40).to(dtype)
    x[0, :3] = torch.tensor([torch.inf, -torch.inf, 1e4])
    exact = cap * (x.double() / cap).tanh()
    assert soft_cap_(pool, x, cap) is x
    torch.testing.assert_close(x.double(), exact, rtol=TOLERANCE[dtype], atol=1e-5)


def test_a_recorded_program_serves_every_number_of_tokens(pool):
    table, capacity = torch.randn(30, 64, dtype=torch.bfloat16), 40
    ids = torch.zeros(capacity, dtype=torch.int64)
    program = Program(pool, (capacity, 1, 1))
    program.add_input(ids, TOKENS)
    with program.recording():
        result = activate(pool, add_embedding_(pool, embedding(pool, table, ids, 3.0), table, ids), "gelu_tanh")
    for tokens in (40, 1, 17):
        ids[:tokens] = torch.randint(30, (tokens,))
        result.fill_(torch.nan)
        program.run(tokens, 0, 0)
        x = embedding(pool, table, ids[:tokens], 3.0)
        expected = activate(pool, add_embedding_(pool, x, table, ids[:tokens]), "gelu_tanh")
        assert torch.equal(result[:tokens], expected)
        assert result[tokens:].isnan().all()


def test_wrong_arguments_are_refused(pool):
    with pytest.raises(ValueError, match="ids must be"):
        embedding(pool, torch.zeros(3, 4), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="adjacent columns"):
        activate(pool, torch.zeros(8, 4).t(), "silu")
    with pytest.raises(ValueError, match="cannot be scaled"):
        embedding(pool, torch.zeros((3, 4), dtype=torch.int8), torch.zeros(2, dtype=torch.int64), 2.0)
