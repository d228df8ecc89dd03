"""The cases of benchmarks/common/op_cases on the native kernels: does each run as it is timed, and is it correct?"""

from __future__ import annotations

import pytest
import torch

from benchmarks.common.op_cases import Inputs, attention_case, linear_cases, row_cases, sample_cases
from benchmarks.common.ops import check, measure, relative_error, runner, speed
from benchmarks.common.shapes import TINY_SHAPE
from benchmarks.common.timing import Timer
from flashserve_kernels.select import select_ops

BFLOAT16 = torch.bfloat16
CASES = [
    *linear_cases(TINY_SHAPE, (1, 20), 2, None),
    *linear_cases(TINY_SHAPE, (3,), 1, "int8"),
    *row_cases(TINY_SHAPE, 32, 2),
    *sample_cases(512, 4, 2),
    attention_case("decode", 2, 1, 40, 4, 2, 16),
    attention_case("decode int8", 2, 1, 40, 4, 2, 16, cache_dtype=torch.int8, item=1),
    attention_case("prefill", 2, 40, 40, 4, 2, 16, window=20),
    attention_case("verify", 2, 3, 40, 4, 2, 16, softcap=20.0),
]


@pytest.fixture(scope="module")
def ops():
    return select_ops(torch.device("cpu"), 1, 16)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_runs_and_is_correct(ops, case):
    found = check(case, ops, BFLOAT16)
    assert found["correct"], found
    runner(ops, case.bind(ops, Inputs(ops.device, BFLOAT16, BFLOAT16), 2))()


def test_a_time_is_that_of_one_call(ops):
    class TwoSeconds(Timer):
        def seconds(self, *calls):
            return [2.0, 4.0]

    norm, product = row_cases(TINY_SHAPE, 32, 2)[0], linear_cases(TINY_SHAPE, (8,), 2, None)[0]
    for case, calls in ((norm, 1), (product, 3)):  # of a product there are copies of the weight
        found = measure(case, ops, BFLOAT16, TwoSeconds(ops.device), None, copies=3)
        assert (found["us"], found["torch_us"]) == pytest.approx((2e6 / calls, 4e6 / calls))


def test_a_wrong_result_is_found(ops, monkeypatch):
    case = attention_case("decode", 2, 1, 40, 4, 2, 16)
    attend = ops.paged_attention
    monkeypatch.setattr(ops, "paged_attention", lambda *arguments: attend(*arguments).mul_(1.1))
    assert not check(case, ops, BFLOAT16)["correct"]
    assert relative_error(torch.tensor([1.0, 2.2]), torch.tensor([1.0, 2.0]).double()) == pytest.approx(0.1)


def test_the_nearer_ceiling_counts():
    product = linear_cases(TINY_SHAPE, (1000,), 2, None)[0]
    memory, arithmetic = product.num_bytes / 1e-6, product.flops / 1e-6
    assert speed(product, 2e-6, (memory, 10 * arithmetic))["of_ceiling"] == pytest.approx(0.5)
    assert speed(product, 2e-6, (10 * memory, arithmetic))["of_ceiling"] == pytest.approx(0.5)
