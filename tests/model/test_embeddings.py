"""Embeddings are the final hidden states of transformers, however a prompt is computed."""

import numpy as np
import pytest
import torch

from driver import Engine, load, random_prompts
from flashserve import LLM, PoolingParams
from flashserve.errors import InvalidArgument
from flashserve.pooling_params import EMBEDDING_PARAMS
from flashserve.protocol import Abort, GenerateRequest
from flashserve.text.embedding import embedding_of
from lazy_device import LazyCpu
from tiny_models import make_tiny_model

PROMPTS = random_prompts((1, 7, 40, 90), seed=3)
POOLINGS = ("last", "mean", "cls")


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request, tmp_path_factory):
    return make_tiny_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def hidden(folder):
    """Final hidden states of a prompt, [T, hidden] float32."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    def states(prompt):
        with torch.no_grad():
            return model(torch.tensor([prompt])).last_hidden_state[0].numpy()

    return states


def pooled(states, pooling):
    return {"last": states[-1], "mean": states.mean(0), "cls": states[0]}[pooling]


class Embedder(Engine):
    """Embeddings that come out of an engine, beside its tokens."""

    def __init__(self, runner):
        super().__init__(runner)
        self.embeddings = {}

    def embed(self, request_id, prompt, pooling):
        self.tokens[request_id] = []
        params = PoolingParams(pooling=pooling, normalize=False)
        self.core.handle(GenerateRequest(request_id, prompt, EMBEDDING_PARAMS, 0.0, pooling=params))

    def step(self):
        for output in self.core.step().outputs:
            assert output.error is None, output.error
            self.tokens[output.request_id] += output.token_ids
            if output.embedding is not None:
                assert (output.finish_reason, output.token_ids) == ("stop", [])
                self.embeddings[output.request_id] = np.frombuffer(output.embedding, "<f4")


SETTINGS = {"dtype": "float32", "max_num_seqs": 8, "max_num_batched_tokens": 32, "max_model_len": 256}


@pytest.mark.parametrize("how", ["recorded", "eager", "ahead", "torch"])
def test_they_equal_transformers_in_chunks_and_beside_generation(folder, hidden, how, monkeypatch):
    device = LazyCpu(1) if how == "ahead" else None
    if how == "torch":
        monkeypatch.setenv("FLASHSERVE_KERNELS", "torch")
    runner = load(folder, device, enforce_eager=how == "eager", **SETTINGS)
    assert runner.run_ahead == (how == "ahead")
    alone = Engine(runner).generate(PROMPTS, max_tokens=12)
    engine = Embedder(runner)
    requests = [(prompt, pooling) for prompt in PROMPTS for pooling in POOLINGS]
    for index, prompt in enumerate(PROMPTS):
        engine.add(index, prompt, max_tokens=12)
    for index, (prompt, pooling) in enumerate(requests):
        engine.embed(100 + index, prompt, pooling)
    engine.finish()
    for index, (prompt, pooling) in enumerate(requests):
        np.testing.assert_allclose(engine.embeddings[100 + index], pooled(hidden(prompt), pooling), atol=1e-3)
    assert [engine.tokens[index] for index in range(len(PROMPTS))] == alone
    engine.core.scheduler.check_integrity()
    assert engine.core.scheduler.stats().free_blocks == engine.core.scheduler.stats().total_blocks
    runner.close()


def test_a_known_prefix_is_read_where_the_pooling_allows_it(folder, hidden):
    runner = load(folder, **SETTINGS)
    engine, prompt = Embedder(runner), PROMPTS[3]
    engine.embed(0, prompt, "last")
    engine.finish()
    for index, (pooling, hits) in enumerate({"last": 80, "mean": 0, "cls": 0}.items(), 1):  # five blocks of 16
        before = engine.core.scheduler.stats().prefix_cache_hits
        engine.embed(index, prompt, pooling)
        engine.finish()
        assert engine.core.scheduler.stats().prefix_cache_hits - before == hits
        np.testing.assert_allclose(engine.embeddings[index], pooled(hidden(prompt), pooling), atol=1e-3)
    runner.close()


@pytest.mark.parametrize("ahead", [False, True])
def test_a_prompt_that_is_computed_again_is_summed_afresh(folder, hidden, ahead):
    """Memory for nine blocks: the decoding requests push the embedding out, which came last, in the middle of it."""
    settings = {**SETTINGS, "max_num_batched_tokens": 16, "max_model_len": 112, "enable_prefix_caching": False}
    runner = load(folder, LazyCpu(2) if ahead else None, num_gpu_blocks_override=9, watermark=0, **settings)
    engine, prompt = Embedder(runner), PROMPTS[3]
    for index in range(2):
        engine.add(index, PROMPTS[1], max_tokens=30)
    for _ in range(6):
        engine.step()
    engine.embed(9, prompt, "mean")
    engine.finish()
    assert engine.core.scheduler.stats().preemptions > 0
    np.testing.assert_allclose(engine.embeddings[9], pooled(hidden(prompt), "mean"), atol=1e-3)
    engine.core.scheduler.check_integrity()
    runner.close()


def test_one_that_is_aborted_half_way_leaves_nothing(folder):
    runner = load(folder, **SETTINGS)
    engine = Embedder(runner)
    engine.embed(0, PROMPTS[3], "mean")
    engine.step()
    engine.core.handle(Abort([0]))
    engine.finish()
    stats = engine.core.scheduler.stats()
    assert (engine.embeddings, stats.free_blocks) == ({}, stats.total_blocks)
    runner.close()


def test_offline(folder, hidden):
    with LLM(folder, num_threads=1, **SETTINGS) as llm:
        whole = random_prompts((256,))[0]
        texts = ["def f(", "a red fox", whole]  # one may fill the context: nothing follows
        for result, text in zip(llm.embed(texts), texts, strict=True):
            ids = llm.tokenizer.encode(text) if isinstance(text, str) else text
            expected = hidden(ids)[-1]
            assert result.prompt_token_ids == ids
            np.testing.assert_allclose(result.embedding, expected / np.linalg.norm(expected), atol=1e-3)
        short = llm.embed("def f(", {"pooling": "MEAN", "dimensions": 8})[0].embedding
        expected = hidden(llm.tokenizer.encode("def f(")).mean(0)[:8]
        np.testing.assert_allclose(short, expected / np.linalg.norm(expected), atol=1e-3)
        raw = llm.embed("def f(", PoolingParams(dimensions=8, normalize=False))[0].embedding
        np.testing.assert_allclose(raw, hidden(llm.tokenizer.encode("def f("))[-1][:8], atol=1e-3)
        for params, words in [
            ({"dimensions": 65}, r"dimensions must be an integer in \[1, 64\]"),
            ({"pooling": "max"}, "pooling must be last, mean, cls"),
            ({"normalize": "maybe"}, "normalize must be true or false"),
            ({"size": 3}, "unknown key 'size'"),
        ]:
            with pytest.raises(InvalidArgument, match=words):
                llm.embed("a", params)
        with pytest.raises(InvalidArgument, match="at most 256"):
            llm.embed([*whole, 5])


def test_a_vector_of_zeros_stays_one():
    assert embedding_of(np.zeros(3, "<f4").tobytes(), PoolingParams()).tolist() == [0, 0, 0]
