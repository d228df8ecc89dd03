"""64 requests that ask for all there is, in one engine that is too small for them: some leave, some are preempted."""

from __future__ import annotations

import itertools
import json
import random
import time

import jsonschema
import pytest

from flashserve import LLM
from flashserve.pooling_params import parse_pooling_params
from flashserve.protocol import Abort, GenerateRequest, SamplingParams, TokenOutput
from flashserve.sampling_params import parse_sampling_params
from flashserve.scheduling.scheduler import Scheduler
from flashserve.text.completion import Completion
from flashserve.text.words import with_word_ids

PLACE = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "size": {"enum": ["small", "large"]}},
    "required": ["city", "size"],
    "additionalProperties": False,
}
PLAIN = {"temperature": 0, "max_tokens": 30, "ignore_eos": True}
WISHES = (
    {"n": 3, "temperature": 1, "seed": 1, "max_tokens": 20, "ignore_eos": True},
    {"logprobs": 3, "prompt_logprobs": 2, "max_tokens": 12},
    {"presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.3, "max_tokens": 25, "n": 2},
    {"logit_bias": {"40": 5, "41": -100}, "bad_words": ["a", "b c"], "max_tokens": 25, "temperature": 1, "seed": 2},
    {
        "dry_multiplier": 0.8,
        "xtc_probability": 0.5,
        "xtc_threshold": 0.1,
        "temperature": 1,
        "seed": 3,
        "max_tokens": 25,
    },
    {"structured_outputs": {"json": PLACE, "close_json": True}, "temperature": 1, "seed": 4, "max_tokens": 60, "n": 2},
    {"structured_outputs": {"regex": "[a-c]{5,30}"}, "temperature": 1, "seed": 5, "max_tokens": 40},
    {"allowed_token_ids": list(range(40, 60)), "temperature": 1, "seed": 6, "max_tokens": 25},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.01, "min_tokens": 5, "stop_token_ids": [60], "seed": 7, "max_tokens": 25},
    {"pooling": "mean"},
    {"pooling": "last"},
)


def requests_of(llm: LLM, rng: random.Random, ids: itertools.count[int]) -> list[GenerateRequest]:
    """64, every third of which is plain and greedy; prompts share beginnings, salts and priorities differ."""
    beginnings = [[rng.randrange(3, 250) for _ in range(40)] for _ in range(3)]
    requests = []
    for index in range(64):
        own = [rng.randrange(3, 250) for _ in range(rng.randrange(30))]
        prompt = rng.choice(beginnings)[: rng.randrange(20, 40)] + own
        wishes = dict(PLAIN if index % 3 == 0 else WISHES[index % len(WISHES)])
        pooling = {"pooling": wishes.pop("pooling")} if "pooling" in wishes else None
        sampling = SamplingParams(max_tokens=0) if pooling else parse_sampling_params(wishes)
        requests.append(
            GenerateRequest(
                next(ids),
                prompt,
                with_word_ids(sampling, llm.tokenizer, llm.limits),
                time.monotonic(),
                priority=rng.choice((0, 0, 5)),
                cache_salt=rng.choice(("", "", "salt")),
                pooling=None if pooling is None else parse_pooling_params(pooling, llm.limits.hidden_size),
                return_progress=index % 5 == 0,
            )
        )
    return requests


@pytest.fixture(scope="module")
def llm(folder):
    """26 blocks of 16 tokens, where each request wants up to 8."""
    settings = {"max_num_seqs": 12, "max_num_batched_tokens": 64, "max_model_len": 256, "num_gpu_blocks_override": 26}
    with LLM(folder, dtype="float32", num_threads=1, watermark=0.0, **settings) as engine:
        yield engine


@pytest.mark.parametrize("seed", range(3))
def test_neighbours_are_left_alone_and_nothing_stays(seed, llm):
    rng, core, ids = random.Random(seed), llm._core, itertools.count(1000 * seed + 1)
    scheduler: Scheduler = core.scheduler
    requests = requests_of(llm, rng, ids)
    leaving = {request.request_id for request in requests if rng.random() < 0.25}
    preemptions = scheduler.stats().preemptions
    outputs: dict[int, list[TokenOutput]] = {request.request_id: [] for request in requests}
    open_ids, waiting = set(outputs), list(requests)
    while open_ids:
        for request in [waiting.pop(0) for _ in range(min(len(waiting), rng.randrange(4)))]:
            core.handle(request)
        for output in core.step().outputs:
            outputs[output.request_id].append(output)
            ends = sum(each.finish_reason is not None for each in outputs[output.request_id])
            if ends == next(r.params.n for r in requests if r.request_id == output.request_id):
                open_ids.discard(output.request_id)
        scheduler.check_integrity()
        started = [i for i in open_ids & leaving if outputs[i]]
        if started and rng.random() < 0.3:
            core.handle(Abort([leaver := rng.choice(started)]))
            leaving.discard(leaver)
    stats = scheduler.stats()
    assert stats.free_blocks == stats.total_blocks and not scheduler.has_requests
    assert stats.preemptions > preemptions
    for request in requests:
        check(llm, request, outputs[request.request_id])


def check(llm: LLM, request: GenerateRequest, outputs: list[TokenOutput]) -> None:
    """That a request got what it asked for, if it did not leave."""
    if any(output.finish_reason == "abort" for output in outputs):
        return
    assert not any(output.error for output in outputs), outputs
    if request.pooling is not None:
        assert outputs[-1].embedding is not None
        return
    texts = []
    for index in range(request.params.n):
        completion = Completion(llm.tokenizer, request)
        for output in outputs:
            if output.index == index:
                completion.take(output)
        texts.append((completion.delta().text, completion.token_ids))
    if request.params.temperature == 0:
        assert texts[0][1] == llm.generate([request.prompt_token_ids], PLAIN)[0].token_ids, request.request_id
    wanted = request.params.structured_outputs
    if wanted is not None and wanted.kind == "json":
        for text, _ in texts:
            jsonschema.validate(json.loads(text), PLACE)
    if request.params.logprobs is not None:
        tokens = [token for output in outputs if output.logprobs for token in output.logprobs.tokens]
        prompt = [token for output in outputs if output.logprobs for token in output.logprobs.prompt]
        assert len(tokens) == len(texts[0][1]) and len(prompt) == len(request.prompt_token_ids) - 1
