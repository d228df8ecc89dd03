"""Makes a model of a well-known shape with random weights, for measuring speed where no weights can be had.

    python benchmarks/make_random_model.py smollm2-135m /tmp/smollm2

The tokenizer is byte-level with as many tokens as the model has, so text goes in and comes out (as nonsense).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

SHAPES = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    "tinyllama-1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
}


def make_random_model(shape: str, folder: Path) -> Path:
    """Write a Llama of that shape in bfloat16 to ``folder``, unless it is there already."""
    if (folder / "tokenizer_config.json").is_file():
        return folder
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tiny_models import write_byte_level_tokenizer

    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # else a 1.1B model takes 4.4 GB on the way
    try:
        # 0.08 rather than 0.02: logits of some spread, as a trained model's.
        config = LlamaConfig(**SHAPES[shape], bos_token_id=None, eos_token_id=0, initializer_range=0.08)
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    write_byte_level_tokenizer(folder, SHAPES[shape]["vocab_size"])
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    print(make_random_model(arguments.shape, arguments.folder))


if __name__ == "__main__":
    main()
