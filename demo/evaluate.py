#!/usr/bin/env python3
"""Evaluate the demo model on the held-out files; writes demo/results.json.

    python demo/evaluate.py            # everything: 10 to 20 minutes on two cores
    python demo/evaluate.py loss       # or only some of: loss, baseline, completions

loss         bits per byte of the model on the held-out files
baseline     the same of 5-gram models (modified Kneser-Ney) of the training files, over bytes and tokens
completions  sampled completions of held-out function heads: how many are Python
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from corpus import END_OF_TEXT, Corpus, functions_of, load_corpus
from ngram import KneserNey
from parsing import check
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

WINDOW, STRIDE = 2048, 1024
BATCH = 25


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="loss, baseline, completions (default: all of them)")
    parser.add_argument("--model", type=Path, default=root / "model_repository/demo/1/weights")
    parser.add_argument("--results", type=Path, default=root / "demo/results.json")
    parser.add_argument("--samples", type=Path, help="write the text of all completions to this file")
    parser.add_argument("--completions", type=int, default=200, help="how many heads (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7, help="default: %(default)s")
    parser.add_argument("--top-p", type=float, default=0.95, help="default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch (default: %(default)s)")
    return parser.parse_args()


def held_out_bytes(corpus: Corpus) -> int:
    """The size of the held-out half."""
    return sum(len(file.text.encode()) for file in corpus.held_out)


@torch.no_grad()
def model_loss(model, tokenizer: Tokenizer, corpus: Corpus) -> dict:
    """Bits per byte in windows of 2048 tokens, of which (but for the first) the later 1024 are scored."""
    separator, nats, tokens = tokenizer.token_to_id(END_OF_TEXT), 0.0, 0
    for file in tqdm(corpus.held_out, desc="loss", mininterval=10):
        ids = torch.tensor([separator, *tokenizer.encode(file.text, add_special_tokens=False).ids])
        done = 1  # the separator is given
        while done < len(ids):
            end = min(len(ids), done + (STRIDE if done > 1 else WINDOW - 1))
            window = ids[max(0, end - WINDOW) : end]
            logits = model(window[None, :-1]).logits[0].float()
            scored = end - done
            nats += cross_entropy(logits[-scored:], window[-scored:], reduction="sum").item()
            tokens, done = tokens + scored, end
    size = held_out_bytes(corpus)
    return {
        "files": len(corpus.held_out),
        "bytes": size,
        "tokens": tokens,
        "nats_per_token": round(nats / tokens, 4),
        "bits_per_byte": round(nats / math.log(2) / size, 4),
    }


def baseline(tokenizer: Tokenizer, corpus: Corpus) -> dict:
    """Bits per byte of the two 5-gram models."""

    def as_bytes(files: list) -> list[np.ndarray]:
        return [np.frombuffer(file.text.encode(), dtype=np.uint8) for file in files]

    def as_tokens(files: list) -> list[np.ndarray]:
        return [np.array(tokenizer.encode(file.text, add_special_tokens=False).ids) for file in files]

    size, results = held_out_bytes(corpus), {}
    separator = tokenizer.token_to_id(END_OF_TEXT)
    for name, encode, vocab, start in (
        ("bytes", as_bytes, 257, 256),
        ("tokens", as_tokens, tokenizer.get_vocab_size(), separator),
    ):
        model = KneserNey(vocab, start)
        model.fit(encode(corpus.train))
        results[name] = round(model.bits_total(encode(corpus.held_out)) / size, 4)
    return {"order": 5, "bits_per_byte": results}


def held_out_heads(corpus: Corpus, count: int) -> tuple[list[str], int]:
    """Heads of functions of held-out files, and how many of them (the first) are of top-level functions.

    All of those are taken, and then methods (moved to the margin), evenly from all files, up to `count`.
    A head which a training file has as well, such as `def setUp(self):`, is left out; no head comes twice.
    """
    known = {f.head for file in corpus.train for f in functions_of(file, max_lines=10_000)}
    heads: tuple[dict[str, None], dict[str, None]] = ({}, {})
    for file in corpus.held_out:
        for function in functions_of(file, max_lines=10_000):
            if function.head not in known:
                heads[0 if function.top_level else 1].setdefault(function.head)
    functions = list(heads[0])[:count]
    methods = [head for head in heads[1] if head not in heads[0]]
    missing = min(count - len(functions), len(methods))
    return functions + [methods[i * len(methods) // missing] for i in range(missing)], len(functions)


@torch.no_grad()
def complete(model, tokenizer, prompts: list[str], args: argparse.Namespace) -> list[tuple[str, bool]]:
    """Sample a completion of every prompt; True where the model ended it itself."""
    torch.manual_seed(args.seed)
    stops, out = model.generation_config.eos_token_id, []
    for start in tqdm(range(0, len(prompts), BATCH), desc="completions", mininterval=10):
        texts = [END_OF_TEXT + prompt for prompt in prompts[start : start + BATCH]]
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        ids = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=True,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=0,
            max_new_tokens=args.max_new_tokens,
        )
        for row in ids[:, batch["input_ids"].shape[1] :].tolist():
            length = next((i for i, token in enumerate(row) if token in stops), len(row))
            out.append((tokenizer.decode(row[:length]), length < len(row)))
    return out


def completions(model, tokenizer, corpus: Corpus, args: argparse.Namespace) -> dict:
    """How many of the completions are Python; see parsing.py for what counts."""
    heads, top_level = held_out_heads(corpus, args.completions)
    sampled = complete(model, tokenizer, heads, args)
    verdicts = [check(head, text, ended) for head, (text, ended) in zip(heads, sampled, strict=True)]
    if args.samples:
        shown = [
            f"##### {v.reason} {'ended' if ended else 'cut'}\n{head}{text}\n"
            for head, (text, ended), v in zip(heads, sampled, verdicts, strict=True)
        ]
        args.samples.write_text("\n".join(shown))
    n, good = len(heads), [v.parsed and v.has_code for v in verdicts]
    return {
        "heads": n,
        "top_level": top_level,
        "seed": args.seed,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_new_tokens": args.max_new_tokens,
        "ended_by_model": sum(ended for _, ended in sampled),
        "parsed": sum(v.parsed for v in verdicts),
        "parsed_rate": round(sum(v.parsed for v in verdicts) / n, 4),
        "parsed_with_more_than_a_docstring": sum(good),
        "of_these_top_level": sum(good[:top_level]),
        "parsed_with_more_than_a_docstring_rate": round(sum(good) / n, 4),
    }


def main() -> None:
    """Run the parts asked for and merge them into the results."""
    args = parse_arguments()
    parts = args.parts or ["loss", "baseline", "completions"]
    torch.set_num_threads(args.threads)
    corpus = load_corpus()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    results = json.loads(args.results.read_text()) if args.results.exists() else {}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    if "loss" in parts:
        results["loss"] = model_loss(model, tokenizer, corpus)
    if "baseline" in parts:
        results["baseline"] = baseline(tokenizer, corpus)
    if "completions" in parts:
        fast = AutoTokenizer.from_pretrained(args.model, padding_side="left")
        results["completions"] = completions(model, fast, corpus, args)
    results["parameters"] = sum(p.numel() for p in model.parameters())
    args.results.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
