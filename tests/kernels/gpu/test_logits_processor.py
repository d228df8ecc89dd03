"""What requests want of their logits, on Triton-lang's ops: the plain reference's numbers."""

from __future__ import annotations

import pytest
import torch

from flashserve_kernels.gpu.ops import TritonOps
from plain_sampling import CASES, VOCAB, plain_logits, processed, sampled, without_top_choices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_wish_is_the_plain_references_among_all_others(dtype, device):
    cases = [asked for name, asked in CASES.items() if "least" not in name]
    if dtype != torch.float32:  # where the likelihood of a token is close to XTC's threshold, rounding decides
        cases = [asked for asked in cases if not asked.params.xtc_probability]
    logits = (torch.randn(len(cases), VOCAB, generator=torch.Generator().manual_seed(3)) * 2).to(dtype)
    wanted = []
    for row, asked in zip(logits.tolist(), cases, strict=True):
        x, params = plain_logits(row, asked), asked.params
        wanted.append(without_top_choices(x, params) if params.xtc_probability and params.temperature else x)
    tolerance = 2e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    found = processed(TritonOps(device), logits.to(device), cases).cpu().double()
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=tolerance, atol=tolerance)


def test_tokens_are_those_of_the_torch_path(device):
    from flashserve_kernels import Ops

    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(4))
    asked = CASES["everything"]
    assert sampled(TritonOps(device), logits.to(device), asked, 12) == sampled(
        Ops(torch.device("cpu")), logits, asked, 12
    )
