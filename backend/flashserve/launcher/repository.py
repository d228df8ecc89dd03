"""Which models there are: repositories on disk, and those named by --model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flashserve.config import EngineConfig
from flashserve.errors import ConfigError
from flashserve.launcher.errors import LauncherError
from flashserve.model_location import PACKAGE, find, locate, name_of

REMOTE = re.compile(r"^(s3|gs|as)://")
BACKEND_NAME = "flashserve"
VLLM_NAME = "vllm"
"""Triton's vLLM backend, whose model folders are laid out as ours."""
OUR_BACKENDS = (BACKEND_NAME, VLLM_NAME)
PYTHON_BACKENDS = (*OUR_BACKENDS, "python")
"""Those whose models run in stubs of Triton's Python backend."""
BACKEND_FIELD = re.compile(
    r"""^[^#\n]*?\b(?P<field>backend\s*:\s*(?P<quote>["'])(?P<name>.*?)(?P=quote))""", re.MULTILINE
)


CHAT_MODEL, DEMO_MODEL = "smollm2", "demo"
"""Those of the source checkout: one that talks, whose weights a Python package brings, and one for machines without
that package, which has seen nothing but Python."""


@dataclass(frozen=True)
class NamedModel:
    """A model given on the command line."""

    name: str
    """What clients call it."""
    source: str
    """An absolute path of a folder or a GGUF file, ``package:…``, or a Hugging Face id."""


@dataclass(frozen=True)
class RepositoryModel:
    """A model folder of a repository."""

    name: str
    folder: Path
    backend: str
    problem: str | None = None
    """Why flashserve cannot load it, as far as files tell."""
    backend_line: int = 0
    """The line of its config.pbtxt that names the backend, from 1; 0 if there is none."""


def default_repository() -> Path | None:
    """The ``model_repository`` of the source checkout that this package runs from."""
    folder = Path(__file__).resolve().parents[3] / "model_repository"
    return folder if folder.is_dir() else None


def parse_model(argument: str) -> NamedModel:
    """``MODEL`` or ``NAME=MODEL``, as ``model`` in model.json. Raises LauncherError."""
    name, separator, source = argument.partition("=")
    if not separator:
        name, source = "", argument
    try:
        found = find(source)  # what a folder holds is for whoever serves it to judge
    except ConfigError as error:
        advice = (
            "give a folder with config.json and *.safetensors, a .gguf file, or a Hugging Face id such as "
            "Qwen/Qwen3-0.6B"
        )
        raise LauncherError(f"--model {argument}: {error}", advice) from error
    name = name or re.sub(r"[^A-Za-z0-9_.-]+", "-", name_of(source if found is None else str(found))).strip("-.")
    if found is not None and not source.startswith(PACKAGE):
        source = str(found)
    if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", name):
        raise LauncherError(f"--model {argument}: {name!r} is no model name", "choose one: --model NAME=PATH_OR_HF_ID")
    return NamedModel(name, source)


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise LauncherError(f"{path}: no home folder is known for ~", "write the path in full, or set HOME") from None


def parse_models(arguments: Sequence[str]) -> list[NamedModel]:
    """All --model arguments; two with one name are an error."""
    models = [parse_model(argument) for argument in arguments]
    _check_unique([model.name for model in models])
    return models


def choose_repositories(repository: str | None, models: Sequence[NamedModel]) -> list[str]:
    """The repositories to serve beside the --model ones. Raises LauncherError."""
    if repository is None and models:
        return []
    if repository is None:
        found = default_repository()
        if found is None:
            raise LauncherError("nothing to serve", "give --model PATH_OR_HF_ID (repeatable) or --model-repository DIR")
        repository = str(found)
    if REMOTE.match(repository):
        return [repository]
    folder = _expanded(repository).resolve()
    if not folder.is_dir():
        raise LauncherError(f"no such folder: --model-repository {repository}")
    present = read_repository(folder)
    if not present:
        raise LauncherError(
            f"{folder} holds no model", "a model is a folder with config.pbtxt and a version folder such as 1/"
        )
    _check_unique([model.name for model in present] + [model.name for model in models])
    return [str(folder)]


def default_load(folder: Path) -> tuple[list[str], str]:
    """Which models of the checkout's own repository are loaded if nobody says: all, but of the two that come with it
    only one. Also what to say where that is the demo model; else empty."""
    models = read_repository(folder)
    problems = {model.name: model.problem for model in models}
    problem = problems.get(CHAT_MODEL, "its folder is gone")
    left_out = DEMO_MODEL if problem is None else CHAT_MODEL
    names = [model.name for model in models if model.name != left_out]
    if problem is None or DEMO_MODEL not in names:
        return names, ""
    return names, f"{CHAT_MODEL} is not served: {problem}; {DEMO_MODEL} is, which can only continue Python"


def read_repository(folder: Path) -> list[RepositoryModel]:
    """The models of a repository on disk, sorted by name."""
    models = []
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and ((entry / "config.pbtxt").is_file() or _versions(entry)):
            backend, line = _backend(entry / "config.pbtxt")
            problem = _problem(entry) if backend in OUR_BACKENDS else None
            models.append(RepositoryModel(entry.name, entry, backend, problem, line))
    return models


def names_with_stubs(repositories: Sequence[str], named: Sequence[NamedModel]) -> list[str]:
    """Models that run in stubs of Triton's Python backend, as far as files of this machine tell."""
    folders = [Path(repository) for repository in repositories if not REMOTE.match(repository)]
    models = [model for folder in folders for model in read_repository(folder)]
    return [model.name for model in models if model.backend in PYTHON_BACKENDS] + [model.name for model in named]


def _versions(model: Path) -> list[Path]:
    found = [entry for entry in model.iterdir() if entry.is_dir() and entry.name.isdigit()]
    return sorted(found, key=lambda entry: int(entry.name))


def _backend(config: Path) -> tuple[str, int]:
    """The backend that a config.pbtxt names, and in which line."""
    if not config.is_file():
        return "", 0
    text = config.read_text(encoding="utf-8", errors="replace")  # one that Triton cannot read must not hide the others
    match = BACKEND_FIELD.search(text)
    return (match["name"], text.count("\n", 0, match.start("field")) + 1) if match else ("", 0)


def _problem(model: Path) -> str | None:
    versions = _versions(model)
    if not versions:
        return "it has no version folder (1/)"
    version = versions[-1]
    try:
        config = EngineConfig.from_file(version / "model.json")
    except ConfigError as error:
        return str(error)
    if config.device.startswith("null"):
        return None
    # One word without a slash is an id of the hub too (gpt2), but here it is nearly always a folder.
    is_path = config.model.startswith((".", "/")) or "/" not in config.model
    if is_path and not config.model.startswith(PACKAGE) and not (version / config.model).exists():
        return f"its weights are missing: {version / config.model}"
    try:
        found = locate(config.model)
    except ConfigError as error:
        return str(error)
    if found is not None and found.is_dir() and not any(found.glob("*.safetensors")):
        return f"{found} holds no *.safetensors"
    return None


def _check_unique(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise LauncherError(f"two models are called {name!r}", "name one: --model OTHER=PATH_OR_HF_ID")
