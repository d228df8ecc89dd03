"""A private copy of the suite with a Triton around it, and the promise that nothing of a run is left."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from flashserve.launcher import discover, process, reaper, workspace
from flashserve.launcher.ports import Endpoints

HERE = Path(__file__).resolve().parent
HOST = "127.0.0.1"
# The suite's clients and scripts name these.
PORTS = Endpoints(HOST, http=8000, grpc=8001, metrics=8002)
SHOWN_CHARACTERS = 100
BACKENDS = ("flashserve", "vllm")
SUITE_MODEL = "facebook/opt-125m"
# What a developer's shell may hold and the scripts would take for theirs.
SCRIPT_VARIABLES = ("SERVER_IPADDR", "SERVER_LOG", "SERVER_ARGS", "SERVER_TIMEOUT", "SERVER_LD_PRELOAD", "LD_PRELOAD")


class Sandbox:
    """A folder with the suite's ``ci`` and ``samples``, a TRITON_DIR, and an environment for the scripts.

    Every process that a script starts carries the run's mark in its environment; leaving the block ends those that
    still live, removes their shared memory, and removes the folder. If this process is killed, a reaper does it.
    """

    def __init__(self, checkout: Path, model: Path, simulate_failure: bool = False) -> None:
        self._install = discover.require_triton()
        self._space = workspace.create()
        self.folder = self._space.folder
        self._reaper = subprocess.Popen(
            [sys.executable, "-I", "-S", str(reaper.__file__), self._space.run_id, str(self.folder)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        for name in ("ci", "samples"):
            shutil.copytree(checkout / name, self.folder / name)
        self.results = self.folder / "results.jsonl"
        self._vllm = self.folder / "vllm"
        self._repository = self.folder / "samples" / "model_repository"
        self._place_model(model)
        workspace.add_backends(self._space, self._install, workspace.DEFAULT_BACKEND_MODULE, BACKENDS)
        if simulate_failure:
            self._simulate_failure()
        self._server = self.folder / "bin" / "tritonserver"
        self._write_server()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._reaper.communicate()  # closes its input, which it takes for this process' end, and waits

    def _place_model(self, model: Path) -> None:
        """Under the suite's name for it, relative to the version folder: model.json stays as it is."""
        link = self._repository / "vllm_model" / "1" / SUITE_MODEL
        link.parent.mkdir(parents=True)
        link.symlink_to(model)

    def _simulate_failure(self) -> None:
        engine = self._vllm / "v1" / "engine" / "async_llm.py"
        engine.parent.mkdir(parents=True)
        engine.write_text("class StandsForTheEngineOfVllm:\n    pass\n", encoding="utf-8")
        with open(self._space.backends / "vllm" / "model.py", "a", encoding="utf-8") as model:
            model.write((HERE / "simulated_failure.py").read_text(encoding="utf-8"))

    def _write_server(self) -> None:
        """``TRITON_DIR/bin/tritonserver``: the real one in the launcher's environment, reachable from here only."""
        inherited = self._script_environment()
        wanted = process.environment(self._install, self._space, PORTS)
        ours = {name: value for name, value in wanted.items() if value != inherited.get(name)}
        arguments = [
            f"--backend-directory={self._space.backends}",
            *(f"--{service}-address={HOST}" for service in ("http", "grpc", "metrics")),
            f"--backend-config=python,shm-region-prefix-name={self._space.run_id}-",
        ]
        lines = [
            "#!/bin/sh",
            *(f"export {name}={shlex.quote(value)}" for name, value in ours.items()),
            f'exec {shlex.join([str(self._install.server), *arguments])} "$@"',
        ]
        self._server.parent.mkdir()
        self._server.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self._server.chmod(0o755)

    def _script_environment(self) -> dict[str, str]:
        env = {name: value for name, value in os.environ.items() if name not in SCRIPT_VARIABLES}
        return env | {
            "TRITON_DIR": str(self.folder),
            "SERVER": str(self._server),
            "TRITONSERVER_IPADDR": "localhost",
            "PATH": ":".join([str(HERE / "shims"), str(Path(sys.executable).parent), env["PATH"]]),
            "PYTHONPATH": str(HERE / "clients"),
            "NO_PROXY": "localhost,127.0.0.1",
            "HF_HUB_OFFLINE": "1",  # a model that is not there is not looked for elsewhere
            "PYTEST_ADDOPTS": "-p pytest_record -p no:cacheprovider",
            "VLLM_SUITE_INSTALL": str(self._vllm),
            "VLLM_SUITE_FILES": str(HERE),
            "VLLM_SUITE_REPOSITORY": str(self._repository),
            "VLLM_SUITE_RESULTS": str(self.results),
            reaper.RUN_VARIABLE: self._space.run_id,
        }

    def run(self, command: Sequence[str], folder: Path, logs: Path, timeout_s: float) -> int | None:
        """Exit code; None if the script did not end in time. Its output goes to stdout.log and stderr.log."""
        with open(logs / "stdout.log", "wb") as stdout, open(logs / "stderr.log", "wb") as stderr:
            script = subprocess.Popen(
                command,
                cwd=folder,
                env=self._script_environment(),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
            try:
                return script.wait(timeout_s)
            except subprocess.TimeoutExpired:
                return None

    def leftovers(self) -> list[str]:
        """The beginnings of the command lines of the run's processes that live now."""
        found = []
        for pid in reaper.run_processes(reaper.Run(self._space.run_id, str(self.folder))):
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
                found.append(" ".join(words)[:SHOWN_CHARACTERS].strip())
        return found
