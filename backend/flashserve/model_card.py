"""The small files beside a model's weights, read once where the model is opened; everybody else gets a ModelCard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from flashserve.errors import ConfigError
from flashserve.paths import portable
from flashserve.protocol import ModelCard


def read_model_card(folder: Path, tokenizer_file: Path | None = None) -> ModelCard:
    """Of a Hugging Face folder. tokenizer_file: where it is another than the folder's own; what lies beside it comes
    first. Raises ConfigError for files that cannot be read."""
    tokenizer_file = tokenizer_file or folder / "tokenizer.json"
    generation_config = folder / "generation_config.json"
    return ModelCard(
        tokenizer_file=portable(tokenizer_file),
        tokenizer_config=_sendable(_read_tokenizer_config(list(dict.fromkeys((tokenizer_file.parent, folder))))),
        generation_config=_sendable(read_json_object(generation_config)) if generation_config.is_file() else {},
    )


def _read_tokenizer_config(folders: list[Path]) -> dict[str, Any]:
    """``tokenizer_config.json`` of the first folder that has one, with its chat templates put into place.

    Templates in files of their own win, as in transformers: ``chat_template.jinja`` and, under their own names,
    ``additional_chat_templates/*.jinja``.
    """
    config: dict[str, Any] = {}
    for folder in folders:
        if (folder / "tokenizer_config.json").is_file():
            config = read_json_object(folder / "tokenizer_config.json")
            break
    for folder in folders:
        files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
        if (folder / "chat_template.jinja").is_file():
            files["default"] = folder / "chat_template.jinja"
        if files:
            config["chat_template"] = {name: _read_text(path) for name, path in files.items()}
            break
    return config


def _sendable(values: dict[str, Any]) -> dict[str, Any]:
    """Without what no message holds. transformers writes 10**30 as the ``model_max_length`` of one without a limit."""

    def fits(value: Any) -> bool:
        try:
            msgspec.msgpack.encode(value)
        except (OverflowError, UnicodeEncodeError):
            return False
        return True

    return {name: value for name, value in values.items() if fits(value)}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path.name} of {path.parent.name}: {error}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object among the model's files. Raises ConfigError that names the file."""
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path.name} of {path.parent.name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path.name} of {path.parent.name} must hold a JSON object")
    return value
