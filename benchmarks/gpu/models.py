"""Whole models of known shapes with random weights, made on the device: steps, prefill, throughput, idle time."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.engine import repeatable_step
from benchmarks.common.shapes import ModelCost
from benchmarks.common.timing import Timer
from benchmarks.gpu.report import Budget, Report, profile_figures
from flashserve.config import EngineConfig
from flashserve.engine.core import build_core
from flashserve.layers.parallel import Ranks
from flashserve.layers.weight_format import WEIGHT_FORMATS, WeightFormat
from flashserve.models.registry import find_architecture
from flashserve.protocol import GenerateRequest, ModelCard, SamplingParams
from flashserve.runner.device import open_device
from flashserve.runner.loading import load_runner
from flashserve.runner.model_runner import ModelRunner
from flashserve.scheduling.output import SchedulerOutput, StepResult
from flashserve_kernels import Ops

MAX_MODEL_LEN = 8192 + 64
Figure = dict[str, Any]
Measure = Callable[[], Figure]
Figures = list[tuple[str, Measure]]


class RandomWeights:
    """Implements layers' WeightSource: norms of 1, everything else normal with a deviation of 0.02."""

    format = WEIGHT_FORMATS[None]

    def __init__(self, dtype: torch.dtype, device: torch.device, ops: Ops) -> None:
        self.dtype, self.device, self.ops, self.ranks = dtype, device, ops, Ranks()

    def has(self, name: str) -> bool:
        return True

    def grouped(self, name: str, shape: tuple[int, int]) -> None:
        return None

    def read_into(self, name: str, out: Tensor) -> None:
        if out.dim() == 1:
            out.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            out.normal_(0.0, 0.02)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.read_into(name, out)
        return out

    def scratch(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def mapped(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        return None

    def finish(self, ignored: Iterable[str]) -> None:
        """There is nothing that could be left over."""


class RandomFiles:
    """Implements ModelFiles: a model that lies in no folder."""

    folder, dtype, card = Path("random"), "bfloat16", ModelCard("", {}, {})

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        cost = ModelCost.of(config)
        self._num_elements = cost.linear_params + 2 * cost.head_params

    def end_token_ids(self, vocab_size: int) -> tuple[int, ...]:
        return ()

    def has(self, name: str) -> bool:
        return True

    def same(self, one: str, other: str) -> bool:
        return True

    def read_number(self, name: str) -> None:
        """It has no scales for a KV cache."""

    def num_elements(self, ignored: Iterable[str]) -> int:
        return self._num_elements

    def weights(self, dtype: torch.dtype, device: torch.device, ops: Ops, format: WeightFormat) -> RandomWeights:
        return RandomWeights(dtype, device, ops)

    def fingerprint(self, dtype: str, layout: str) -> str:
        return "random"


class TimedRunner:
    """Implements Runner over another one, and adds up the seconds in which the host only waits for the device."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.run_ahead = runner.run_ahead
        self.wait_s = 0.0
        self.steps = 0

    def submit(self, plan: SchedulerOutput) -> Any:
        self.steps += 1
        return self._runner.submit(plan)

    def wait(self, handle: Any) -> StepResult:
        started = time.perf_counter()
        handle.tokens.result()
        self.wait_s += time.perf_counter() - started
        return self._runner.wait(handle)

    def close(self) -> None:
        """The runner is used again."""


def load_shape(config: dict[str, Any], device_name: str, max_num_seqs: int, **settings: Any) -> ModelRunner:
    """A model of this shape, with as many KV blocks as an engine of its own would have."""
    files, device = RandomFiles(config), open_device(device_name)
    _, model_class = find_architecture(config)
    with device.loading():
        defaults: dict[str, Any] = {
            "device": device_name,
            "max_model_len": min(MAX_MODEL_LEN, model_class.read_shape(config).context_len),
            "max_num_seqs": max_num_seqs,
            "enable_prefix_caching": False,
        }
        return load_runner(files, EngineConfig("random", **{**defaults, **settings}), device)


class ModelBench:
    """The measurements of one shape. Each is one figure of the report, and each is tried whatever the others did."""

    def __init__(
        self, report: Report, budget: Budget, timer: Timer, name: str, config: dict[str, Any], *, tiny: bool = False
    ) -> None:
        self.report, self.budget, self.timer, self.name, self.config = report, budget, timer, name, config
        self.cost = ModelCost.of(config)
        self.batches = (1, 4) if tiny else (1, 64, 256, 16)
        self.contexts = (32,) if tiny else (1024, 4096)
        self.workloads = ((4, 16, 8),) if tiny else ((256, 128, 1024), (256, 1024, 128), (256, 128, 128))
        self.prefills = ((1, 64, 64),) if tiny else ((1, 8192, 8192), (8, 1024, 1024), (1, 2048, 8192))
        tiny_settings = {"max_model_len": 128, "kv_cache_memory_bytes": 8 << 20, "num_threads": 1}
        self.settings: dict[str, Any] = tiny_settings if tiny else {}

    def run(self) -> None:
        """All of them, the most telling first. The section is the shape's name."""
        try:
            self._put("load", partial(self._load, enforce_eager=False))
            if "traceback" in self.report.get(self.name, "load"):
                return
            for figure, measure in self._captured().items():
                self._put(figure, measure)
            self.runner.close()
            self._put("load without graphs", partial(self._load, enforce_eager=True))
            for batch in self.batches:
                self._put(f"decode {batch} x {self.contexts[0]} eager", partial(self._decode, batch, self.contexts[0]))
        finally:
            if hasattr(self, "runner"):
                self.runner.close()

    def _captured(self) -> dict[str, Measure]:
        """Figures by name; a name that comes twice keeps its first place."""

        def figures(kind: str, text: str, measure: Callable[..., Figure], sizes: Iterable[Sequence[int]]) -> Figures:
            return [(f"{kind} {text.format(*size)}", partial(measure, *size)) for size in sizes]

        first, largest = self.contexts[0], max(self.batches)
        decodes = partial(figures, "decode", "{} x {} graphs", self._decode)
        throughput = partial(figures, "throughput", "{} x {}/{}", self._throughput)
        idle = partial(figures, "idle", "{} x {}", self._idle)
        return dict([
            *decodes([(1, first)]), *throughput(self.workloads[:1]), *idle([(largest, first)]),
            *decodes([(batch, context) for context in self.contexts for batch in self.batches]),
            *figures("prefill", "{} x {} of {}", self._prefill, self.prefills),
            *throughput(self.workloads[1:]), *idle([(1, first)]),
        ])  # fmt: skip

    def _put(self, figure: str, measure: Measure) -> None:
        """Keep a figure, or how it failed. Raises OutOfTime."""
        self.budget.require(10, f"{self.name}: {figure}")
        found = self.report.attempt(self.name, figure, measure)
        self.report.say(f"   {self.name}: {figure}: {found.get('error') or json.dumps(_short(found))}")

    def _load(self, *, enforce_eager: bool) -> dict[str, Any]:
        started = time.perf_counter()
        device = str(self.timer.device)
        settings = {**self.settings, "enforce_eager": enforce_eager}
        self.runner = load_shape(self.config, device, max(self.batches), **settings)
        self.timer.synchronize()
        self.resolved = self.runner.resolved
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "kv_blocks": self.resolved.num_blocks, "dtype": self.resolved.dtype}

    def _decode(self, batch: int, context: int) -> dict[str, Any]:
        """Milliseconds per step of ``batch`` rows at this context, one step ahead as the engine runs them."""
        step_s = self._seconds_per_step(repeatable_step(self.runner, batch, 1, context))
        moved = self.cost.decode_bytes(batch, context) / step_s
        found = {"step_ms": step_s * 1e3, "tokens_s": batch / step_s, "gb_s": moved / 1e9}
        if ceilings := self.report.ceilings:
            found["of_copy"] = moved / ceilings[0]
            found["of_floor"] = self.cost.decode_floor_s(batch, context, *ceilings) / step_s
        return found

    def _prefill(self, rows: int, queries: int, context: int) -> dict[str, Any]:
        """Tokens per second of steps that compute the last ``queries`` tokens of each row."""
        step_s = self._seconds_per_step(repeatable_step(self.runner, rows, queries, context))
        rate = self.cost.prefill_flops(rows, queries, context) / step_s
        found = {"step_ms": step_s * 1e3, "tokens_s": rows * queries / step_s, "tflop_s": rate / 1e12}
        if ceilings := self.report.ceilings:
            found["of_gemm"] = rate / ceilings[1]
        return found

    def _seconds_per_step(self, plan: SchedulerOutput) -> float:
        self._pipeline(plan, 5)
        once = self._pipeline(plan, 5) / 5
        steps = max(5, min(200, int(0.5 / max(once, 1e-6))))
        return self._pipeline(plan, steps) / steps

    def _pipeline(self, plan: SchedulerOutput, steps: int) -> float:
        """Seconds of so many steps, each submitted before the one before is waited for."""
        self.timer.synchronize()
        started = time.perf_counter()
        handle = self.runner.submit(plan)
        for _ in range(steps - 1):
            following = self.runner.submit(plan)
            self.runner.wait(handle)
            handle = following
        self.runner.wait(handle)
        return time.perf_counter() - started

    def _throughput(self, requests: int, prompt_len: int, output_len: int) -> dict[str, Any]:
        """All requests at once through scheduler and engine core, greedy, without an end token."""
        timed = TimedRunner(self.runner)
        core = build_core(self.resolved, timed, "benchmark")
        rng, vocab = random.Random(1), self.resolved.model.vocab_size
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=output_len)
        for index in range(requests):
            prompt = [rng.randrange(vocab) for _ in range(prompt_len)]
            core.handle(GenerateRequest(index, prompt, params, arrival=time.monotonic()))
        tokens = decode_steps = 0
        decode_s = decode_wait_s = 0.0
        started = time.perf_counter()
        while core.has_work:
            before, waited = time.perf_counter(), timed.wait_s
            outputs = core.step().outputs
            arrived = sum(len(output.token_ids) for output in outputs)
            failed = next((output.error for output in outputs if output.error is not None), None)
            if failed is not None:
                raise RuntimeError(failed.message)
            tokens += arrived
            if arrived == requests:
                decode_steps += 1
                decode_s += time.perf_counter() - before
                decode_wait_s += timed.wait_s - waited
        seconds = time.perf_counter() - started
        if tokens != requests * output_len:
            raise RuntimeError(f"{tokens} tokens instead of {requests * output_len}")
        found = {
            "tokens_s": tokens / seconds,
            "total_tokens_s": requests * (prompt_len + output_len) / seconds,
            "seconds": seconds,
            "steps": timed.steps,
            "preemptions": core.scheduler.stats().preemptions,
        }
        if decode_steps:
            found["decode_step_ms"] = decode_s / decode_steps * 1e3
            found["cpu_ms_per_step"] = (decode_s - decode_wait_s) / decode_steps * 1e3
        return found

    def _idle(self, batch: int, context: int) -> dict[str, Any]:
        """Share of the time in which no kernel runs, from torch's profiler over some decode steps."""
        if self.timer.device.type != "cuda":
            return {"idle": None, "why": "no GPU"}
        plan, steps = repeatable_step(self.runner, batch, 1, context), 20
        self._pipeline(plan, 5)
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            seconds = self._pipeline(plan, steps)
            self.timer.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(file))
            events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
        return {"step_ms": seconds / steps * 1e3, **profile_figures(events, steps)}


def _short(found: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a figure, for one line."""
    return {key: float(f"{value:.4g}") for key, value in found.items() if isinstance(value, (int, float))}
