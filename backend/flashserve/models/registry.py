"""Which architectures there are, and what a model's own files say about it."""

from __future__ import annotations

import logging
from typing import Any

import torch

from flashserve.config import DeviceFacts, EngineConfig, ModelFacts, ResolvedConfig, resolve_dtype
from flashserve.errors import ConfigError
from flashserve.layers.weight_format import WEIGHT_FORMATS
from flashserve.models.dtypes import WEIGHT_DTYPES
from flashserve.models.files import ModelFiles, SafetensorsFolder
from flashserve.models.gemma3 import Gemma3ForCausalLM
from flashserve.models.gguf.files import GgufFiles
from flashserve.models.gpt2 import GPT2LMHeadModel
from flashserve.models.kv_scales import CACHE_SCALES, quantizes_weights
from flashserve.models.llama import LlamaForCausalLM
from flashserve.models.mistral import MistralForCausalLM
from flashserve.models.model_input import CausalLM
from flashserve.models.qwen2 import Qwen2ForCausalLM
from flashserve.models.qwen3 import Qwen3ForCausalLM
from flashserve.models.source import resolve_model, resolve_tokenizer
from flashserve_kernels import Ops

log = logging.getLogger(__name__)

HEAD = "lm_head.weight"
SIZES = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "max_position_embeddings", "n_embd", "n_layer", "n_head", "n_positions", "n_inner"),
}

ARCHITECTURES: dict[str, type[CausalLM]] = {
    "Gemma3ForCausalLM": Gemma3ForCausalLM,
    "GPT2LMHeadModel": GPT2LMHeadModel,
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": MistralForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
}


def open_model(config: EngineConfig) -> ModelFiles:
    """Find the model, downloading a Hugging Face id. A head of its own is not tied: some tuned models store one that
    differs, under a config.json that says "tied", and transformers unties them, too.

    Raises ConfigError where the model is missing, unsupported or incomplete.
    """
    path = resolve_model(config.model, config.revision, config.download_dir)
    tokenizer = config.tokenizer
    find_tokenizer = None if tokenizer is None else lambda: resolve_tokenizer(tokenizer, config.download_dir)
    files = SafetensorsFolder(path, find_tokenizer) if path.is_dir() else GgufFiles(path, find_tokenizer)
    _check_sizes(files.config)
    _, model_class = find_architecture(files.config)
    if files.config.get("tie_word_embeddings", model_class.tied_by_default) and files.has(HEAD):
        stored = next(filter(files.has, model_class.embedding_names), None)
        if stored is not None and not files.same(stored, HEAD):
            log.warning(
                "config.json says that %s is tied to %s, but both are stored and differ: not tied", HEAD, stored
            )
            files.config["tie_word_embeddings"] = False
    return files


def _check_sizes(model_config: dict[str, Any]) -> None:
    """Raise ConfigError for a size in config.json that is no positive integer."""
    for name in SIZES & model_config.keys():
        if type(model_config[name]) is not int or model_config[name] < 1:
            raise ConfigError(f"{name} in config.json must be a positive integer, not {model_config[name]!r}")


def read_model_facts(files: ModelFiles, config: EngineConfig, device: DeviceFacts) -> ModelFacts:
    """What configuration needs, without reading the weights. Raises ConfigError where config.json makes no sense."""
    folder = files.folder
    architecture, model_class = find_architecture(files.config)
    try:
        shape = model_class.read_shape(files.config)
        ignored = (*model_class.ignored_weights(files.config), *CACHE_SCALES)
    except KeyError as error:
        raise ConfigError(f"config.json of {folder.name} lacks {error.args[0]}") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"config.json of {folder.name} holds a value that makes no sense: {error}") from error
    dtype = resolve_dtype(config, _stated_dtype(files.config) or files.dtype, device)
    return ModelFacts(
        architecture=architecture,
        context_len=shape.context_len,
        vocab_size=shape.vocab_size,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        hidden_size=shape.hidden_size,
        dtype=dtype,
        weight_bytes=files.num_elements(ignored) * WEIGHT_DTYPES[dtype].itemsize,
        eos_token_ids=files.end_token_ids(shape.vocab_size),
        card=files.card,
    )


@torch.inference_mode()
def load_model(files: ModelFiles, resolved: ResolvedConfig, device: torch.device, ops: Ops) -> CausalLM:
    """Build the model with its weights. Raises ConfigError for missing, unexpected or mis-shaped tensors, and for a
    quantization that the ops lack."""
    _, model_class = find_architecture(files.config)
    name = resolved.config.quantization
    format = WEIGHT_FORMATS[name]
    if format.needs is not None and format.needs not in ops.weight_formats:
        raise ConfigError(
            f"quantization={name!r} is not to be had with {ops.name} ops: int8 needs the native kernels of a CPU, int4 "
            "these or a GPU"
        )
    weights = files.weights(WEIGHT_DTYPES[resolved.dtype], device, ops, format)
    model = model_class(files.config, weights, resolved.max_model_len)
    weights.finish((*model_class.ignored_weights(files.config), *CACHE_SCALES))
    return model


def find_architecture(model_config: dict[str, Any]) -> tuple[str, type[CausalLM]]:
    """The name and class of the model. Raises ConfigError that names the supported ones."""
    names = model_config.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            quantization = model_config.get("quantization_config")
            if quantization and quantizes_weights(quantization):
                raise ConfigError("quantised checkpoints are not supported; use the model's unquantised weights")
            return name, ARCHITECTURES[name]
    found = ", ".join(map(str, names)) or "none"
    raise ConfigError(f"architecture not supported: {found}; supported: {', '.join(ARCHITECTURES)}")


def _stated_dtype(model_config: dict[str, Any]) -> str | None:
    """``dtype`` or the older ``torch_dtype``, if it is one that we run."""
    stated = str(model_config.get("dtype") or model_config.get("torch_dtype") or "").removeprefix("torch.")
    return stated if stated in WEIGHT_DTYPES else None
