"""Where a model is: the ways to name one in ``model``, and the files on this machine that are meant."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from flashserve.errors import ConfigError
from flashserve.paths import absolute, native

PACKAGE = "package:"
GGUF = ".gguf"
HUB_ID = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(:(?P<file>[\w.-]+))?")
"""``repository:file`` means one of the GGUF files there: its name, or its quantisation such as Q4_K_M."""
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_NO_MODEL = "mmproj"
"""Files of this beginning are what image models have beside the language model."""


def locate(model: str) -> Path | None:
    """The folder or the GGUF file that ``model`` means (``find`` and ``choose_file``). None for an id of the hub."""
    found = find(model)
    return None if found is None else choose_file(found)


def find(model: str) -> Path | None:
    """What ``model`` names: a path, or ``package:NAME`` or ``package:NAME/FILE`` for what an installed Python package
    brings. None for an id of the Hugging Face hub. Raises ConfigError where there is no such thing."""
    if model.startswith(PACKAGE):
        return _in_package(model)
    try:
        path = native(model).expanduser()
    except RuntimeError:
        raise ConfigError(f"{model}: no home folder is known for ~; write the path in full, or set HOME") from None
    if model and path.exists():
        return absolute(path)
    is_file = model.endswith(GGUF) and ":" not in model
    if is_file or model.startswith((".", "~", "/")) or not HUB_ID.fullmatch(model):
        raise ConfigError(f"model folder or {GGUF} file {model} does not exist")
    return None


def choose_file(path: Path, quantization: str = "") -> Path:
    """A folder with config.json as it is; of another the one model in GGUF files that it holds: its file, or the first
    of a split model's. quantization: which one (or the file's name), where there are several. It looks no deeper than
    into the folder's folders, since it may be somebody's home. Raises ConfigError."""
    if not path.is_dir():
        if path.suffix != GGUF:
            raise ConfigError(f"{path} is neither a folder nor a {GGUF} file")
        return path
    if not quantization and (path / "config.json").is_file():
        return path
    found = sorted(file for pattern in (f"*{GGUF}", f"*/*{GGUF}") for file in path.glob(pattern))
    files = [file for file in found if _is_first(file) and _fits(file.relative_to(path), quantization)]
    if len(files) == 1:
        return files[0]
    if files:
        names = ", ".join(str(file.relative_to(path)) for file in files)
        raise ConfigError(f"{path} holds several models: name one of {names}")
    if quantization:
        raise ConfigError(f"{path} holds no GGUF file for {quantization}")
    raise ConfigError(f"{path} is not a model folder: it has no config.json and no {GGUF} file")


def name_of(model: str) -> str:
    """What a model is called if nobody says: the last word of where it is, without a file's ending."""
    return _PART.sub("", Path(model.removeprefix(PACKAGE)).name).removesuffix(GGUF)


def hub_patterns(quantization: str) -> list[str]:
    """Which files of a hub's repository are to be had for ``repository:quantization``."""
    spellings = dict.fromkeys((quantization, quantization.lower(), quantization.upper()))
    forms = ("{0}", "{0}.gguf", "{0}/*.gguf", "*[-._]{0}.gguf", "*[-._]{0}-*-of-*.gguf")
    return [form.format(spelling) for spelling in spellings for form in forms]


def _in_package(model: str) -> Path:
    name, _, file = model.removeprefix(PACKAGE).partition("/")
    if not name.isidentifier():
        raise ConfigError(
            f"{model}: {name!r} is no name of a Python package; write {PACKAGE}NAME or {PACKAGE}NAME/FILE"
        )
    try:
        spec = find_spec(name)
    except ValueError:  # __main__ and other modules that no file says where they are from
        spec = None
    folders = spec.submodule_search_locations if spec is not None else None
    if not folders:
        distribution = name.replace("_", "-")
        raise ConfigError(f"the Python package {name} is not installed: pip install --no-deps {distribution}")
    folder = Path(folders[0]).resolve()
    path, words = folder / file, PurePosixPath(file)  # its files may be links to elsewhere, as uv and Nix install them
    if words.is_absolute() or ".." in words.parts or not path.exists():
        raise ConfigError(f"{model}: the Python package {name} has no file {file}")
    return path


def _is_first(file: Path) -> bool:
    part = _PART.search(file.name)
    return (part is None or int(part[1]) == 1) and not file.name.startswith(_NO_MODEL)


def _fits(file: Path, quantization: str) -> bool:
    """Whether a file's name, or its folder's, holds the quantisation as a word of its own: Q4_K is not Q4_K_M."""
    if not quantization or file.name == quantization:
        return True
    word = re.compile(rf"(^|[-._]){re.escape(quantization)}([-.]|$)", re.IGNORECASE)
    return any(map(word.search, file.parts))
