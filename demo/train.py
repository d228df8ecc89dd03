#!/usr/bin/env python3
"""Train the demo model: a small Llama on the source of the Python standard library.

    python demo/train.py --minutes 60                  # the budget decides the number of steps
    python demo/train.py --steps 727                   # a fixed number of steps: nothing depends on the clock
    python demo/train.py --minutes 60 --resume         # go on from the last checkpoint

glibc gives large blocks back to the kernel at once, and a step spends much of its time on page faults;
MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184 in the environment avoids it
(about 10000 tokens/s instead of 7000 to 9000 on two idle cores).

The tokenizer, the checkpoints and the log stay in --work-dir; the finished model is written to --output.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from corpus import Corpus, load_corpus
from data import MIXES, Stream, build_documents, held_out_chunks
from export import export
from tokenizer import train_tokenizer
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from model import LanguageModel, ModelConfig

# Attention is 39% of the time of a step at 1024 tokens, and its share grows with the length of a row;
# single functions need no more than 512. Hence the training runs through contexts of growing length:
# (fraction of the schedule at which it ends, length of a row).
CONTEXTS = ((0.8, 512), (0.95, 1024), (1.01, 2048))
# The fraction of the schedule from which the second of the two mixes of documents is read.
SECOND_MIX = 0.28
# What one thread works on at a time. Every thread has a core for itself and takes the next part when it
# is done: where other programs use the cores too, threads which share each operation wait for the slowest
# one at every operation (with one of two cores busy: about 1000 tokens/s, against 2500 this way).
PART_TOKENS = 2048


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output",
        type=Path,
        default=root / "model_repository/demo/1/weights",
        help="where the finished model goes (default: %(default)s)",
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=root / "build/demo",
        help="where tokenizer, checkpoints and log go (default: %(default)s)",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, default=60.0, help="wall-clock budget (default: 60)")
    budget.add_argument("--steps", type=int, help="number of steps, instead of a budget of time")
    parser.add_argument("--tokens-per-step", type=int, default=8192, help="default: %(default)s")
    parser.add_argument(
        "--lr",
        type=float,
        default=0.005,
        help="peak rate of Muon, for the matrices of the layers (default: %(default)s)",
    )
    parser.add_argument(
        "--adam-lr",
        type=float,
        default=0.003,
        help="peak rate of AdamW, for embedding and norms (default: %(default)s)",
    )
    parser.add_argument("--weight-decay", type=float, default=0.1, help="default: %(default)s")
    parser.add_argument("--warmup-steps", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=20240229, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="parts of a batch at once (default: %(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work-dir")
    return parser.parse_args()


def rate(step: int, fraction: float, warmup: int) -> float:
    """The learning rate relative to its peak: linear warmup, constant to 40%, linear to zero."""
    return min(1.0, (step + 1) / warmup) * min(1.0, max(0.0, (1 - fraction) / 0.6))


def context_at(fraction: float) -> int:
    """The length of a row at this fraction of the schedule."""
    return next(length for end, length in CONTEXTS if fraction < end)


def build_optimizers(model: LanguageModel, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, which learn faster per token by it; AdamW for the rest."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    # One Muon for each thread: orthogonalising the updates is a tenth of the work of a step.
    muons = [
        torch.optim.Muon(
            matrices[i :: args.threads],
            lr=args.lr,
            momentum=0.95,
            nesterov=True,
            weight_decay=args.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        for i in range(args.threads)
    ]
    adam = torch.optim.AdamW(rest, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [*muons, adam]


class Trainer:
    """The state of a run and what advances it."""

    def __init__(self, args: argparse.Namespace, corpus: Corpus, tokenizer: Tokenizer) -> None:
        self.args, self.tokenizer = args, tokenizer
        torch.manual_seed(args.seed)
        self.model = LanguageModel(ModelConfig(vocab_size=tokenizer.get_vocab_size()))
        self.optimizers = build_optimizers(self.model, args)
        self.peaks = [group["lr"] for o in self.optimizers for group in o.param_groups]
        self.documents = build_documents(corpus, tokenizer, args.seed)
        self.mix = 0
        self.stream = Stream(self.documents.mixture(MIXES[0]), args.seed)
        self.hidden = self.model.model if args.no_compile else torch.compile(self.model.model, dynamic=False)
        # A sample of the held-out files, for the log only; evaluate.py reads them all.
        self.sample = list(held_out_chunks(corpus, tokenizer, 512))[::16][:64]
        self.pool = ThreadPoolExecutor(args.threads, initializer=torch.set_num_threads, initargs=(1,))
        self.compiled: set[int] = set()
        self.step, self.tokens, self.elapsed = 0, 0, 0.0

    @property
    def checkpoint_path(self) -> Path:
        """The only checkpoint: the newest."""
        return self.args.work_dir / "checkpoint.pt"

    def fraction(self) -> float:
        """How much of the schedule is done."""
        done = self.step / self.args.steps if self.args.steps else self.elapsed / (60 * self.args.minutes)
        return min(done, 1.0)

    def save(self) -> None:
        """Write a checkpoint, replacing the last one only when it is complete."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
            "tokens": self.tokens,
            "elapsed": self.elapsed,
            "mix": self.mix,
            "stream": (self.stream.epoch, self.stream.offset),
        }
        partial = self.checkpoint_path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint_path)

    def load(self) -> None:
        """Go on from the checkpoint."""
        state = torch.load(self.checkpoint_path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.tokens, self.elapsed = state["step"], state["tokens"], state["elapsed"]
        self.choose_mix(state.get("mix", 0))
        self.stream.seek(*state["stream"])

    def choose_mix(self, mix: int) -> None:
        """Read this mix of documents from now on."""
        if mix != self.mix:
            self.mix, self.stream = mix, Stream(self.documents.mixture(MIXES[mix]), self.args.seed)

    def gradients(self, ids: Tensor, targets: Tensor) -> tuple[float, tuple[Tensor, ...]]:
        """Loss and gradients of a part of a batch."""
        loss = self.model.loss(self.hidden(ids), targets)
        return loss.item(), torch.autograd.grad(loss, list(self.model.parameters()))

    def advance(self) -> float:
        """One step; returns its loss in nats per token."""
        fraction = self.fraction()
        length = context_at(fraction)
        self.choose_mix(int(fraction >= SECOND_MIX))
        ids, targets = self.stream.batch(self.args.tokens_per_step // length, length)
        rows = PART_TOKENS // length
        parts = list(zip(ids.split(rows), targets.split(rows), strict=True))
        if length not in self.compiled:  # compile in one thread
            self.gradients(*parts[0])
            self.compiled.add(length)
        results = list(self.pool.map(lambda part: self.gradients(*part), parts))
        for i, p in enumerate(self.model.parameters()):
            p.grad = sum(gradients[i] for _, gradients in results) / len(results)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        groups = [group for o in self.optimizers for group in o.param_groups]
        for group, peak in zip(groups, self.peaks, strict=True):
            group["lr"] = peak * rate(self.step, fraction, self.args.warmup_steps)
        list(self.pool.map(lambda optimizer: optimizer.step(), self.optimizers))
        self.step += 1
        self.tokens += ids.numel()
        return sum(loss for loss, _ in results) / len(results)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Loss on the sample of held-out files, in nats per token."""
        ids = torch.tensor(self.sample)
        losses = [self.model(part[:, :-1], part[:, 1:]).item() for part in ids.split(4)]
        return sum(losses) / len(losses)

    def run(self) -> None:
        """Train to the end of the schedule, with a checkpoint and a line of log every two minutes."""
        log = (self.args.work_dir / "log.jsonl").open("a", encoding="utf-8")
        start, last, smooth = time.monotonic() - self.elapsed, time.monotonic(), math.nan
        bar = tqdm(
            total=1000,
            initial=int(1000 * self.fraction()),
            mininterval=10,
            ascii=True,
            bar_format="{percentage:5.1f}% [{elapsed}<{remaining}] {postfix}",
        )
        while self.fraction() < 1.0:
            loss = self.advance()
            smooth = loss if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss
            self.elapsed = time.monotonic() - start
            speed = self.tokens / self.elapsed
            bar.set_postfix_str(f"step {self.step} loss {smooth:.3f} {speed:.0f} tokens/s", refresh=False)
            bar.update(int(1000 * self.fraction()) - bar.n)
            if time.monotonic() - last > 120 or self.fraction() >= 1.0:
                record = {
                    "step": self.step,
                    "tokens": self.tokens,
                    "seconds": round(self.elapsed),
                    "mix": self.mix,
                    "epoch": self.stream.epoch,
                    "train_loss": round(smooth, 4),
                    "held_out_loss": round(self.held_out_loss(), 4),
                }
                log.write(json.dumps(record) + "\n")
                log.flush()
                self.save()
                last = time.monotonic()
        bar.close()
        log.close()


def main() -> None:
    """Train and export."""
    args = parse_arguments()
    torch.set_num_threads(1)  # threads work on parts of a batch instead
    args.work_dir.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus()
    path = args.work_dir / "tokenizer.json"
    if not (args.resume and path.exists()):
        train_tokenizer([file.text for file in corpus.train]).save(str(path))
    tokenizer = Tokenizer.from_file(str(path))
    trainer = Trainer(args, corpus, tokenizer)
    if args.resume and trainer.checkpoint_path.exists():
        trainer.load()
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(
        f"{parameters / 1e6:.2f} million parameters; {len(corpus.train)} files for training, "
        f"{len(corpus.held_out)} held out; tokens by kind: {trainer.documents.tokens()}",
        flush=True,
    )
    trainer.run()
    summary = {
        "parameters": parameters,
        "steps": trainer.step,
        "tokens": trainer.tokens,
        "minutes": round(trainer.elapsed / 60, 1),
        "tokens_by_kind": trainer.documents.tokens(),
        "config": dataclasses.asdict(trainer.model.config),
    }
    (args.work_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    export(trainer.model, path, args.output)


if __name__ == "__main__":
    main()
