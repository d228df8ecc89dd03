"""GGUF files for tests: tiny models of every family, written by the format's own library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

gguf = pytest.importorskip("gguf", reason="the package gguf writes these files: `make install`")

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2")


def write_model(
    folder: Path,
    target: Path,
    quantize: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    architecture: str | None = None,
) -> Path:
    """A folder of ``tiny_models`` as GGUF, in float32.

    quantize: block types by a part of the tensor's name; extra: further metadata; tensors: further tensors.
    """
    config = json.loads((folder / "config.json").read_text())
    family = architecture or config["model_type"].removesuffix("_text")
    writer = gguf.GGUFWriter(target, family)
    _write_config(writer, config)
    _write_tokenizer(writer, folder)
    for key, value in (extra or {}).items():
        _add(writer, key.replace("ARCH", family), value)
    for name, tensor in load_file(folder / "model.safetensors").items():
        stored, values = _stored(name, tensor, config)
        kind = next((kind for part, kind in (quantize or {}).items() if part in stored), None)
        if kind is None:
            writer.add_tensor(stored, values.astype(np.float32))
        else:
            number = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(stored, gguf.quants.quantize(values.astype(np.float32), number), raw_dtype=number)
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _add(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string"}
    getattr(writer, kinds[type(value)])(key, value)


def _write_config(writer: Any, config: Mapping[str, Any]) -> None:
    if config["model_type"] == "gpt2":
        writer.add_context_length(config["n_positions"])
        writer.add_embedding_length(config["n_embd"])
        writer.add_block_count(config["n_layer"])
        writer.add_head_count(config["n_head"])
        writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        return
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if config["model_type"] in ("mistral", "gemma3_text"):
        writer.add_sliding_window(config["sliding_window"])


def _write_tokenizer(writer: Any, folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    special = {token["id"] for token in tokenizer["added_tokens"]}
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if index in special else 1 for index in range(len(tokens))])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_eos_token_id(0)
    writer.add_chat_template(json.loads((folder / "tokenizer_config.json").read_text())["chat_template"])


_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def _stored(name: str, values: np.ndarray, config: Mapping[str, Any]) -> tuple[str, np.ndarray]:
    """The file's name and form of a tensor, as llama.cpp's converter has it."""
    for prefix in ("model.layers.", "transformer.h."):
        if name.startswith(prefix):
            layer, _, rest = name.removeprefix(prefix).partition(".")
            module, _, leaf = rest.rpartition(".")
            if config["model_type"] == "gemma3_text" and module == "post_attention_layernorm":
                module = "post_attention_norm"
            if config["model_type"] in ("llama", "mistral") and module.endswith(("q_proj", "k_proj")):
                values = _in_pairs(values, config["head_dim"])
            if config["model_type"] == "gpt2" and values.ndim == 2:
                values = values.T
            return f"blk.{layer}.{_NAMES.get(module, module)}.{leaf}", _as_stored(values, module, config)
    module, _, leaf = name.rpartition(".")
    return f"{_NAMES[module]}.{leaf}", _as_stored(values, module, config)


def _as_stored(values: np.ndarray, module: str, config: Mapping[str, Any]) -> np.ndarray:
    """Gemma's norms have their 1 added."""
    plus_one = config["model_type"] == "gemma3_text" and module.endswith("norm")
    return np.ascontiguousarray(values) + (1 if plus_one else 0)


def _in_pairs(values: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head: the first of both halves, then the second of both, …"""
    halves = values.reshape(-1, 2, head_dim // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)
