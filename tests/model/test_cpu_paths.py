"""Every way in which a CPU can run a model: each native instruction set of this processor, and torch's own ops."""

from __future__ import annotations

import pytest
import torch

from flashserve_kernels.cpu.library import supported_isas
from tiny_models import FAMILIES, make_tiny_model

# No path is skipped: a processor that has an instruction set must have its library, or the test fails.
PATHS = [*(f"native:{isa}" for isa in supported_isas()), "torch"]
LENGTHS = (3, 20, 45, 33, 7, 60, 130, 16)
NUM_TOKENS = 12


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory, greedy_reference, random_prompts):
    """(folder, prompts, what transformers generates in float32)."""
    folder = make_tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    prompts = random_prompts(LENGTHS)
    return folder, prompts, greedy_reference(folder, prompts, NUM_TOKENS)


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    monkeypatch.setenv("FLASHSERVE_KERNELS", request.param)
    return request.param


def test_float32_gives_transformers_tokens(path, family, drive):
    """Ragged mixed batches over shuffled blocks, on two threads; recorded steps, and the same ops one by one."""
    folder, prompts, expected = family
    driver = drive(folder, num_threads=2)
    assert path.split(":")[-1] in driver.runner._ops.name
    assert driver.generate(prompts, NUM_TOKENS, max_chunk=40) == expected
    assert driver.generate(prompts, NUM_TOKENS, everyone=True) == expected
    assert drive(folder, enforce_eager=True).generate(prompts, NUM_TOKENS, max_chunk=40) == expected


@pytest.mark.parametrize("kind", FAMILIES)
def test_bfloat16_is_more_exact_than_transformers(kind, path, tmp_path, drive, random_prompts):
    """Relative error of the logits against float32: ours is below that of transformers' own bfloat16."""
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model(kind, tmp_path, dtype="bfloat16")
    prompts = random_prompts((50, 30, 77, 12, 100, 8, 64, 33))
    exact, theirs = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval() for dtype in (torch.float32, torch.bfloat16)
    )
    driver = drive(folder, dtype="bfloat16")
    our_error = their_error = 0.0
    with torch.inference_mode():
        for prompt in prompts:
            expected = exact(torch.tensor([prompt])).logits[0, -1]
            for_them = theirs(torch.tensor([prompt])).logits[0, -1].float()
            our_error += float((driver.first_logits(prompt) - expected).norm() / expected.norm())
            their_error += float((for_them - expected).norm() / expected.norm())
    assert 0 < our_error < their_error


def test_an_instruction_set_that_the_processor_lacks_is_refused(monkeypatch, tmp_path, drive):
    from flashserve_kernels.cpu.library import NativeUnavailable

    monkeypatch.setenv("FLASHSERVE_KERNELS", "native:sse9")
    with pytest.raises(NativeUnavailable, match="this processor cannot run 'sse9'; it can run"):
        drive(make_tiny_model("llama", tmp_path))


def test_without_a_compiler_torch_takes_over_with_one_warning(monkeypatch, tmp_path, drive, caplog):
    """The warning says what is lost, and what to do."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("flashserve_kernels.cpu.library.SHIPPED", tmp_path)
    from flashserve_kernels.cpu.library import load_library

    load_library.cache_clear()
    try:
        driver = drive(make_tiny_model("llama", tmp_path / "model"))
    finally:
        load_library.cache_clear()
    assert driver.runner._ops.name == "torch"
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "install g++" in warnings[0] and "speed" in warnings[0]
