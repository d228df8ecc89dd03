"""Writes a Llama checkpoint as GGUF in bfloat16: python write_gguf.py MODEL_FOLDER FILE.gguf

The tokenizer stays behind; token ids go in and come out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


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
    for name, bits in read_safetensors(folder):
        target = gguf_name(name)
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


def gguf_name(name: str) -> str:
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face rotates (i, i + D/2), llama.cpp (2i, 2i + 1): reorder the rows of each head."""
    rows, columns = weight.shape
    return np.ascontiguousarray(weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2)).reshape(
        rows, columns
    )


def read_safetensors(folder: Path) -> list[tuple[str, np.ndarray]]:
    """Each tensor's name and its bfloat16 bits, memory-mapped."""
    tensors = []
    for shard in sorted(folder.glob("*.safetensors")):
        header_size = int(np.fromfile(shard, dtype="<u8", count=1)[0])
        header = json.loads(np.fromfile(shard, dtype=np.uint8, count=header_size, offset=8).tobytes())
        data = np.memmap(shard, dtype=np.uint8, mode="r", offset=8 + header_size)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "BF16":
                raise SystemExit(f"{name} is {entry['dtype']}; only bfloat16 checkpoints are written")
            begin, end = entry["data_offsets"]
            tensors.append((name, data[begin:end].view(np.uint16).reshape(entry["shape"])))
    return tensors


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
