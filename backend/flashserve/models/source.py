"""Where a model's files are: a folder, or the local copy of a Hugging Face repository."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import msgspec

from flashserve.errors import ConfigError
from flashserve.paths import native
from flashserve.protocol import ModelCard

_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
_SECOND_COPIES = ["consolidated*", "original/*"]
_CONVERTIBLE = ("vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def resolve_folder(model: str, revision: str | None, download_dir: str | None) -> Path:
    """The folder of ``model``: itself, or the download of a Hugging Face id, which goes to ``download_dir``.

    Raises ConfigError where there is neither.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    looks_like_path = path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1
    if looks_like_path and model.count("/") != 0:
        raise ConfigError(f"model folder {model} does not exist")
    from huggingface_hub import snapshot_download

    try:
        found: str = snapshot_download(
            model,
            revision=revision,
            cache_dir=download_dir,
            allow_patterns=_PATTERNS,
            ignore_patterns=_SECOND_COPIES,
        )
        return Path(found)
    except Exception as error:  # its errors range from HTTP statuses over missing caches to bad names
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"model {model!r} is neither a folder nor in the local cache, and its download from the Hugging Face "
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


def _converted(folder: Path, sources: list[Path]) -> Path:
    """A tokenizer.json in our cache, named by the content of what it was made from."""
    digest = hashlib.sha256()
    extra = [folder / name for name in ("merges.txt", "tokenizer_config.json", "added_tokens.json")]
    for file in [*sources, *(file for file in extra if file.is_file())]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashserve" / "tokenizers"
    target = cache / f"{digest.hexdigest()[:32]}.json"
    if target.is_file():
        return target
    # transformers takes seconds to import, so only here.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        cache.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.tmp")
        tokenizer.backend_tokenizer.save(str(partial))
    except Exception as error:
        raise ConfigError(f"the tokenizer of {folder.name} cannot be converted to tokenizer.json: {error}") from error
    partial.replace(target)
    return target
