"""Which architectures there are, and what a model's own files say about it."""

from __future__ import annotations

import hashlib
import json
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
from flashserve.models.source import find_tokenizer_file, resolve_folder

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
    folder = resolve_folder(config.model, config.revision)
    model_config = read_json(folder / "config.json")
    architecture, model_class = find_architecture(model_config)
    try:
        shape = model_class.read_shape(model_config)
        ignored = model_class.ignored_weights(model_config)
    except KeyError as error:
        raise ConfigError(f"config.json of {folder.name} lacks {error.args[0]}") from error
    checkpoint = Checkpoint(folder)
    checkpoint_dtype = _stated_dtype(model_config) or checkpoint.dtype
    dtype = resolve_dtype(config.dtype, checkpoint_dtype, device_kind)
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
        eos_token_ids=_eos_token_ids(folder, model_config),
        tokenizer_file=find_tokenizer_file(folder, config),
    )


def find_architecture(model_config: dict[str, Any]) -> tuple[str, type[CausalLM]]:
    """The name and class of the model. Raises ConfigError that names the supported ones."""
    names = model_config.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            if "quantization_config" in model_config:
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


def _eos_token_ids(folder: Path, model_config: dict[str, Any]) -> tuple[int, ...]:
    """Of generation_config.json, which instruction-tuned models extend, else of config.json."""
    file = folder / "generation_config.json"
    value = read_json(file).get("eos_token_id") if file.is_file() else None
    if value is None:
        value = model_config.get("eos_token_id")
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
