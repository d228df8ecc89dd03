"""Whole models of known shapes with random weights, made on the device: steps, prefill, throughput, idle time."""

from __future__ import annotations

import json
import logging
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from flashserve.scheduling.output import Admission, ScheduledRow, SchedulerOutput, StepResult
from flashserve_kernels import Ops

MAX_MODEL_LEN = 8192 + 64
KV_SHARE = 0.4  # of the free memory: the eager and the captured steps have a cache each, one after the other
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


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


@contextmanager
def late_compiles() -> Iterator[list[str]]:
    """The warnings of the watch over late compilation that come inside."""
    messages: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if "late compilation" in record.getMessage():
            messages.append(record.getMessage()[:300])
        return True

    logger = logging.getLogger("flashserve_kernels.gpu.launch")
    logger.addFilter(keep)
    try:
        yield messages
    finally:
        logger.removeFilter(keep)


def load_shape(config: dict[str, Any], device_name: str, max_num_seqs: int, **settings: Any) -> ModelRunner:
    """A model of this shape, with KV blocks for KV_SHARE of the memory that its weights leave free."""
    files, device = RandomFiles(config), open_device(device_name)
    _, model_class = find_architecture(config)
    with device.loading():
        free_bytes = device.read_facts().free_bytes - 2 * files.num_elements(())
        defaults: dict[str, Any] = {
            "device": device_name,
            "max_model_len": min(MAX_MODEL_LEN, model_class.read_shape(config).context_len),
            "max_num_seqs": max_num_seqs,
            "enable_prefix_caching": False,
            "kv_cache_memory_bytes": int(free_bytes * KV_SHARE),
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
            self._put("load", lambda: self._load(enforce_eager=False))
            if "traceback" in self.report.get(self.name, "load"):
                return
            with late_compiles() as late:
                self._run_captured()
                self.report.put(self.name, "late compilations", list(late))
            self.runner.close()
            self._put("load without graphs", lambda: self._load(enforce_eager=True))
            for context in self.contexts[:1]:
                for batch in self.batches:
                    self._put(f"decode {batch} x {context} eager", self._decode, batch, context)
        finally:
            if hasattr(self, "runner"):
                self.runner.close()

    def _run_captured(self) -> None:
        self._put(f"decode 1 x {self.contexts[0]} graphs", self._decode, 1, self.contexts[0])
        largest = max(self.batches)
        for workload in self.workloads[:1]:
            self._put("throughput {} x {}/{}".format(*workload), self._throughput, *workload)
        self._put(f"idle {largest} x {self.contexts[0]}", self._idle, largest, self.contexts[0])
        for context in self.contexts:
            for batch in self.batches:
                if self.report.get(self.name, f"decode {batch} x {context} graphs") is None:
                    self._put(f"decode {batch} x {context} graphs", self._decode, batch, context)
        for prefill in self.prefills:
            self._put("prefill {} x {} of {}".format(*prefill), self._prefill, *prefill)
        for workload in self.workloads[1:]:
            self._put("throughput {} x {}/{}".format(*workload), self._throughput, *workload)
        self._put("idle 1 x " + str(self.contexts[0]), self._idle, 1, self.contexts[0])

    def _put(self, figure: str, measure: Callable[..., dict[str, Any]], *args: Any) -> None:
        """Keep a figure, or how it failed. Raises OutOfTime."""
        self.budget.require(10, f"{self.name}: {figure}")
        found = self.report.attempt(self.name, figure, lambda: measure(*args))
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
        step_s = self._seconds_per_step(self._decode_plan(batch, context))
        bandwidth, flops = (self.report.get("ceilings", name) for name in ("copy_bytes_s", "gemm_flop_s"))
        found = {"step_ms": step_s * 1e3, "tokens_s": batch / step_s}
        found["gb_s"] = self.cost.decode_bytes(batch, context) / step_s / 1e9
        if bandwidth and flops:
            found["of_copy"] = self.cost.decode_bytes(batch, context) / step_s / bandwidth
            found["of_floor"] = self.cost.decode_floor_s(batch, context, bandwidth, flops) / step_s
        return found

    def _prefill(self, rows: int, queries: int, context: int) -> dict[str, Any]:
        """Tokens per second of steps that compute the last ``queries`` tokens of each row."""
        plan = self._plan(rows, context, queries)
        step_s = self._seconds_per_step(plan)
        found = {"step_ms": step_s * 1e3, "tokens_s": rows * queries / step_s}
        rate = self.cost.prefill_flops(rows, queries, context) / step_s
        found["tflop_s"] = rate / 1e12
        if ceiling := self.report.get("ceilings", "gemm_flop_s"):
            found["of_gemm"] = rate / ceiling
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

    def _decode_plan(self, batch: int, context: int) -> SchedulerOutput:
        return self._plan(batch, context, 1)

    def _plan(self, rows: int, context: int, queries: int) -> SchedulerOutput:
        """A step that can be repeated: the last ``queries`` tokens of rows of ``context`` tokens.

        The rows' blocks are admitted with a step of their own first. Where the cache is smaller than all rows, blocks
        far apart are shared: it is many times the L2, so they come from memory all the same.
        """
        wanted = -(-context // self.resolved.block_size)
        num_blocks, rng = self.resolved.num_blocks, random.Random(0)
        order = rng.sample(range(num_blocks), num_blocks)
        vocab = self.resolved.model.vocab_size

        def row(index: int, blocks: list[int]) -> ScheduledRow:
            tokens = [rng.randrange(vocab) for _ in range(queries)] if queries > 1 else []
            return ScheduledRow(index, index, context - queries, queries, tokens, blocks, 1)

        tables = [[order[(index * wanted + i) % num_blocks] for i in range(wanted)] for index in range(rows)]
        admissions = [Admission(index, index, GREEDY, 0, context, ()) for index in range(rows)]
        first = [row(index, table) for index, table in enumerate(tables)]
        self.runner.wait(self.runner.submit(SchedulerOutput(0, admissions, first, rows * queries, [])))
        return SchedulerOutput(1, [], [row(index, []) for index in range(rows)], rows * queries, [])

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
        plan, steps = self._decode_plan(batch, context), 20
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
