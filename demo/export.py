#!/usr/bin/env python3
"""Write a trained model in the layout of transformers (also usable on a checkpoint of a running training).

python demo/export.py build/demo exported          # work directory of train.py, folder to write
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from corpus import END, END_OF_TEXT
from safetensors.torch import save_file
from tokenizer import write_tokenizer_config
from tokenizers import Tokenizer

from model import LanguageModel, ModelConfig


def llama_config(c: ModelConfig, end_of_text: int) -> dict:
    """config.json: the names which transformers' LlamaConfig has for our dimensions."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_position_embeddings,
        "rope_theta": c.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": c.rms_norm_eps,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
        "use_cache": True,
    }


def export(model: LanguageModel, tokenizer_path: Path, output: Path) -> None:
    """Write weights, configuration and tokenizer to the folder `output`."""
    output.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(tokenizer_path, output / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    end_of_text, end = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(END)
    weights = {name: p.detach().bfloat16().contiguous() for name, p in model.named_parameters()}
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    (output / "model.safetensors").chmod(0o644)  # safetensors lets only the owner read it
    generation = {
        "bos_token_id": end_of_text,
        "eos_token_id": [end_of_text, end],
        "pad_token_id": end_of_text,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.95,
    }
    config = llama_config(model.config, end_of_text)
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (output / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    write_tokenizer_config(output, model.config.max_position_embeddings)


def main() -> None:
    """Export the checkpoint of a work directory."""
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    work, output = Path(sys.argv[1]), Path(sys.argv[2])
    path = work / "tokenizer.json"
    model = LanguageModel(ModelConfig(vocab_size=Tokenizer.from_file(str(path)).get_vocab_size()))
    state = torch.load(work / "checkpoint.pt", weights_only=True, map_location="cpu")
    model.load_state_dict(state["model"])
    export(model, path, output)
    print(f"step {state['step']}, {state['tokens']} tokens, {state['elapsed'] / 60:.1f} minutes")


if __name__ == "__main__":
    main()
