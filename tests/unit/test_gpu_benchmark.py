"""What benchmarks/gpu makes of its figures, without a GPU and without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common import shapes, tables
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import report as gpu_report
from benchmarks.gpu.report import TARGETS, Budget, OutOfTime, Report, Target

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def report(tmp_path):
    return Report(tmp_path / "gpu" / "result.json", {"device": "H200"}, say=lambda _: None)


def written(report: Report) -> dict:
    return json.loads(report.file.read_text())["sections"]


def test_every_figure_is_written_at_once_and_another_process_goes_on(report):
    report.put("kernels", "rms_norm", {"us": 12.3456789, "gb_s": float("nan")})
    assert written(report) == {"kernels": {"rms_norm": {"us": 12.35, "gb_s": "nan"}}}
    resumed = Report.resume(report.file, say=lambda _: None)
    assert resumed.ceilings is None
    resumed.put("ceilings", "copy_bytes_s", 4.3e12)
    resumed.put("ceilings", "gemm_flop_s", 7e14)
    assert set(written(report)) == {"kernels", "ceilings"} and resumed.ceilings == (4.3e12, 7e14)
    assert [file.name for file in report.file.parent.iterdir()] == ["result.json"]


def test_a_section_that_fails_is_reported_and_ends_nothing(report):
    def section() -> None:
        report.put("a", "first", 1.0)
        raise RuntimeError("CUDA error: an illegal memory access\nmore words")

    report.run("a", section)
    report.run("b", lambda: report.put("b", "second", 2.0))
    sections = written(report)
    assert sections["a"]["first"] == 1.0 and sections["b"]["second"] == 2.0
    assert sections["a"]["failure"]["error"] == "RuntimeError: CUDA error: an illegal memory access more words"
    assert any("in section" in line for line in sections["a"]["failure"]["traceback"])


def test_what_the_budget_does_not_hold_is_left_out(report):
    now = [0.0]
    budget = Budget(100, clock=lambda: now[0])
    budget.require(100, "everything")
    now[0] = 95.0
    with pytest.raises(OutOfTime, match=r"decode takes about 10 s and 5 s are left"):
        budget.require(10, "decode")
    report.run("model", lambda: budget.require(10, "decode"))
    assert "decode takes" in written(report)["model"]["skipped"]


def test_a_process_whose_device_broke_is_followed_by_another(report, monkeypatch):
    commands: list[list[str]] = []
    monkeypatch.setattr(gpu.os, "execv", lambda program, command: commands.append(command))
    args = gpu.parse_arguments(["--tiny", "--dtype", "float16"])
    gpu.go_on(args, report, ["kernels", "qwen3-8b"], Budget(100))
    gpu.go_on(args, report, [], Budget(100))
    [command] = commands
    again = gpu.parse_arguments(command[3:])
    assert again.sections == ["kernels", "qwen3-8b"] and again.resume == report.file and again.tiny
    assert again.dtype == "float16" and 99 < again.budget_s <= 100


def test_what_a_step_of_the_8b_shape_costs():
    pairs = sum(position + 1 for position in range(90, 100))
    assert shapes.causal_flops(10, 100, heads=3, head_dim=64) == 4 * 3 * 64 * pairs
    cost = shapes.ModelCost.of(shapes.SHAPES["qwen3-8b"])
    # 8.19e9 parameters less the input's table; the cache takes 147,456 bytes per token.
    assert cost.decode_bytes(1, 0) == pytest.approx(15.1e9, rel=0.01)
    assert cost.decode_bytes(64, 4096) - cost.decode_bytes(1, 0) == 64 * 4096 * 147456
    assert cost.decode_floor_s(1, 0, 4.3e12, 790e12) == cost.decode_bytes(1, 0) / 4.3e12
    assert cost.decode_floor_s(2048, 0, 4.3e12, 790e12) == cost.decode_flops(2048, 0) / 790e12
    assert cost.prefill_flops(1, 8192, 8192) == pytest.approx(2 * cost.linear_params * 8192 * 1.165, rel=0.01)


def test_a_profile_counts_kernels_alone():
    events = [
        {"cat": "kernel", "name": "gemm", "ts": 0.0, "dur": 60.0},
        {"cat": "kernel", "name": "another stream", "ts": 30.0, "dur": 20.0},
        {"cat": "kernel", "name": "norm", "ts": 80.0, "dur": 20.0},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": 60.0, "dur": 20.0},
        {"cat": "cpu_op", "name": "aten::mm", "ts": 0.0, "dur": 500.0},
    ]
    found = gpu_report.profile_figures(events, steps=2)
    assert found["idle"] == pytest.approx(0.2) and found["kernels_per_step"] == 1.5
    assert found["longest"]["gemm"] == {"us_per_step": 30.0, "of_all": 0.6}
    assert gpu_report.profile_figures([], steps=2)["idle"] is None


def test_tables():
    lines = tables.keyed([{"what": "a", "us": 12345.6, "of_ceiling": 0.857}, {"what": "long name", "gb_s": 0.1234}])
    assert lines == [
        "| what      | us    | of_ceiling | gb_s  |",
        "|-----------|-------|------------|-------|",
        "| a         | 12346 | 85.7%      | -     |",
        "| long name | -     | -          | 0.123 |",
    ]


def test_targets_are_met_missed_or_not_measured(report):
    assert {target.section for target in TARGETS} <= set(gpu.SECTIONS)
    more = Target("speed", "s", "figure", "rate", 0.85)
    less = Target("idle", "s", "figure", "idle", 0.05, at_least=False)
    assert more.line(report).split() == ["not", "measured", "speed"]
    report.put("s", "figure", {"rate": 0.9, "idle": 0.06})
    assert more.line(report).split() == ["met", "0.9", "≥", "0.85", "speed"]
    assert less.line(report).split() == ["MISSED", "0.06", "≤", "0.05", "idle"]


def test_the_pure_parts_import_neither_torch_nor_the_engine():
    # Nor do the peers' process and its shapes, which come without this project's packages on the path.
    code = (
        "import sys, benchmarks.gpu.__main__, benchmarks.gpu.peers, benchmarks.batching.report\n"
        "sys.exit(bool({'torch', 'flashserve'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_tiny_run_on_a_cpu_measures_everything_it_names(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    sections = ["ceilings", "smollm2-135m", "transformers"]
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--output", str(tmp_path)]
    done = subprocess.run([*command, "--sections", *sections], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    [file] = (tmp_path / "cpu").iterdir()
    found = json.loads(file.read_text())["sections"]
    assert list(found) == sections
    assert not [name for name, figures in found.items() if {"failure", "skipped"} & set(figures)]
    shape = found["smollm2-135m"]
    assert not [name for name, figure in shape.items() if isinstance(figure, dict) and "traceback" in figure]
    assert shape["throughput 4 x 16/8"]["tokens_s"] > 0 and shape["decode 1 x 32 graphs"]["of_floor"] > 0
    assert shape["decode 4 x 32 eager"]["step_ms"] > 0 and shape["prefill 1 x 64 of 64"]["tokens_s"] > 0
