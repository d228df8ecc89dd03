"""Writes a Llama checkpoint as GGUF in bfloat16: python write_gguf.py MODEL_FOLDER FILE.gguf

The tokenizer stays behind; token ids go in and come out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf.utility import SafetensorsLocal


def write_gguf(folder: Path, file: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, bits in read_safetensors(folder):
        target = names.get_name(name, try_suffixes=(".weight",))
        if target.endswith("norm.weight"):
            # llama.cpp keeps vectors in float32; the upper half of a float32 is the bfloat16.
            writer.add_tensor(target, (bits.astype(np.uint32) << 16).view(np.float32))
            continue
        if "attn_q" in target or "attn_k" in target:
            bits = interleave(bits, heads if "attn_q" in target else kv_heads)
        writer.add_tensor(target, bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face rotates (i, i + D/2), llama.cpp (2i, 2i + 1): reorder the rows of each head."""
    rows, columns = weight.shape
    return np.ascontiguousarray(weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2)).reshape(
        rows, columns
    )


def read_safetensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor's name and its bfloat16 bits, memory-mapped."""
    for shard in sorted(folder.glob("*.safetensors")):
        for name, tensor in SafetensorsLocal(shard).tensors.items():
            if tensor.dtype != "BF16":
                raise SystemExit(f"{name} is {tensor.dtype}; only bfloat16 checkpoints are written")
            yield name, tensor.mmap_bytes().view(np.uint16).reshape(tensor.shape)


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
