"""A model's files on this machine, downloaded if they are a Hugging Face repository's, and its tokenizer.json."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from flashserve.errors import ConfigError
from flashserve.model_location import HUB_ID, choose_file, hub_patterns, locate
from flashserve.paths import native
from flashserve.protocol import ModelCard

_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
_SECOND_COPIES = ["consolidated*", "original/*"]
_CONVERTIBLE = ("vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def resolve_model(model: str, revision: str | None, download_dir: str | None) -> Path:
    """The folder or GGUF file of ``model``: itself, or the download of a Hugging Face id, which goes to
    ``download_dir``.

    Raises ConfigError where there is neither.
    """
    found = locate(model)
    if found is not None:
        return found
    parts = HUB_ID.fullmatch(model)
    assert parts is not None  # locate refuses all else
    file = parts["file"] or ""
    folder = _download(parts["repository"], revision, download_dir, hub_patterns(file) if file else _PATTERNS)
    return choose_file(folder, file)


def resolve_tokenizer(tokenizer: str, download_dir: str | None) -> Path:
    """The folder of a tokenizer that takes the place of a model's own. Raises ConfigError."""
    path = resolve_model(tokenizer, None, download_dir)
    if not path.is_dir():
        raise ConfigError(f"tokenizer must be a folder or a Hugging Face id, not the file {path}")
    return path


def _download(repository: str, revision: str | None, download_dir: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        found: str = snapshot_download(
            repository,
            revision=revision,
            cache_dir=download_dir,
            allow_patterns=patterns,
            ignore_patterns=_SECOND_COPIES,
        )
        return Path(found)
    except Exception as error:  # its errors range from HTTP statuses over missing caches to bad names
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"model {repository!r} is neither a folder nor in the local cache, and its download from the Hugging Face "
            f"Hub failed ({reason}); give a folder, or check the name, the network and HF_TOKEN"
        ) from error


def find_tokenizer_file(folder: Path) -> Path:
    """The tokenizer.json of a folder, converted once from older files where there is none.

    Raises ConfigError where the folder has no tokenizer.
    """
    ready = folder / "tokenizer.json"
    if ready.is_file():
        return ready
    sources = [folder / name for name in _CONVERTIBLE if (folder / name).is_file()]
    if not sources:
        raise ConfigError(f"{folder} has no tokenizer (tokenizer.json, tokenizer.model, or vocab.json)")
    return _converted(folder, sources)


def find_tokenizers_end(card: ModelCard) -> int | None:
    """The id of ``eos_token`` in tokenizer_config.json, or None: tuned models name the end of a turn there, under a
    config.json that still says what the base model's was. Raises ConfigError for a tokenizer that cannot be read."""
    token = card.tokenizer_config.get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str):
        return None
    try:
        added = msgspec.json.decode(native(card.tokenizer_file).read_bytes(), type=_TokenizerFile).added_tokens
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"cannot read {card.tokenizer_file}: {error}") from error
    index = next((one.id for one in added if one.content == token), None)
    if index is not None:
        return index
    import tokenizers  # an end that is a token like others; 49,152 tokens take 0.24 s and 33 MB to load

    try:
        found: int | None = tokenizers.Tokenizer.from_file(card.tokenizer_file).token_to_id(token)
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"cannot read {card.tokenizer_file}: {error}") from error
    return found


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _TokenizerFile(msgspec.Struct):
    """The part of a tokenizer.json that lists special tokens; the vocabulary is passed over."""

    added_tokens: list[_AddedToken] = []


def cached_tokenizer(digest: str, save: Callable[[Path], None]) -> Path:
    """A tokenizer.json in our cache, named by a hash of what it is made from; ``save`` writes it where it is missing.
    Raises what ``save`` raises, and ConfigError for a cache that cannot be written."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashserve" / "tokenizers"
    target = cache / f"{digest[:32]}.json"
    if target.is_file():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.tmp")
        save(partial)
        partial.replace(target)
    except OSError as error:
        raise ConfigError(f"cannot write a tokenizer.json to {cache}: {error}; set XDG_CACHE_HOME") from error
    return target


def _converted(folder: Path, sources: list[Path]) -> Path:
    """A tokenizer.json made of older files."""
    digest = hashlib.sha256()
    extra = [folder / name for name in ("merges.txt", "tokenizer_config.json", "added_tokens.json")]
    for file in [*sources, *(file for file in extra if file.is_file())]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())

    def save(target: Path) -> None:
        # transformers takes seconds to import, so only here.
        from transformers import AutoTokenizer

        try:
            AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False).backend_tokenizer.save(str(target))
        except Exception as error:
            raise ConfigError(
                f"the tokenizer of {folder.name} cannot be converted to tokenizer.json: {error}"
            ) from error

    return cached_tokenizer(digest.hexdigest(), save)
