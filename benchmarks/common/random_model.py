"""Makes a model of a well-known shape with random weights, for measuring speed where no weights can be had.

The tokenizer is byte-level with as many tokens as the model has, so text goes in and comes out (as nonsense).
"""

from __future__ import annotations

import itertools
import json
import string
from pathlib import Path

from benchmarks.common.arguments import CACHE
from benchmarks.common.shapes import SHAPES


def make_random_model(shape: str, folder: Path | None = None) -> Path:
    """Write a Llama of that shape in bfloat16 to ``folder``, unless it is there already; without one, to the cache."""
    folder = folder or CACHE / "models" / shape
    if (folder / "tokenizer_config.json").is_file():
        return folder
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    print(f"making {shape} with random weights in {folder}", flush=True)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # else a 1.1B model takes 4.4 GB on the way
    settings = {key: value for key, value in SHAPES[shape].items() if key not in ("model_type", "architectures")}
    try:
        # 0.08 rather than 0.02: logits of some spread, as a trained model's.
        model = LlamaForCausalLM(LlamaConfig(**settings, bos_token_id=None, eos_token_id=0, initializer_range=0.08))
    finally:
        torch.set_default_dtype(default)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    write_tokenizer(folder, settings["vocab_size"])
    return folder


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level tokenizer whose every id stands for some text: 3 special tokens, 256 bytes, then three letters each,
    which are written and never read."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = ("".join(letters) for letters in itertools.product(string.ascii_letters, repeat=3))
    texts = itertools.chain(specials, sorted(pre_tokenizers.ByteLevel.alphabet()), letters)
    vocab = {text: number for number, text in enumerate(itertools.islice(texts, vocab_size))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": specials[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
