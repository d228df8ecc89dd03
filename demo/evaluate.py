#!/usr/bin/env python3
"""Bits per byte of the demo model on the held-out files: some minutes on two cores."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from corpus import END_OF_TEXT, load_corpus
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoModelForCausalLM

WEIGHTS = Path(__file__).resolve().parent.parent / "model_repository/demo/1/weights"
WINDOW, STRIDE = 2048, 1024


@torch.no_grad()
def bits_of(model, ids: torch.Tensor) -> float:
    """What the tokens after the first cost, in windows of which (but for the first) the later half is scored."""
    nats, done = 0.0, 1
    while done < len(ids):
        end = min(len(ids), done + (STRIDE if done > 1 else WINDOW - 1))
        window = ids[max(0, end - WINDOW) : end]
        logits = model(window[None, :-1]).logits[0].float()
        nats += cross_entropy(logits[done - end :], window[done - end :], reduction="sum").item()
        done = end
    return nats / math.log(2)


def main() -> None:
    """Evaluate and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=WEIGHTS)
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    separator, bits, size = tokenizer.token_to_id(END_OF_TEXT), 0.0, 0
    for file in tqdm(load_corpus().held_out, mininterval=10):
        ids = [separator, *tokenizer.encode(file.text, add_special_tokens=False).ids]
        bits, size = bits + bits_of(model, torch.tensor(ids)), size + len(file.text.encode())
    print(f"{bits / size:.4f} bits per byte of {size} bytes")


if __name__ == "__main__":
    main()
