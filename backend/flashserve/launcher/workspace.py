"""The temporary folder of a run: the backends that tritonserver loads, and the models given by --model."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from flashserve.launcher import shell_words
from flashserve.launcher.discover import TritonInstall
from flashserve.launcher.errors import LauncherError
from flashserve.launcher.reaper import NOTES_FOLDER
from flashserve.launcher.repository import BACKEND_NAME, REMOTE, NamedModel
from flashserve.stub_processes import STUB_NAME

DEFAULT_BACKEND_MODULE = "flashserve.frontend.lifecycle"
OUR_PACKAGES = ("flashserve", "flashserve_kernels")
# Where a run's folder may be if the one for temporary files will not do: the stub is started from it.
OTHER_FOLDERS = ("/tmp", "/var/tmp")
TMPDIR_ADVICE = "set TMPDIR to a folder of yours with a plain name, on a file system that is not mounted noexec"


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

    @property
    def programs(self) -> Path:
        """Comes first on PATH."""
        return self.folder / "bin"

    @property
    def load_notes(self) -> Path:
        """What stubs note of their models' loads, and files that clients gave."""
        return self.folder / NOTES_FOLDER

    @property
    def repositories(self) -> Path:
        """Links to model repositories whose own paths no shell would take as they are."""
        return self.folder / "repositories"


def create() -> Workspace:
    """Make an empty folder with a name that is unique on this machine. Raises LauncherError if there is no place."""
    run_id = f"flashserve-{os.getpid()}-{secrets.token_hex(4)}"
    workspace = Workspace(run_id, Path(tempfile.mkdtemp(prefix=f"{run_id}-", dir=_place())))
    workspace.load_notes.mkdir()
    return workspace


def _place() -> str:
    try:
        preferred = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise LauncherError(f"no folder for temporary files: {error}", TMPDIR_ADVICE) from None
    problems = {folder: _unfit(folder) for folder in dict.fromkeys((preferred, *OTHER_FOLDERS))}
    for folder, problem in problems.items():
        if problem is None:
            return folder
    reasons = "; ".join(f"{folder} {problem}" for folder, problem in problems.items())
    raise LauncherError(f"no folder that programs can be started from: {reasons}", TMPDIR_ADVICE)


def _unfit(folder: str) -> str | None:
    """Why Triton's stub cannot be started from there."""
    if not shell_words.is_plain(folder):
        return "has a name that a shell would not take as it is"
    if not os.access(folder, os.W_OK | os.X_OK):
        return "cannot be written to"
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        return "is mounted noexec"
    return None


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


def add_repositories(workspace: Workspace, repositories: Sequence[str]) -> list[str]:
    """The paths to give tritonserver: a folder whose path a shell would not take as it is gets a link with a name that
    it does. Triton hands the path to a shell when it starts a stub, and does not look where a link leads."""
    workspace.repositories.mkdir()
    paths = []
    for number, repository in enumerate(repositories):
        path = repository
        if not REMOTE.match(repository) and not shell_words.is_plain(repository):
            link = workspace.repositories / str(number)
            link.symlink_to(repository)
            path = str(link)
        paths.append(path)
    return paths


def add_shell_guard(workspace: Workspace) -> None:
    """A ``bash`` for Triton, which lets no name through that came after the start: by a client or into a repository."""
    workspace.programs.mkdir()
    bash = shutil.which("bash")
    if bash is not None:  # without one Triton starts no stub at all
        guard = workspace.programs / "bash"
        guard.write_text(shell_words.guard_script(bash, STUB_NAME), encoding="utf-8")
        guard.chmod(0o700)
