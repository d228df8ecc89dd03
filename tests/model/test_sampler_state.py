"""The sampler's parameters by slot: every kind of ops reads them there, and a new one is a column and an argument."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flashserve.protocol import SamplingParams
from flashserve.runner import sampler_state
from flashserve.runner.device import CpuDevice
from flashserve.runner.device_queue import CpuQueue
from flashserve.runner.sampler_state import Column, SamplerState
from flashserve.scheduling.output import Admission
from flashserve_kernels import Ops, Stage
from flashserve_kernels.cpu.library import supported_isas
from flashserve_kernels.cpu.ops import NativeOps
from flashserve_kernels.sampling import sample_rows
from tiny_models import make_tiny_model

CPU = torch.device("cpu")
PARAMS = {
    3: SamplingParams(temperature=0.8, top_k=20),
    0: SamplingParams(temperature=1e-6),
    4: SamplingParams(temperature=1.0, top_p=0.7),
    1: SamplingParams(temperature=2.0, min_p=0.02),
}


def admit_all(state: SamplerState) -> None:
    for slot, params in PARAMS.items():
        state.admit(Admission(slot, slot, params, -(slot + 1), 5, ()))
    state.upload(CpuQueue())


def test_a_step_needs_the_stages_of_its_own_rows():
    state = SamplerState(6, CPU, late=False)
    state.admit(Admission(0, 2, SamplingParams(temperature=0, top_k=3, top_p=0.5, seed=7), 7, 5, ()))
    admit_all(state)
    assert state.every_stage == Stage.RANDOM | Stage.MIN_P | Stage.TOP_K | Stage.TOP_P
    assert state.stages(np.array([0, 2, 5])) == Stage(0), "greedy requests need none, whatever else they ask for"
    assert state.stages(np.array([3])) == Stage.RANDOM | Stage.TOP_K
    assert state.stages(np.array([0, 1, 4])) == Stage.RANDOM | Stage.MIN_P | Stage.TOP_P
    assert state.stages(np.array([], np.int64)) == Stage(0)
    state.admit(Admission(9, 3, SamplingParams(temperature=0), 9, 5, ()))
    assert state.stages(np.array([3])) == Stage(0), "the next request of the slot decides anew"


@pytest.mark.parametrize("late", [False, True])
def test_columns_hold_what_the_slots_requests_ask_for(late):
    state = SamplerState(6, CPU, late=late)
    admit_all(state)
    assert state.columns["top_k"].tolist() == [0, 0, 0, 20, 0, 0]
    assert state.columns["top_p"].tolist() == pytest.approx([1, 1, 1, 1, 0.7, 1])
    assert state.columns["temperature"].tolist() == pytest.approx([0, 2, 0, 0.8, 1, 0])
    assert state.columns["seed"].tolist() == [0, -2, 0, -4, -5, 0]


def test_a_late_device_sees_an_admission_only_when_it_is_uploaded():
    state = SamplerState(6, CPU, late=True)
    state.admit(Admission(2, 2, SamplingParams(temperature=1.0), 9, 5, ()))
    assert state.columns["seed"].tolist() == [0] * 6
    state.upload(CpuQueue())
    assert state.columns["seed"].tolist() == [0, 0, 9, 0, 0, 0]


def test_native_ops_sample_by_slot_as_torch_does():
    state = SamplerState(6, CPU, late=False)
    admit_all(state)
    slots, positions = torch.tensor([3, 0, 4, 1]), torch.tensor([7, 0, 9, 1 << 33])
    logits = 3 * torch.randn(4, 1000, generator=torch.Generator().manual_seed(2))
    stages = state.stages(slots.numpy())
    expected = Ops(CPU).sample(logits, slots, positions, state.columns, stages)
    native = NativeOps(supported_isas()[0], 1)
    assert torch.equal(native.sample(logits, slots, positions, state.columns, stages), expected)
    assert expected[1] == logits[1].argmax()
    assert len(set(expected.tolist())) > 1


FAVOURITE = Stage(1 << 20)
"""A stage that nobody else has: a token that always wins."""


class FavouringOps(Ops):
    @staticmethod
    def _sample_rows(logits, slots, positions, stages, *, favourite, **columns):
        tokens = sample_rows(logits, slots, positions, stages, **columns)
        favourites = favourite[slots] if FAVOURITE in stages else torch.full_like(tokens, -1)
        return torch.where(favourites < 0, tokens, favourites)


class FavouringCpu(CpuDevice):
    def select_ops(self, config, head_dim):
        return FavouringOps(self.torch_device)


def test_a_new_parameter_is_a_column_and_an_argument(tmp_path, drive, random_prompts, monkeypatch):
    def favourite_of(admission):
        return admission.seed if admission.seed < 100 else -1

    favourite = Column("favourite", torch.int64, -1, favourite_of, FAVOURITE)
    monkeypatch.setattr(sampler_state, "COLUMNS", (*sampler_state.COLUMNS, favourite))
    driver = drive(make_tiny_model("llama", tmp_path), device=FavouringCpu())
    params = [SamplingParams(temperature=0, seed=seed) for seed in (42, 1000, 7)]
    with_it, without, another = driver.generate(random_prompts((5, 9, 30)), 4, params)
    assert (with_it, another) == ([42] * 4, [7] * 4)
    assert without not in (with_it, another)
    seen = []
    monkeypatch.setattr(driver.runner._ops, "_sample_rows", lambda *call, **columns: seen.append(call[3]) or call[1])
    driver.generate(random_prompts((5,)), 2, params[1:2])
    driver.generate(random_prompts((5,)), 2, params[:1])
    assert seen == [Stage(0), Stage(0), FAVOURITE, FAVOURITE]
