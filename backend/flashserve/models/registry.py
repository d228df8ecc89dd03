"""Which architectures there are, and what a model's own files say about it."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from flashserve.config import DTYPE_BYTES, EngineConfig, ModelFacts, resolve_dtype
from flashserve.errors import ConfigError
from flashserve.models.checkpoint import Checkpoint
from flashserve.models.gpt2 import GPT2LMHeadModel
from flashserve.models.llama import LlamaForCausalLM
from flashserve.models.mistral import MistralForCausalLM
from flashserve.models.model_input import CausalLM
from flashserve.models.qwen2 import Qwen2ForCausalLM
from flashserve.models.qwen3 import Qwen3ForCausalLM
from flashserve.models.source import find_tokenizer_file, read_tokenizers_end, resolve_folder

log = logging.getLogger(__name__)

HEAD = "lm_head.weight"
SIZES = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "max_position_embeddings", "n_embd", "n_layer", "n_head", "n_positions", "n_inner"),
}
_SAMPLE_BYTES = 1024

ARCHITECTURES: dict[str, type[CausalLM]] = {
    "GPT2LMHeadModel": GPT2LMHeadModel,
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": MistralForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
}


def read_model_facts(config: EngineConfig, device_kind: str) -> ModelFacts:
    """Find the model (downloading a Hugging Face id) and read what configuration needs, without the weights.

    Raises ConfigError where the model is missing, unsupported or incomplete.
    """
    folder = resolve_folder(config.model, config.revision, config.download_dir)
    model_config, checkpoint = open_model(folder)
    architecture, model_class = find_architecture(model_config)
    try:
        shape = model_class.read_shape(model_config)
        ignored = model_class.ignored_weights(model_config)
    except KeyError as error:
        raise ConfigError(f"config.json of {folder.name} lacks {error.args[0]}") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"config.json of {folder.name} holds a value that makes no sense: {error}") from error
    checkpoint_dtype = _stated_dtype(model_config) or checkpoint.dtype
    dtype = resolve_dtype(config.dtype, checkpoint_dtype, device_kind)
    tokenizer_file = find_tokenizer_file(folder, config)
    return ModelFacts(
        path=str(folder),
        architecture=architecture,
        context_len=shape.context_len,
        vocab_size=shape.vocab_size,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        checkpoint_dtype=checkpoint_dtype,
        weight_bytes=checkpoint.num_elements(ignored) * DTYPE_BYTES[dtype],
        eos_token_ids=_eos_token_ids(folder, model_config, shape.vocab_size, tokenizer_file),
        tokenizer_file=tokenizer_file,
    )


def open_model(folder: Path) -> tuple[dict[str, Any], Checkpoint]:
    """config.json as it is meant, and the weights: what is null is not there, and a head of its own is not tied.

    transformers unties, too: some tuned models store a head that differs, under a config that says "tied".
    Raises ConfigError.
    """
    config: dict[str, Any] = _without_nulls(read_json(folder / "config.json"))
    for name in SIZES & config.keys():
        if type(config[name]) is not int or config[name] < 1:
            raise ConfigError(f"{name} in config.json must be a positive integer, not {config[name]!r}")
    _, model_class = find_architecture(config)
    checkpoint = Checkpoint(folder)
    tied = config.get("tie_word_embeddings", model_class.tied_by_default)
    if tied and HEAD in checkpoint.entries:
        stored = [name for name in model_class.embedding_names if name in checkpoint.entries]
        if stored and not checkpoint.same(stored[0], HEAD):
            log.warning(
                "config.json says that %s is tied to %s, but both are stored and differ: not tied", HEAD, stored[0]
            )
            config["tie_word_embeddings"] = False
    return config, checkpoint


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def find_architecture(model_config: dict[str, Any]) -> tuple[str, type[CausalLM]]:
    """The name and class of the model. Raises ConfigError that names the supported ones."""
    names = model_config.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            if model_config.get("quantization_config"):
                raise ConfigError("quantised checkpoints are not supported; use the model's unquantised weights")
            return name, ARCHITECTURES[name]
    found = ", ".join(map(str, names)) or "none"
    raise ConfigError(f"architecture not supported: {found}; supported: {', '.join(ARCHITECTURES)}")


def fingerprint(folder: str, dtype: str, layout: str) -> str:
    """A hash that differs wherever two models' KV blocks may differ; the root of the prefix cache's hashes.

    It covers config.json, the files' names and headers, the dtype, the layout, and of each tensor only a sample
    (reading the weights would take seconds): two tunings of one model differ nearly everywhere. Equal on every
    machine that holds the same files.
    """
    path = Path(folder)
    digest = hashlib.sha256(f"{dtype}\0{layout}\0".encode())
    digest.update((path / "config.json").read_bytes())
    checkpoint = Checkpoint(path)
    for file in checkpoint.files:
        digest.update(f"\0{file.name}\0{file.stat().st_size}\0".encode())
    for name, entry in sorted(checkpoint.entries.items()):
        digest.update(f"{name}\0{entry.dtype}\0{entry.shape}\0{entry.begin}\0".encode())
        digest.update(checkpoint.sample(name, _SAMPLE_BYTES))
    return digest.hexdigest()


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a model folder. Raises ConfigError that names the file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file.parent} is not a model folder: cannot read {file.name}") from error
    except ValueError as error:
        raise ConfigError(f"{file.name} of {file.parent.name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file.name} of {file.parent.name} must hold a JSON object")
    return value


def _stated_dtype(model_config: dict[str, Any]) -> str | None:
    """``dtype`` or the older ``torch_dtype``, if it is one that we run."""
    stated = str(model_config.get("dtype") or model_config.get("torch_dtype") or "").removeprefix("torch.")
    return stated if stated in DTYPE_BYTES else None


def _eos_token_ids(folder: Path, model_config: dict[str, Any], vocab_size: int, tokenizer_file: str) -> tuple[int, ...]:
    """Of generation_config.json, which instruction-tuned models extend, else of config.json; and, as in vLLM, the
    tokenizer's."""
    file = folder / "generation_config.json"
    value = read_json(file).get("eos_token_id") if file.is_file() else None
    origin = file.name
    if value is None:
        value, origin = model_config.get("eos_token_id", []), "config.json"
    ids = value if isinstance(value, list) else [value]
    if not all(type(one) is int for one in ids):
        raise ConfigError(f"eos_token_id in {origin} must be an integer or a list of them, not {value!r}")
    of_tokenizer = read_tokenizers_end(tokenizer_file, folder)
    ids = [*ids, *([] if of_tokenizer is None else [of_tokenizer])]
    beyond = [one for one in ids if not 0 <= one < vocab_size]
    if beyond:  # the sampler would write beyond the logits to rule them out
        log.warning("%s: end token %s is not in the vocabulary of %d and left out", origin, beyond, vocab_size)
    return tuple(dict.fromkeys(one for one in ids if 0 <= one < vocab_size))
