"""The offline API on a tiny model."""

from pathlib import Path

import pytest

from flashserve import LLM, SamplingParams
from flashserve.errors import ConfigError, InvalidArgument
from tiny_models import make_tiny_model

GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm")
    make_tiny_model("llama", folder)
    with LLM(folder, dtype="float32", num_threads=1, max_num_seqs=4, max_waiting_requests=2) as engine:
        yield engine


def free_blocks(llm):
    return llm.stats().free_blocks


def test_results_come_in_the_prompts_order_and_do_not_depend_on_company(llm):
    prompts = ["def f(", "x", "class A:\n    pass", "import os", "return", "a = [1, 2", "for i in", "#"]
    together = [r.token_ids for r in llm.generate(prompts, GREEDY)]
    alone = [llm.generate(prompt, GREEDY)[0].token_ids for prompt in prompts]
    assert together == alone
    assert len({tuple(ids) for ids in alone}) > 1


def test_a_prompt_of_token_ids_equals_its_text(llm):
    ids = llm.tokenizer.encode("def f(")
    assert llm.generate(ids, GREEDY)[0].text == llm.generate("def f(", GREEDY)[0].text


@pytest.mark.parametrize("spaces", [True, False])
def test_spaces_between_special_tokens_are_a_fast_tokenizers(llm, spaces):
    """There are none, whatever is asked: the option is of tokenizers in Python."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(Path(llm.resolved.model.card.tokenizer_file).parent)
    ids = [1, 2, 40, 1, 0]
    expected = theirs.decode(ids, skip_special_tokens=False, spaces_between_special_tokens=spaces)
    assert llm.tokenizer.decode(ids, skip_special_tokens=False) == expected
    settings = {**GREEDY, "skip_special_tokens": False}
    asked = llm.generate("a", {**settings, "spaces_between_special_tokens": spaces})[0].text
    assert asked == llm.generate("a", settings)[0].text


def test_each_prompt_may_have_its_own_parameters(llm):
    short, long = llm.generate(["a", "a"], [{**GREEDY, "max_tokens": 2}, GREEDY])
    assert (len(short.token_ids), len(long.token_ids)) == (2, 12)
    assert long.token_ids[:2] == short.token_ids
    assert short.finish_reason == long.finish_reason == "length"


def test_a_stop_string_ends_text_and_tokens_together(llm):
    whole = llm.generate("a", GREEDY)[0]
    stop = llm.tokenizer.decode(whole.token_ids[3:5])
    stopped = llm.generate("a", {**GREEDY, "stop": [stop]})[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert len(stopped.token_ids) <= 5
    assert free_blocks(llm) == llm.stats().total_blocks


def test_sampling_params_built_by_hand_are_checked_too(llm):
    made = llm.generate("a", SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))[0]
    assert made.token_ids == llm.generate("a", GREEDY)[0].token_ids[:3]
    with pytest.raises(InvalidArgument, match="temperature"):
        llm.generate("a", SamplingParams(temperature=-1.0))


def test_a_truncated_prompt_keeps_its_end(llm):
    ids = llm.tokenizer.encode("a long prompt with many words")
    result = llm.generate(ids, {**GREEDY, "truncate_prompt_tokens": 4})[0]
    assert result.prompt_token_ids == ids[-4:]


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([], GREEDY, "prompt is empty"),
        ([10**9], GREEDY, "prompt: token id 1000000000 is not in"),
        ([-1], GREEDY, "prompt: token id -1 is not in"),
        (list(range(5)) * 1000, GREEDY, "prompt has 5000 tokens"),
        ("a", {**GREEDY, "stop_token_ids": [10**9]}, "stop_token_ids: token id 1000000000 is not in"),
    ],
)
def test_bad_prompts_are_refused_before_anything_runs(llm, prompt, params, words):
    steps = llm.stats().steps
    with pytest.raises(InvalidArgument, match=words):
        llm.generate([[1, 2], prompt], params)
    assert llm.stats().steps == steps


def test_an_interruption_leaves_an_empty_engine(llm, monkeypatch):
    steps_left = iter(range(3))
    step = llm._core.step

    def interrupted():
        if next(steps_left, None) is None:
            monkeypatch.setattr(llm._core, "step", step)
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm._core, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a"] * 6, GREEDY)
    assert (llm.stats().running, llm.stats().waiting) == (0, 0)
    assert free_blocks(llm) == llm.stats().total_blocks
    assert llm.generate("a", GREEDY)[0].finish_reason == "length"


def test_settings_are_checked_by_name(tmp_path):
    with pytest.raises(ConfigError, match="did you mean max_num_seqs"):
        LLM(tmp_path, max_num_seq=4)


SAMPLED = {"temperature": 0.9, "seed": 5, "max_tokens": 12, "ignore_eos": True}


def test_several_samples_of_a_prompt_are_those_of_the_next_seeds(llm):
    results = llm.generate(["def f(", "x"], {**SAMPLED, "n": 3})
    alone = [llm.generate(prompt, {**SAMPLED, "seed": seed})[0] for prompt in ("def f(", "x") for seed in (5, 6, 7)]
    assert [(r.prompt_token_ids, r.token_ids) for r in results] == [(r.prompt_token_ids, r.token_ids) for r in alone]
    assert len({r.text for r in results}) == 6


def test_a_stop_string_ends_one_sample_and_not_its_siblings(llm):
    whole = llm.generate("a", {**SAMPLED, "n": 3})
    stop = llm.tokenizer.decode(whole[1].token_ids[4:6])
    assert stop and stop not in whole[0].text + whole[2].text
    stopped = llm.generate("a", {**SAMPLED, "n": 3, "stop": [stop]})
    assert [r.finish_reason for r in stopped] == ["length", "stop", "length"]
    assert stopped[1].text == whole[1].text[: whole[1].text.index(stop)]
    assert [stopped[0].text, stopped[2].text] == [whole[0].text, whole[2].text]
    assert free_blocks(llm) == llm.stats().total_blocks


def test_penalties_biases_and_bans_by_name_or_as_sampling_params(llm):
    plain = llm.generate("a b", GREEDY)[0]
    token, another = plain.token_ids[0], 60
    banned = llm.generate("a b", {**GREEDY, "logit_bias": {token: -100}, "presence_penalty": 2})[0]
    assert token not in banned.token_ids
    favourite = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logit_bias={another: 100.0})
    assert llm.generate("a b", favourite)[0].token_ids == [another] * 4
    word = llm.tokenizer.decode([another])
    avoided = {"temperature": 0, "max_tokens": 9, "ignore_eos": True, "logit_bias": {another: 50}}
    assert word not in llm.generate("a b", {**avoided, "bad_words": [word]})[0].text
    assert word * 3 not in llm.generate("a b", {**avoided, "bad_words": [word * 3]})[0].text
    with pytest.raises(InvalidArgument, match="logit_bias: token id 512 is not in the model's range"):
        llm.generate("a b", {"logit_bias": {512: 1}})


def test_log_probabilities_come_with_the_texts_of_their_tokens(llm):
    asked = {**GREEDY, "logprobs": 2, "prompt_logprobs": 1}
    (result,) = llm.generate("def f(x): é", asked)
    assert [score.token.token_id for score in result.logprobs] == result.token_ids
    assert "".join(score.token.text for score in result.logprobs) == result.text
    assert result.cumulative_logprob == pytest.approx(sum(score.token.logprob for score in result.logprobs))
    assert all(score.top[0].token_id == score.token.token_id and score.top[0].rank == 1 for score in result.logprobs)
    assert result.prompt_logprobs[0] is None
    assert "def f(x): é".endswith("".join(score.token.text for score in result.prompt_logprobs[1:]))
    assert len(result.prompt_logprobs) == len(result.prompt_token_ids)
    plain = llm.generate("def f(x): é", GREEDY)[0]
    assert (plain.logprobs, plain.cumulative_logprob, plain.prompt_logprobs) == (None, None, None)
    for name in ("logprobs", "prompt_logprobs"):
        with pytest.raises(InvalidArgument, match=rf"{name} must be an integer in \[0, 20\], not 21"):
            llm.generate("a", {name: 21})


def test_more_samples_than_fit_are_refused(llm):
    with pytest.raises(InvalidArgument, match=r"n=5 samples .* do not fit: at most 4 do"):
        llm.generate("a", {**SAMPLED, "n": 5})
    assert llm.generate("a", GREEDY)[0].finish_reason == "length"
    assert free_blocks(llm) == llm.stats().total_blocks
