"""The temporary folder of a run: the backends that tritonserver loads, and the models given by --model."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from flashserve.launcher.discover import TritonInstall
from flashserve.launcher.repository import BACKEND_NAME, NamedModel
from flashserve.stub_processes import STUB_NAME

DEFAULT_BACKEND_MODULE = "flashserve.frontend.lifecycle"
OUR_PACKAGES = ("flashserve", "flashserve_kernels")


@dataclass(frozen=True)
class Workspace:
    """Paths of one run."""

    run_id: str
    """Unique; shared memory names start with it and every process carries it."""
    folder: Path

    @property
    def backends(self) -> Path:
        """For tritonserver's --backend-directory."""
        return self.folder / "backends"

    @property
    def models(self) -> Path:
        """A model repository with the models given by --model."""
        return self.folder / "models"


def create() -> Workspace:
    """Make an empty folder with a name that is unique on this machine."""
    run_id = f"flashserve-{os.getpid()}-{secrets.token_hex(4)}"
    return Workspace(run_id, Path(tempfile.mkdtemp(prefix=f"{run_id}-")))


def package_folders() -> list[str]:
    """The folders on sys.path that hold our packages: in a source checkout they are not in site-packages."""
    folders = []
    for name in OUR_PACKAGES:
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            folders.append(str(Path(next(iter(spec.submodule_search_locations))).resolve().parent))
    return list(dict.fromkeys(folders))


def add_backends(workspace: Workspace, install: TritonInstall, module: str, names: Collection[str]) -> None:
    """Tritonserver's own backends, the Python backend with this interpreter's stub, and ours under each of `names`."""
    workspace.backends.mkdir()
    for backend in sorted(install.backends.iterdir()):
        if backend.is_dir() and backend.name not in ("python", *names):
            (workspace.backends / backend.name).symlink_to(backend)
    python = workspace.backends / "python"
    python.mkdir()
    for file in (install.backends / "python").iterdir():
        # Copied: Triton refuses a backend library that a link leads out of its folder. They are 1.4 MB.
        if file.is_file() and file.name != STUB_NAME:
            shutil.copy(file, python / file.name)
    assert install.stub is not None, "require_triton() has checked the stub"
    shutil.copy(install.stub, python / STUB_NAME)
    for name in names:
        ours = workspace.backends / name
        ours.mkdir()
        (ours / "model.py").write_text(backend_entry(module), encoding="utf-8")


def backend_entry(module: str) -> str:
    """The text of ``backends/flashserve/model.py``."""
    # The stub's interpreter ignores PYTHONPATH (it starts isolated), so the folders are written down here.
    return (
        f"import sys\nsys.path[:0] = {package_folders() + _python_path()!r}\nfrom {module} import TritonPythonModel\n"
    )


def _python_path() -> list[str]:
    return [folder for folder in os.environ.get("PYTHONPATH", "").split(":") if folder]


def add_models(workspace: Workspace, models: Iterable[NamedModel]) -> None:
    """A repository entry for each model given on the command line."""
    workspace.models.mkdir()
    for model in models:
        version = workspace.models / model.name / "1"
        version.mkdir(parents=True)
        (version.parent / "config.pbtxt").write_text(f'backend: "{BACKEND_NAME}"\n', encoding="utf-8")
        (version / "model.json").write_text(json.dumps({"model": model.source}) + "\n", encoding="utf-8")
