#!/usr/bin/env python3
"""Runs the tests of Triton's vLLM backend against flashserve, which stands in that backend's place.

    make vllm-suite CHECKOUT=/path/of/vllm_backend         github.com/triton-inference-server/vllm_backend
    make vllm-suite CHECKOUT=… ARGS="--only metrics_test"

The checkout stays as it is, and nothing of it is in this repository. Of a private copy, ``ci/L0_backend_vllm``,
``L0_check_health_vllm`` and ``L0_additional_outputs_vllm`` run as they stand: each folder's ``test.sh`` under
``bash -ex`` starts a real tritonserver on ports 8000 to 8002 and its own clients, with the suite's model repository
(``backend: "vllm"``, the same model.json, the same ``sed`` lines).

What differs:

- The model. SmolLM2-135M-Instruct in float32 lies under the suite's name for its own, and the expected texts, counts
  and reasons that come from a model are replaced by what transformers computes for this one; the differences are
  printed.
- The machine. TRITON_DIR holds the tritonserver that ``flashserve serve`` would start, listening on 127.0.0.1 only;
  ``wget`` and ``pip3`` are stand-ins that use no network; the accuracy test's ``vllm`` is a stand-in that answers with
  transformers (``clients/vllm``).
- ``accuracy_test`` runs a second time with the lines changed that keep it from comparing anything. The health suite's
  failure of vLLM's engine is simulated in ours, by the same means (``simulated_failure.py``).

``suites.py`` says which tests there are, which are expected to fail and why. The exit status is 0 if every one ended
as said there: an expected failure that passes, or fails for another reason, is as wrong as a test that fails.
It takes seven minutes on two cores, and 20 s more when it first converts the weights.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import results
import rewrite
import suites
from reference import Continuation, Reference
from sandbox import HOST, PORTS, Sandbox
from weights import SetupError, model_folder

from flashserve.launcher.errors import LauncherError
from flashserve.launcher.ports import is_free

SOURCE = "github.com/triton-inference-server/vllm_backend"
LEFTOVER_GRACE_S = 3.0  # engines end a moment after the tritonserver for which a script waits


def main() -> int:
    """Exit status: 0 as expected, 1 not, 2 nothing was tried."""
    arguments = _arguments()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    try:
        checkout = _checkout(arguments.checkout)
        chosen = _chosen(arguments.only)
        _require_free_ports()
        model = model_folder()
        complete = lru_cache(Reference(model).continuation)
        arguments.logs.mkdir(parents=True, exist_ok=True)
        rows: list[results.Row] = []
        for suite in chosen:
            rows += _run_suite(suite, checkout, model, complete, arguments.logs)
    except (SetupError, LauncherError) as error:
        print(f"vllm-suite: {error}", file=sys.stderr)
        return 2
    return _report(rows, arguments.logs)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run the tests of Triton's vLLM backend against flashserve.")
    parser.add_argument("checkout", help="a checkout of triton-inference-server/vllm_backend")
    parser.add_argument("--only", action="append", metavar="SUITE", help="this suite; repeatable; default: all")
    parser.add_argument(
        "--logs", type=Path, default=Path("build/vllm-suite"), help="where logs are put (default: %(default)s)"
    )
    return parser.parse_args()


def _checkout(name: str) -> Path:
    folder = Path(name).expanduser().resolve()
    if not name:
        raise SetupError(f"which checkout? make vllm-suite CHECKOUT=/path/of/vllm_backend ({SOURCE})")
    if not (folder / suites.BACKEND).is_dir():
        raise SetupError(f"{folder} is no checkout of {SOURCE}")
    return folder


def _chosen(names: Sequence[str] | None) -> list[suites.Suite]:
    known = {suite.name: suite for suite in suites.SUITES}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise SetupError(f"no suite {', '.join(unknown)}; there are: {'; '.join(known)}")
    return [known[name] for name in names or known]


def _require_free_ports() -> None:
    taken = [port for port in (PORTS.http, PORTS.grpc, PORTS.metrics) if not is_free(HOST, port)]
    if taken:
        raise SetupError(f"the suite's clients use fixed ports, and these are taken: {', '.join(map(str, taken))}")


def _run_suite(
    suite: suites.Suite, checkout: Path, model: Path, complete: Callable[[str], Continuation], logs: Path
) -> list[results.Row]:
    _require_free_ports()
    started = time.monotonic()
    kept = logs / suite.name
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    print(f"=== {suite.name}", flush=True)
    with Sandbox(checkout, model, suite.simulates_failure) as sandbox:
        folder = sandbox.folder / suite.folder
        for file, changes in suite.values.items():
            print(rewrite.rewrite(folder / file, changes, complete))
        for edit in suite.edits:
            _edit(folder / edit.file, edit)
        exit_code = sandbox.run(["bash", "-ex", "test.sh"], folder, kept, suite.timeout_s)
        run = results.ScriptRun(
            exit_code,
            (kept / "stdout.log").read_text(encoding="utf-8", errors="replace"),
            results.read_outcomes(sandbox.results),
            _leftovers(sandbox),
        )
        for log in [*folder.glob("*.log"), sandbox.results]:
            if log.is_file():
                shutil.copy(log, kept)
    rows = results.judge(suite, run)
    print(f"{results.table(rows)}\n  {time.monotonic() - started:.0f} s\n", flush=True)
    return rows


def _edit(path: Path, edit: suites.Edit) -> None:
    text = path.read_text(encoding="utf-8")
    if edit.old not in text:
        raise SetupError(f"{path.name}: {edit.old!r} is not there; is this another version?")
    path.write_text(text.replace(edit.old, edit.new), encoding="utf-8")
    print(f"{edit.file}: {edit.why}\n- {edit.old}\n+ {edit.new}")


def _leftovers(sandbox: Sandbox) -> tuple[str, ...]:
    """What still runs when everything had its time to end."""
    deadline = time.monotonic() + LEFTOVER_GRACE_S
    while (found := sandbox.leftovers()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return tuple(found)


def _report(rows: Sequence[results.Row], logs: Path) -> int:
    print("=== all\n" + results.table(rows))
    for folder, reason in suites.NOT_RUN.items():
        print(f"  {folder}: not run: {reason}")
    wrong = [row for row in rows if not row.as_expected]
    passed = sum(row.outcome == "passed" for row in rows)
    expected = sum(row.as_expected and row.outcome != "passed" for row in rows)
    print(f"\n{passed} passed, {expected} failed as expected, {len(wrong)} not as expected (!); logs: {logs}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
