"""Which models of a repository are judged before a start, and what is said of those that cannot be loaded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from flashserve.launcher import doctor, loadable, repository, workspace
from flashserve.launcher.commands import run_models
from flashserve.launcher.discover import TritonInstall
from flashserve.launcher.errors import LauncherError
from flashserve.launcher.loadable import VllmServer
from flashserve.launcher.triton_arguments import ALL

GOOD = {"model": "org/model"}
BROKEN = {"model": "org/model", "max_num_seq": 3}


def entry(folder: Path, name: str, model_json: object = GOOD, config: str = 'backend: "flashserve"\n') -> Path:
    version = folder / name / "1"
    version.mkdir(parents=True)
    (version / "model.json").write_text(json.dumps(model_json))
    (version.parent / "config.pbtxt").write_text(config)
    return version.parent


def check(
    folder: Path, *load: str, vllm: VllmServer = VllmServer.NOBODY, named: tuple[str, ...] = (), files: bool = True
) -> None:
    models = [repository.NamedModel(name, "org/model") for name in named]
    loadable.require_loadable([str(folder)], models, load, vllm, files)


@pytest.fixture
def install(tmp_path: Path) -> TritonInstall:
    """A tritonserver with an onnxruntime and a Python backend."""
    backends = tmp_path / "triton" / "backends"
    for name in ("onnxruntime", "python"):
        (backends / name).mkdir(parents=True)
    stub = tmp_path / "triton_python_backend_stub"
    stub.write_bytes(b"")
    return TritonInstall(tmp_path / "tritonserver", backends, stub, (), "for a test", "2.51.0")


def test_a_broken_model_is_refused_when_all_are_loaded(tmp_path: Path) -> None:
    entry(tmp_path, "bad", BROKEN)
    entry(tmp_path, "good")
    with pytest.raises(LauncherError, match=r"model bad cannot be loaded: .*max_num_seqs") as caught:
        check(tmp_path, *ALL)
    assert "-- --load-model=NAME" in caught.value.advice


def test_only_what_is_loaded_is_judged(tmp_path: Path) -> None:
    entry(tmp_path, "bad", BROKEN)
    entry(tmp_path, "foreign", config='backend: "vllm"\n')
    entry(tmp_path, "good")
    check(tmp_path, "good")
    check(tmp_path)
    with pytest.raises(LauncherError, match="model bad cannot be loaded"):
        check(tmp_path, "good", "bad")


def test_an_unknown_name_is_refused_with_those_that_exist(tmp_path: Path) -> None:
    entry(tmp_path, "good")
    with pytest.raises(LauncherError, match="--load-model=goood: there is no such model") as caught:
        check(tmp_path, "goood", named=("mine",))
    assert "good, mine" in caught.value.advice
    check(tmp_path, "mine", named=("mine",))


def test_a_bucket_may_hold_any_name(tmp_path: Path) -> None:
    loadable.require_loadable(["s3://bucket/models", str(tmp_path)], [], ("x",), VllmServer.NOBODY, True)


def test_another_backend_module_has_files_of_its_own(tmp_path: Path) -> None:
    entry(tmp_path, "bad", BROKEN)
    check(tmp_path, *ALL, files=False)


def test_a_model_of_the_vllm_backend_is_refused_with_the_line_to_change(tmp_path: Path) -> None:
    folder = entry(tmp_path, "m", config='# as in backend: "python"\nname: "m"\nbackend: "vllm"\n')
    with pytest.raises(LauncherError, match=r'model m is for .*: "vllm"') as caught:
        check(tmp_path, *ALL)
    assert f'{folder}/config.pbtxt:3 says backend: "vllm"' in str(caught.value)
    assert 'backend: "flashserve"' in caught.value.advice
    assert "flashserve serve --serve-vllm-models" in caught.value.advice


def test_all_models_of_the_vllm_backend_are_named_at_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        entry(tmp_path, name, config='backend: "vllm"\n')
    with pytest.raises(LauncherError, match=r"models a, b are for .*a/config\.pbtxt:1, .*b/config\.pbtxt:1 say"):
        check(tmp_path, *ALL)


def test_flashserve_in_vllm_s_place_judges_its_models_too(tmp_path: Path) -> None:
    entry(tmp_path, "good", config='backend: "vllm"\n')
    check(tmp_path, *ALL, vllm=VllmServer.FLASHSERVE)
    entry(tmp_path, "bad", BROKEN, config='backend: "vllm"\n')
    with pytest.raises(LauncherError, match=r"model bad cannot be loaded: .*max_num_seqs"):
        check(tmp_path, *ALL, vllm=VllmServer.FLASHSERVE)
    check(tmp_path, *ALL, vllm=VllmServer.TRITON)  # what vLLM takes is not ours to say


@pytest.mark.parametrize(
    ("config", "backend", "line"),
    [
        ("name: 'm' backend: 'vllm'", "vllm", 1),
        ('\n\nbackend :\t"vllm" # was: backend: "python"', "vllm", 3),
        ('# backend: "vllm"\n', "", 0),
        ('parameters { key: "backend" value: { string_value: "vllm" } }', "", 0),
        ('\xff\nbackend: "flashserve"', "flashserve", 2),
    ],
)
def test_the_backend_is_found_where_triton_reads_it(tmp_path: Path, config: str, backend: str, line: int) -> None:
    folder = entry(tmp_path, "m")
    (folder / "config.pbtxt").write_bytes(config.encode("latin-1"))
    (model,) = repository.read_repository(tmp_path)
    assert (model.backend, model.backend_line) == (backend, line)


def test_who_serves_models_of_the_vllm_backend(install: TritonInstall) -> None:
    assert loadable.vllm_server(install, asked=False) is VllmServer.NOBODY
    assert loadable.vllm_server(None, asked=False) is VllmServer.NOBODY
    assert loadable.vllm_server(install, asked=True) is VllmServer.FLASHSERVE
    (install.backends / "vllm").mkdir()
    assert loadable.vllm_server(install, asked=False) is VllmServer.TRITON
    assert loadable.vllm_server(install, asked=True) is VllmServer.FLASHSERVE


@pytest.mark.parametrize("has_own", [False, True])
@pytest.mark.parametrize("ours", [False, True])
def test_the_vllm_backend_is_ours_if_asked_for_else_triton_s(
    tmp_path: Path, install: TritonInstall, ours: bool, has_own: bool
) -> None:
    if has_own:
        (install.backends / "vllm").mkdir()
        (install.backends / "vllm" / "model.py").write_text("theirs")
    space = workspace.Workspace("flashserve-1-x", tmp_path / "space")
    space.folder.mkdir()
    workspace.add_backends(space, install, "some.module", ["flashserve", "vllm"] if ours else ["flashserve"])
    vllm = space.backends / "vllm"
    assert vllm.exists() == (ours or has_own)
    if ours:
        assert (vllm / "model.py").read_text() == (space.backends / "flashserve" / "model.py").read_text()
        assert not vllm.is_symlink()
    assert not has_own or (install.backends / "vllm" / "model.py").read_text() == "theirs"


def row(folder: Path, monkeypatch: pytest.MonkeyPatch, install: TritonInstall) -> doctor.Check:
    monkeypatch.setattr(doctor.discover, "find_triton", lambda: install)
    (found,) = doctor._models(str(folder))
    return found


def test_doctor_says_how_a_model_of_the_vllm_backend_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, install: TritonInstall
) -> None:
    repository_folder = tmp_path / "repository"
    folder = entry(repository_folder, "m", config='backend: "vllm"\n')
    found = row(repository_folder, monkeypatch, install)
    assert found.status == "warn"
    assert f'{folder}/config.pbtxt:1 says backend: "vllm"' in found.value
    assert "--serve-vllm-models" in found.fix

    (folder / "1" / "model.json").write_text(json.dumps(BROKEN))
    assert row(repository_folder, monkeypatch, install).status == "fail"
    (install.backends / "vllm").mkdir()
    found = row(repository_folder, monkeypatch, install)
    assert (found.status, found.fix) == ("ok", "")
    assert "vLLM backend" in found.value


def test_models_says_how_a_model_of_the_vllm_backend_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], install: TritonInstall
) -> None:
    monkeypatch.setattr("flashserve.launcher.discover.find_triton", lambda: install)
    entry(tmp_path / "repository", "m", config='backend: "vllm"\n')
    arguments = SimpleNamespace(model_repository=str(tmp_path / "repository"), url="127.0.0.1:1", json=False)
    assert run_models(arguments) == 0  # type: ignore[arg-type]
    assert "flashserve serve --serve-vllm-models" in capsys.readouterr().out
