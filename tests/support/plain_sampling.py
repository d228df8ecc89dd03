"""What requests may want of their logits, written plainly in Python's floats: the reference of every kind of ops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from flashserve.protocol import SamplingParams
from flashserve.runner.device_queue import CpuQueue
from flashserve.runner.input_builder import Arrangement
from flashserve.runner.logits_processor import LogitsProcessor
from flashserve.runner.sampler_state import SamplerState
from flashserve.scheduling.output import Admission, SchedulerOutput
from flashserve_kernels import Ops

VOCAB = 60
PROMPT = [5, 6, 7, 8, 9, 5, 6, 7, 1, 2, 3, 3]
OUTPUT = [20, 21, 20, 22, 5, 6, 7]


@dataclass(frozen=True)
class Case:
    """A request, and its text so far."""

    params: SamplingParams
    prompt: list[int] = field(default_factory=lambda: list(PROMPT))
    output: list[int] = field(default_factory=lambda: list(OUTPUT))


def case(prompt: list[int] = PROMPT, output: list[int] = OUTPUT, **params: object) -> Case:
    return Case(SamplingParams(**params), prompt, output)  # type: ignore[arg-type]


EVERYTHING = {
    "presence_penalty": 0.4, "frequency_penalty": 0.3, "repetition_penalty": 1.2, "logit_bias": {30: 2.0, 8: 1.5},
    "bad_word_ids": ((40,), (6, 7, 31)), "dry_multiplier": 0.5, "dry_breaker_ids": (3,), "xtc_probability": 0.5,
    "xtc_threshold": 0.03, "temperature": 1.2, "min_p": 0.01, "top_k": 35, "top_p": 0.98,
}  # fmt: skip
CASES = {
    "nothing": case(),
    "presence": case(presence_penalty=1.5),
    "frequency": case(frequency_penalty=-0.7),
    "repetition": case(repetition_penalty=1.7),
    "a repetition that is wanted": case(repetition_penalty=0.6),
    "penalties of a prompt alone": case(output=[], presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=3.0),
    "penalties": case(presence_penalty=-0.5, frequency_penalty=0.9, repetition_penalty=1.1),
    "the least repetition": case(repetition_penalty=5e-324),
    "bias": case(logit_bias={0: 100.0, 7: -100.0, 59: 0.5}),
    "a bad word": case(bad_word_ids=((7,), (8,))),
    "a bad word of which the text holds the beginning": case(bad_word_ids=((6, 7, 9), (7, 11), (5, 7, 12), (7, 6, 13))),
    "a bad word that the prompt begins": case(output=[], bad_word_ids=((3, 14), (3, 3, 15))),
    "a bad word longer than the text": case(output=[6, 7], bad_word_ids=((5, 6, 7, 16), (6, 7, 17))),
    "dry": case(dry_multiplier=1.0),
    "dry up to a breaker": case(dry_multiplier=2.0, dry_base=2.0, dry_allowed_length=1, dry_breaker_ids=(6,)),
    "dry behind a breaker": case(dry_multiplier=2.0, dry_breaker_ids=(7,)),
    "dry before a breaker": case(dry_multiplier=2.0, dry_breaker_ids=(8, 1)),
    "dry of one token": case(prompt=[4], output=[4] * 70, dry_multiplier=3.0, dry_base=1.1),
    "dry of one token that is allowed": case(prompt=[4], output=[4] * 9, dry_multiplier=3.0, dry_allowed_length=9),
    "dry at the first token": case(prompt=[4], output=[], dry_multiplier=3.0),
    "dry in two ways": case(prompt=[1, 2, 9, 3, 2, 9, 1, 2, 8], output=[1, 2], dry_multiplier=1, dry_allowed_length=1),
    "xtc": case(xtc_probability=1.0, xtc_threshold=0.05, temperature=1.0),
    "xtc at another temperature": case(xtc_probability=1.0, xtc_threshold=0.05, temperature=3.0),
    "xtc without a choice": case(xtc_probability=1.0, xtc_threshold=0.6, temperature=1.0),
    "xtc of a greedy row": case(xtc_probability=1.0, xtc_threshold=0.01, temperature=0.0),
    "everything": Case(SamplingParams(**{**EVERYTHING, "xtc_probability": 1.0})),
}


def plain_logits(logits: Sequence[float], asked: Case) -> list[float]:
    """Before the temperature."""
    x, params, known = [float(number) for number in logits], asked.params, [*asked.prompt, *asked.output]
    for *beginning, last in params.bad_word_ids:
        if not beginning or asked.output[-len(beginning) :] == beginning:
            x[last] = -math.inf
    for token, bias in params.logit_bias.items():
        x[token] += bias
    repetition = max(params.repetition_penalty, 1e-30)
    for token in set(known):
        x[token] = x[token] / repetition if x[token] > 0 else x[token] * repetition
    for token in set(asked.output):
        x[token] -= params.frequency_penalty * asked.output.count(token) + params.presence_penalty
    for token, length in repetitions(known, params.dry_breaker_ids).items():
        if params.dry_multiplier and length >= params.dry_allowed_length:
            x[token] -= params.dry_multiplier * params.dry_base ** (length - params.dry_allowed_length)
    return x


def repetitions(known: list[int], breakers: Sequence[int]) -> dict[int, int]:
    """How long a sequence of the text each token would repeat, before that token; up to 50."""
    longest: dict[int, int] = {}
    for end in range(len(known) - 1):
        length = 0
        while length < min(50, end + 1) and known[end - length] == known[-1 - length] not in breakers:
            length += 1
        if length and known[end + 1] not in breakers:
            longest[known[end + 1]] = max(length, longest.get(known[end + 1], 0))
    return longest


def softmax(x: Sequence[float]) -> list[float]:
    weights = [math.exp(number - max(x)) for number in x]
    return [weight / sum(weights) for weight in weights]


def without_top_choices(x: Sequence[float], params: SamplingParams) -> list[float]:
    """What XTC leaves when it strikes."""
    likely = softmax([number / params.temperature for number in x])
    top = [token for token, p in enumerate(likely) if p >= params.xtc_threshold]
    excluded = sorted(top, key=lambda token: likely[token])[1:]
    return [-math.inf if token in excluded else number for token, number in enumerate(x)]


def truncated(x: Sequence[float], params: SamplingParams) -> list[float]:
    """Probabilities after the temperature, min-p, top-k and top-p."""
    likely = softmax([number / params.temperature for number in x])
    order = sorted(range(len(x)), key=lambda token: -likely[token])
    kept = [token for token in order if likely[token] >= params.min_p * likely[order[0]]]
    kept = kept[: params.top_k or len(x)]
    total, mass, nucleus = sum(likely[token] for token in kept), 0.0, set()
    for token in kept:
        if mass < params.top_p * total:
            nucleus.add(token)
        mass += likely[token]
    rest = sum(likely[token] for token in nucleus)
    return [likely[token] / rest if token in nucleus else 0.0 for token in range(len(x))]


def distribution(logits: Sequence[float], asked: Case) -> list[float]:
    """The probability of each next token."""
    x, strikes = plain_logits(logits, asked), asked.params.xtc_probability
    spared, struck = truncated(x, asked.params), truncated(without_top_choices(x, asked.params), asked.params)
    return [(1 - strikes) * one + strikes * other for one, other in zip(spared, struck, strict=True)]


class DeviceQueue(CpuQueue):
    """Numbers go to where the ops are."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def processed(ops: Ops, logits: Tensor, cases: Sequence[Case]) -> Tensor:
    """The logits, [N, V], one row for each case, as a runner's processor leaves them; in place."""
    processor, _, step = _admitted(ops, cases, np.arange(len(cases))[::-1].copy())
    processor.apply(DeviceQueue(ops.device), logits, step)
    return logits


def sampled(ops: Ops, logits: Tensor, asked: Case, count: int) -> list[int]:
    """``count`` tokens from the same logits, [V], at as many positions."""
    processor, state, step = _admitted(ops, [asked], np.zeros(count, np.int64))
    step.starts[:] = np.arange(count)
    rows = logits.repeat(count, 1)
    queue = DeviceQueue(ops.device)
    processor.apply(queue, rows, step)
    slots, positions = queue.to_device(step.sample_slots), queue.to_device(step.sample_positions)
    return ops.sample(rows, slots, positions, state.columns, state.stages(step.sample_slots)).tolist()


def _admitted(ops: Ops, cases: Sequence[Case], slots: np.ndarray) -> tuple[LogitsProcessor, SamplerState, Arrangement]:
    """Case i has slot ``slots[i]``; all rows sample."""
    count, num_slots = len(slots), int(slots.max()) + 2
    admissions = [
        Admission(i, int(slots[i]), one.params, 7 + i, len(one.prompt), (), 0, [*one.prompt, *one.output])
        for i, one in enumerate(cases)
    ]
    processor = LogitsProcessor(num_slots, VOCAB, ops, ops.device)
    processor.follow(SchedulerOutput(1, admissions, [], 0, []))
    state = SamplerState(num_slots, ops.device, late=False)
    for admission in admissions:
        state.admit(admission)
    starts = np.array([len(one.prompt) + len(one.output) - 1 for one in cases] if len(cases) == count else [0] * count)
    rows = np.arange(count)
    return processor, state, Arrangement([], slots, starts, np.ones(count, np.int64), rows, slots, rows, rows[:0])
