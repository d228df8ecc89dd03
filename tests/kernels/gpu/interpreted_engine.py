"""Greedy tokens of a model folder from the whole engine on a CPU, its kernels in Triton's interpreter, as JSON.

A process of its own: python interpreted_engine.py FOLDER PROMPTS.json NUM_TOKENS
"""

from __future__ import annotations

import json
import os
import sys

os.environ["FLASHSERVE_KERNELS"] = "triton"

from flashserve import LLM
from triton_interpreter import import_interpreted


def main() -> None:
    folder, prompts, num_tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    import_interpreted()
    settings = {"device": "cpu", "dtype": "float32", "num_threads": 1, "max_model_len": 96, "max_num_seqs": 4}
    with LLM(folder, kv_cache_memory_bytes=1 << 20, max_num_batched_tokens=24, **settings) as llm:
        params = {"temperature": 0, "max_tokens": num_tokens, "ignore_eos": True}
        print(json.dumps([result.token_ids for result in llm.generate(prompts, params)]))


if __name__ == "__main__":
    main()
