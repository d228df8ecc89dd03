"""What benchmarks/gpu makes of its figures, without a GPU and without torch."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.common import shapes, tables
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import report as gpu_report
from benchmarks.gpu.report import TARGETS, Budget, OutOfTime, Report, Target

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def report(tmp_path):
    lines: list[str] = []
    made = Report(tmp_path / "gpu" / "result.json", {"device": "H200"}, say=lines.append)
    made.lines = lines
    return made


def written(report: Report) -> dict:
    return json.loads(report.file.read_text())


def test_every_figure_is_written_at_once(report):
    report.put("kernels", "rms_norm", {"us": 12.3456789, "correct": True})
    assert written(report) == {
        "device": "H200",
        "sections": {"kernels": {"rms_norm": {"us": 12.35, "correct": True}}},
    }
    report.put("kernels", "broken", {"us": float("nan"), "gb_s": float("inf")})
    assert written(report)["sections"]["kernels"]["broken"] == {"us": "nan", "gb_s": "inf"}
    assert [file.name for file in report.file.parent.iterdir()] == ["result.json"]


def test_a_section_that_fails_is_reported_and_ends_nothing(report):
    def section() -> None:
        report.put("a", "first", 1.0)
        raise RuntimeError("CUDA error: an illegal memory access\nmore words")

    report.run("a", section)
    report.run("b", lambda: report.put("b", "second", 2.0))
    sections = written(report)["sections"]
    assert sections["a"]["first"] == 1.0 and sections["b"]["second"] == 2.0
    assert sections["a"]["failure"]["error"] == "RuntimeError: CUDA error: an illegal memory access"
    assert any("in section" in line for line in sections["a"]["failure"]["traceback"])
    assert len(sections["a"]["failure"]["traceback"]) <= gpu_report.TRACEBACK_LINES
    assert "seconds" in sections["a"] and "failure" not in sections["b"]


def test_what_the_budget_does_not_hold_is_left_out(report):
    now = [0.0]
    budget = Budget(100, clock=lambda: now[0])
    budget.require(100, "everything")
    now[0] = 95.0
    assert budget.left_s == 5.0
    with pytest.raises(OutOfTime, match=r"decode takes about 10 s and 5 s are left"):
        budget.require(10, "decode")
    report.run("model", lambda: budget.require(10, "decode"))
    assert "decode takes" in written(report)["sections"]["model"]["skipped"]


def test_another_process_goes_on_with_the_report(report):
    report.put("ceilings", "copy_bytes_s", 4.3e12)
    resumed = Report.resume(report.file, say=lambda _: None)
    resumed.put("attention", "decode", {"us": 1.0})
    assert written(report)["sections"] == {
        "ceilings": {"copy_bytes_s": 4.3e12},
        "attention": {"decode": {"us": 1.0}},
    }
    assert resumed.get("ceilings", "copy_bytes_s") == 4.3e12
    assert resumed.get("ceilings", "other") is None and resumed.get("other", "other") is None


def test_the_file_is_named_by_gpu_and_date():
    date = time.struct_time((2026, 11, 21, 9, 8, 7, 0, 0, 0))
    file = gpu_report.result_file(Path("results"), "NVIDIA H200", date)
    assert file == Path("results/nvidia-h200/20261121-090807.json")


def test_rates_and_their_share_of_the_ceilings():
    memory = gpu_report.speed(250e-6, 4e12, bytes_=0.9e9)
    assert memory == pytest.approx({"us": 250, "gb_s": 3600, "of_ceiling": 0.9})
    arithmetic = gpu_report.speed(1e-3, 800e12, flops=5e11)
    assert arithmetic == pytest.approx({"us": 1000, "tflop_s": 500, "of_ceiling": 0.625})
    assert "of_ceiling" not in gpu_report.speed(1e-3, None, flops=5e11)


def test_flops_of_causal_attention_count_what_each_query_sees():
    pairs = sum(position + 1 for position in range(90, 100))
    assert shapes.causal_flops(10, 100, heads=3, head_dim=64) == 4 * 3 * 64 * pairs
    # Whole prompts: half of the square, plus the diagonal.
    assert shapes.causal_flops(8192, 8192, 32, 128) == pytest.approx(2 * 32 * 128 * 8192 * 8193)


def test_what_a_step_of_the_8b_shape_costs():
    cost = shapes.ModelCost.of(shapes.SHAPES["qwen3-8b"])
    attention = 4096 * 128 * (32 + 16) + 32 * 128 * 4096
    assert cost.linear_params == 36 * (attention + 3 * 4096 * 12288)
    assert cost.head_params == 151936 * 4096
    # 8.19e9 parameters less the input's table; the cache takes 147,456 bytes per token.
    assert cost.decode_bytes(1, 0) == pytest.approx(15.1e9, rel=0.01)
    assert cost.decode_bytes(64, 4096) - cost.decode_bytes(1, 0) == 64 * 4096 * 147456
    assert cost.decode_floor_s(1, 0, 4.3e12, 790e12) == cost.decode_bytes(1, 0) / 4.3e12
    assert cost.decode_floor_s(2048, 0, 4.3e12, 790e12) == cost.decode_flops(2048, 0) / 790e12
    assert cost.prefill_flops(1, 8192, 8192) == pytest.approx(2 * cost.linear_params * 8192 * 1.165, rel=0.01)


def test_share_of_the_time_in_which_something_runs():
    assert gpu_report.busy_share([]) == 0.0
    assert gpu_report.busy_share([(0, 10)]) == 1.0
    # Two streams at once count once; 10 to 15 and 20 to 25 are idle.
    assert gpu_report.busy_share([(15, 20), (0, 10), (5, 8), (25, 30), (2, 10)]) == pytest.approx(20 / 30)


def test_a_profile_counts_kernels_alone():
    events = [
        {"cat": "kernel", "name": "gemm", "ts": 0.0, "dur": 60.0},
        {"cat": "kernel", "name": "norm", "ts": 80.0, "dur": 20.0},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": 60.0, "dur": 20.0},
        {"cat": "cpu_op", "name": "aten::mm", "ts": 0.0, "dur": 500.0},
    ]
    found = gpu_report.profile_figures(events, steps=2)
    assert found["idle"] == pytest.approx(0.2) and found["kernels_per_step"] == 1.0
    assert found["longest"]["gemm"] == {"us_per_step": 30.0, "of_all": 0.75}
    assert gpu_report.profile_figures([], steps=2)["idle"] is None


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


def test_tables():
    lines = tables.keyed([{"what": "a", "us": 12345.6, "of_ceiling": 0.857}, {"what": "long name", "gb_s": 0.1234}])
    assert lines == [
        "| what      | us    | of_ceiling | gb_s  |",
        "|-----------|-------|------------|-------|",
        "| a         | 12346 | 85.7%      | -     |",
        "| long name | -     | -          | 0.123 |",
    ]


def test_targets_are_met_missed_or_not_measured(report):
    more = Target("speed", "s", "figure", "rate", 0.85)
    less = Target("idle", "s", "figure", "idle", 0.05, at_least=False)
    assert more.line(report).split() == ["not", "measured", "speed"]
    report.put("s", "figure", {"rate": 0.9, "idle": 0.06})
    assert more.line(report).split() == ["met", "0.9", "≥", "0.85", "speed"]
    assert less.line(report).split() == ["MISSED", "0.06", "≤", "0.05", "idle"]
    report.put("s", "figure", {"error": "RuntimeError: x", "traceback": []})
    assert "not measured" in more.line(report)


def test_targets_name_sections_that_exist():
    assert {target.section for target in TARGETS} <= set(gpu.SECTIONS)


def test_arguments():
    assert gpu.parse_arguments([]).sections == list(gpu.SECTIONS)
    assert gpu.parse_arguments([]).budget_s <= 480
    assert gpu.parse_arguments(["--sections", "attention", "ceilings"]).sections == ["attention", "ceilings"]
    with pytest.raises(SystemExit):
        gpu.parse_arguments(["--sections", "nothing"])


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
