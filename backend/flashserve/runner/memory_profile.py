"""What a device's memory has left for the KV cache: found by running the steps that take the most, not by a formula."""

from __future__ import annotations

from dataclasses import replace

from flashserve.config import DeviceFacts, ResolvedConfig
from flashserve.models.model_input import CausalLM
from flashserve.protocol import SamplingParams
from flashserve.runner.device import Device
from flashserve.runner.model_runner import ModelRunner
from flashserve.scheduling.output import MAX_SCORED_TOKENS, Admission, ScheduledRow, SchedulerOutput
from flashserve_kernels import MAX_TOP, Ops

# Whatever makes a runner keep or copy something of a step's size: penalties a table by slot and token,
# log-probabilities a copy of the logits, and sampling that is not greedy its own rows.
_EVERYTHING = SamplingParams(
    temperature=1.0,
    top_p=0.9,
    top_k=50,
    min_p=0.01,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    xtc_probability=0.5,
    logit_bias={0: 1.0},
    logprobs=MAX_TOP,
    prompt_logprobs=MAX_TOP,
)


def measure_memory(model: CausalLM, resolved: ResolvedConfig, device: Device, ops: Ops) -> DeviceFacts:
    """The facts with what is left beside the weights, and beside a runner like the one that is to serve: its captured
    steps and their memory, the libraries' workspaces, its tables, and the activations of its largest steps.

    On a GPU this captures all steps once more than serving does: their memory has no formula.
    """
    return device.measure(resolved.device, lambda: _run_largest_steps(model, resolved, device, ops))


def _run_largest_steps(model: CausalLM, resolved: ResolvedConfig, device: Device, ops: Ops) -> ModelRunner:
    """Over a cache of one block: all keys and values go there, over each other."""
    runner = ModelRunner(model, replace(resolved, num_blocks=1), device, ops)
    seqs, longest, budget = resolved.max_num_seqs, resolved.max_model_len, resolved.max_num_batched_tokens
    few = [min(longest, budget - first) for first in range(0, budget, longest)][:seqs]
    many = [min(longest, budget // seqs)] * seqs
    for lens in (few, many):
        runner.wait(runner.submit(_step(lens)))
    return runner


def _step(lens: list[int]) -> SchedulerOutput:
    """Prompts of these lengths, all of which are sampled and ask for everything."""
    admissions = [
        Admission(slot, slot, _EVERYTHING, slot, length, (), known_token_ids=[0] * length)
        for slot, length in enumerate(lens)
    ]
    left, rows = MAX_SCORED_TOKENS, []
    for slot, length in enumerate(lens):
        scored = [0] * min(left, length - 1)
        left -= len(scored)
        rows.append(ScheduledRow(slot, slot, 0, length, [0] * length, [], 1, scored=scored, first_scored=1))
    return SchedulerOutput(0, admissions, rows, sum(lens), [], num_scored=MAX_SCORED_TOKENS - left)
