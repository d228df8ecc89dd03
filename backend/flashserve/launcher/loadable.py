"""Whether the models that a start will load can be loaded, as far as files tell; said before anything is started."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from flashserve.launcher import repository, shell_words
from flashserve.launcher.discover import TritonInstall
from flashserve.launcher.errors import LauncherError
from flashserve.launcher.repository import BACKEND_NAME, PYTHON_BACKENDS, VLLM_NAME, NamedModel, RepositoryModel
from flashserve.launcher.triton_arguments import ALL, LOAD_MODEL

SERVE_VLLM = "flashserve serve --serve-vllm-models"
VLLM_ADVICE = f'write backend: "{BACKEND_NAME}" there, or have it served as it is: {SERVE_VLLM}'


class VllmServer(Enum):
    """Who serves a model whose config.pbtxt names Triton's vLLM backend."""

    FLASHSERVE = "flashserve, in its place"
    TRITON = "the vLLM backend of this tritonserver"
    NOBODY = "nobody: there is no such backend"


def vllm_server(install: TritonInstall | None, asked: bool) -> VllmServer:
    """``asked``: whether --serve-vllm-models was given, which goes before a vLLM backend that is installed."""
    if asked:
        return VllmServer.FLASHSERVE
    if install is not None and (install.backends / VLLM_NAME).is_dir():
        return VllmServer.TRITON
    return VllmServer.NOBODY


def require_loadable(
    repositories: Sequence[str], named: Sequence[NamedModel], load: Sequence[str], vllm: VllmServer, judge_files: bool
) -> None:
    """Raises LauncherError if a model in ``load`` (names, or ALL) does not exist or cannot be loaded.

    ``judge_files``: whether model.json and weights are flashserve's, and not those of another backend module.
    """
    on_disk = [folder for folder in repositories if not repository.REMOTE.match(folder)]
    models = [model for folder in on_disk for model in repository.read_repository(Path(folder))]
    load_all = tuple(load) == ALL
    if not load_all and len(on_disk) == len(repositories):
        _require_names(load, [*(model.name for model in models), *(model.name for model in named)])
    chosen = [model for model in models if load_all or model.name in load]
    for model in chosen:
        _require_plain_names(model)
    if vllm is VllmServer.NOBODY:
        _refuse_vllm([model for model in chosen if model.backend == VLLM_NAME])
    for model in chosen:
        problem = file_problem(model, vllm)
        if judge_files and problem:
            raise LauncherError(
                f"model {model.name} cannot be loaded: {problem}",
                f"correct {model.folder}/, take the folder out of the repository, "
                f"or load others only: flashserve serve … -- {LOAD_MODEL}=NAME",
            )


def _require_plain_names(model: RepositoryModel) -> None:
    """Of the model and of its instances, whatever its backend is."""
    if not shell_words.is_plain(model.name):
        raise LauncherError(
            f"a model cannot be called {model.name!r}: Triton hands the name to a shell when it starts the model",
            f"rename the folder {str(model.folder)!r}: {shell_words.ADVICE}; "
            f"or load others only: flashserve serve … -- {LOAD_MODEL}=NAME",
        )
    config = model.folder / "config.pbtxt"
    # Without a backend's name Triton looks at the files, and a model.py means Python.
    if model.backend in (*PYTHON_BACKENDS, "") and config.is_file():
        for name in shell_words.special_names(config.read_text(encoding="utf-8", errors="replace")):
            raise LauncherError(
                f"{config} has the name {name!r}, and Triton hands such names to a shell when it starts the model",
                f"choose another: {shell_words.ADVICE}",
            )


def file_problem(model: RepositoryModel, vllm: VllmServer) -> str | None:
    """What is wrong with the files of a model, unless another backend reads them."""
    is_theirs = model.backend == VLLM_NAME and vllm is VllmServer.TRITON
    return None if is_theirs else model.problem


def vllm_line(model: RepositoryModel) -> str:
    """Where a model names the vLLM backend, as ``file:line``."""
    return f"{model.folder / 'config.pbtxt'}:{model.backend_line}"


def says_vllm(model: RepositoryModel) -> str:
    """Where, and what stands there."""
    return f'{vllm_line(model)} says backend: "{VLLM_NAME}"'


def remark(model: RepositoryModel, vllm: VllmServer) -> str:
    """What a list of models says of one; empty if there is nothing to say."""
    problem = file_problem(model, vllm)
    if problem is None and model.backend == VLLM_NAME and vllm is VllmServer.NOBODY:
        return f"{says_vllm(model)}; {SERVE_VLLM}"
    return problem or ""


def _require_names(load: Sequence[str], present: Sequence[str]) -> None:
    for name in load:
        if name not in present:
            raise LauncherError(
                f"{LOAD_MODEL}={name}: there is no such model", f"there are: {', '.join(sorted(present))}"
            )


def _refuse_vllm(models: Sequence[RepositoryModel]) -> None:
    if not models:
        return
    names = ", ".join(model.name for model in models)
    subject = f"model {names} is" if len(models) == 1 else f"models {names} are"
    where = says_vllm(models[0])
    if len(models) > 1:
        where = f'{", ".join(map(vllm_line, models))} say backend: "{VLLM_NAME}"'
    raise LauncherError(f"{subject} for Triton's vLLM backend, which this tritonserver lacks: {where}", VLLM_ADVICE)
