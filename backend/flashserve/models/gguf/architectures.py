"""The architectures of GGUF files: a configuration as config.json would state it, and our names of the tensors.

llama.cpp's converter renames tensors and changes some: rows of llama's queries and keys lie in pairs instead of
halves, GPT-2's matrices are transposed, and Gemma's norm weights have their 1 added.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flashserve.errors import ConfigError
from flashserve.models.gguf.header import TensorInfo
from flashserve.models.gguf.metadata import Metadata

log = logging.getLogger(__name__)

Config = dict[str, Any]
Tensors = Mapping[str, TensorInfo]
ROPE_FACTORS = "rope_freqs.weight"

_DECODER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{}.input_layernorm",
    "attn_q": "model.layers.{}.self_attn.q_proj",
    "attn_k": "model.layers.{}.self_attn.k_proj",
    "attn_v": "model.layers.{}.self_attn.v_proj",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "attn_k_norm": "model.layers.{}.self_attn.k_norm",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_gate": "model.layers.{}.mlp.gate_proj",
    "ffn_up": "model.layers.{}.mlp.up_proj",
    "ffn_down": "model.layers.{}.mlp.down_proj",
}
"""Names without ``blk.N.`` and ``.weight``; {} is the layer."""
_GEMMA3 = {
    **_DECODER,
    "post_attention_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_norm": "model.layers.{}.pre_feedforward_layernorm",
    "post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
}
_GPT2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "transformer.h.{}.ln_1",
    "attn_qkv": "transformer.h.{}.attn.c_attn",
    "attn_output": "transformer.h.{}.attn.c_proj",
    "ffn_norm": "transformer.h.{}.ln_2",
    "ffn_up": "transformer.h.{}.mlp.c_fc",
    "ffn_down": "transformer.h.{}.mlp.c_proj",
}
_WITHOUT_MEANING = ("vocab_size", "expert_used_count", "rope.scaling.finetuned")
"""Keys under the architecture's name that nobody needs: the first is that of the embedding's rows."""


@dataclass(frozen=True)
class Architecture:
    """What one architecture's files need."""

    model: str
    """The name in config.json's ``architectures``."""
    read_config: Callable[[Metadata, str, Tensors], Config]
    names: Mapping[str, str]
    in_pairs: tuple[str, ...] = ()
    """Tensors (of the file's names) whose rows are to be put from pairs into halves, head by head."""
    transposed: tuple[str, ...] = ()
    """Matrices that the model has the other way round."""
    norms_plus_one: bool = False
    """The file has 1 added to the norms' weights, and the model adds it itself."""


def find_architecture(metadata: Metadata) -> tuple[str, Architecture]:
    """Raises ConfigError for one that is not known, which it names."""
    name = metadata.text("general.architecture")
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(f"{metadata.name}: architecture {name!r} is not supported; supported: {known}")
    return name, ARCHITECTURES[name]


def read_config(metadata: Metadata, tensors: Tensors) -> Config:
    """What config.json would say. Raises ConfigError that names the key that is missing or makes no sense."""
    name, architecture = find_architecture(metadata)
    if "token_embd.weight" not in tensors:
        raise ConfigError(f"{metadata.name} lacks the tensor token_embd.weight")
    config = architecture.read_config(metadata, name, tensors)
    known = [f"{name}.{key}" for key in _WITHOUT_MEANING]
    unknown = [key for key in metadata.unread(f"{name}.") if key not in known]
    if unknown:
        log.warning("%s holds %s, not known and without effect", metadata.name, ", ".join(unknown))
    return {
        "architectures": [architecture.model],
        "vocab_size": tensors["token_embd.weight"].num_rows,
        "tie_word_embeddings": "output.weight" not in tensors,
        **config,
    }


def _check_sizes(metadata: Metadata, name: str, tensors: Tensors, rows: Mapping[str, tuple[str, int]]) -> None:
    """Raise ConfigError for a size in the metadata that is not that of its tensor, before anything is made of it.

    rows: by key (under the architecture's name) the tensor, and how many of its rows one counts for.
    """
    layers = {stored.split(".")[1] for stored in tensors if stored.startswith("blk.")}
    found: dict[str, float] = {"block_count": len(layers), "embedding_length": tensors["token_embd.weight"].shape[-1]}
    for key, (tensor, each) in rows.items():
        if tensor not in tensors:
            raise ConfigError(f"{metadata.name} lacks the tensor {tensor}")
        found[key] = tensors[tensor].num_rows / each
    for key, size in found.items():
        if f"{name}.{key}" in metadata and (stated := metadata.integer(f"{name}.{key}")) != size:
            raise metadata.error(f"{name}.{key}", f"must be {size:g}, as the tensors are", stated)


def rename(stored: str, architecture: Architecture) -> tuple[str, str]:
    """Our name of a tensor, and the key under which tables know it. One that is not known keeps its name."""
    words = stored.split(".")
    layer = ""
    if len(words) == 4 and words[0] == "blk" and words[1].isdecimal():
        layer, words = words[1], words[2:]
    known = architecture.names.get(words[0])
    if len(words) != 2 or known is None or ("{}" in known) != bool(layer):
        return stored, ""
    return f"{known.format(layer)}.{words[1]}", words[0]


def _decoder(metadata: Metadata, name: str, tensors: Tensors) -> Config:
    """Keys that llama and its relatives share."""
    if metadata.integer(f"{name}.expert_count", 0, minimum=0):
        raise ConfigError(f"{metadata.name}: {name}.expert_count says experts, which are not supported")
    heads = metadata.integer(f"{name}.attention.head_count")
    hidden = metadata.integer(f"{name}.embedding_length")
    head_dim = metadata.integer(f"{name}.attention.key_length", max(1, hidden // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.integer(f"{name}.{key}", head_dim) != head_dim:
            raise metadata.error(
                f"{name}.{key}", f"must be the size of a head, {head_dim}", metadata.integer(f"{name}.{key}")
            )
    rows = {"attention.head_count": ("blk.0.attn_q.weight", head_dim)}
    rows |= {
        "attention.head_count_kv": ("blk.0.attn_k.weight", head_dim),
        "feed_forward_length": ("blk.0.ffn_up.weight", 1),
    }
    _check_sizes(metadata, name, tensors, rows)
    return {
        "hidden_size": hidden,
        "intermediate_size": metadata.integer(f"{name}.feed_forward_length"),
        "num_hidden_layers": metadata.integer(f"{name}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer(f"{name}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.integer(f"{name}.context_length"),
        "rms_norm_eps": metadata.number(f"{name}.attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(metadata, name, tensors),
    }


def _rope(metadata: Metadata, name: str, tensors: Tensors) -> Config:
    prefix = f"{name}.rope.scaling."
    parameters: Config = {"rope_type": "default", "rope_theta": metadata.number(f"{name}.rope.freq_base", 10000.0)}
    kind = metadata.text(f"{prefix}type", "linear" if f"{name}.rope.scale_linear" in metadata else "none")
    if ROPE_FACTORS in tensors:
        if kind != "none":
            raise ConfigError(
                f"{metadata.name}: {prefix}type {kind!r} beside the tensor {ROPE_FACTORS} is not supported"
            )
        return {**parameters, "rope_type": "factors"}  # the numbers are a tensor, so whoever opens the file adds them
    if kind == "none":
        return parameters
    if kind not in ("linear", "yarn"):
        raise ConfigError(f"{metadata.name}: {prefix}type {kind!r} is not supported; supported: none, linear, yarn")
    factor = metadata.number(f"{prefix}factor", metadata.number(f"{name}.rope.scale_linear", 1.0))
    parameters |= {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        optional = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow", "attention_factor": "attn_factor"}
        parameters["original_max_position_embeddings"] = metadata.integer(f"{prefix}original_context_length")
        parameters |= {
            ours: metadata.number(prefix + key) for ours, key in optional.items() if prefix + key in metadata
        }
    return parameters


def _llama(metadata: Metadata, name: str, tensors: Tensors) -> Config:
    biases = {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_gate.bias" in tensors}
    windows: Config = {}
    if window := metadata.integer(f"{name}.attention.sliding_window", 0, minimum=0):
        windows = {"architectures": [ARCHITECTURES["mistral"].model], "sliding_window": window}
    return {**_decoder(metadata, name, tensors), **biases, **windows}


def _mistral(metadata: Metadata, name: str, tensors: Tensors) -> Config:
    window = metadata.integer(f"{name}.attention.sliding_window", 0, minimum=0)
    return {**_decoder(metadata, name, tensors), **({"sliding_window": window} if window else {})}


def _gemma3(metadata: Metadata, name: str, tensors: Tensors) -> Config:
    """llama.cpp's constants are in its code: every sixth layer sees everything, the others' rotary base is 10,000, and
    the attention's scale is that of a head's size but for 27B, whose 62 layers tell it."""
    config = _decoder(metadata, name, tensors)
    rope, hidden, heads = config["rope_parameters"], config["hidden_size"], config["num_attention_heads"]
    softcap = f"{name}.final_logit_softcapping"
    return {
        **config,
        "rope_parameters": {"full_attention": rope, "sliding_attention": {"rope_theta": 10000.0}},
        "sliding_window": metadata.integer(f"{name}.attention.sliding_window"),
        "query_pre_attn_scalar": hidden // heads if config["num_hidden_layers"] == 62 else config["head_dim"],
        **({"final_logit_softcapping": metadata.number(softcap)} if softcap in metadata else {}),
    }


def _gpt2(metadata: Metadata, name: str, tensors: Tensors) -> Config:
    rows = {"context_length": ("position_embd.weight", 1), "feed_forward_length": ("blk.0.ffn_up.weight", 1)}
    _check_sizes(metadata, name, tensors, rows)
    return {
        "n_embd": metadata.integer(f"{name}.embedding_length"),
        "n_layer": metadata.integer(f"{name}.block_count"),
        "n_head": metadata.integer(f"{name}.attention.head_count"),
        "n_positions": metadata.integer(f"{name}.context_length"),
        "n_inner": metadata.integer(f"{name}.feed_forward_length"),
        "layer_norm_epsilon": metadata.number(f"{name}.attention.layer_norm_epsilon"),
    }


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", _llama, _DECODER, in_pairs=("attn_q", "attn_k")),
    "mistral": Architecture("MistralForCausalLM", _mistral, _DECODER, in_pairs=("attn_q", "attn_k")),
    "qwen2": Architecture("Qwen2ForCausalLM", _decoder, _DECODER),
    "qwen3": Architecture("Qwen3ForCausalLM", _decoder, _DECODER),
    "gemma3": Architecture("Gemma3ForCausalLM", _gemma3, _GEMMA3, norms_plus_one=True),
    "gpt2": Architecture("GPT2LMHeadModel", _gpt2, _GPT2, transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down")),
}
"""By ``general.architecture``."""
