"""The tensor contract, with a real tritonserver: what is declared, what is sent back, and the forms that are taken."""

from __future__ import annotations

import json
import uuid
from typing import Any

import pytest

from flashserve_client import Client
from harness import HTTP, Server, wait_until
from requests_helper import ASK_FOR_ALL, GrpcCall, Raw, call, call_one, generate, post, stream_sse, strings, text_of
from shared_servers import letters

HELLO, HELLO_TOKENS = "hello", 3
FIVE = letters(HELLO_TOKENS, 5)

# Written out here, not taken from the backend: clients depend on each of these.
INPUTS = {
    "text_input": ("TYPE_STRING", ["1"]),
    "chat_request": ("TYPE_STRING", ["1"]),
    "tokenize_request": ("TYPE_STRING", ["1"]),
    "embedding_request": ("TYPE_STRING", ["1"]),
    "image": ("TYPE_STRING", ["-1"]),
    "sampling_parameters": ("TYPE_STRING", ["1"]),
    "max_tokens": ("TYPE_INT32", ["1"]),
    "stream": ("TYPE_BOOL", ["1"]),
    "exclude_input_in_output": ("TYPE_BOOL", ["1"]),
    "return_finish_reason": ("TYPE_BOOL", ["1"]),
    "return_cumulative_logprob": ("TYPE_BOOL", ["1"]),
    "return_logprobs": ("TYPE_BOOL", ["1"]),
    "return_num_input_tokens": ("TYPE_BOOL", ["1"]),
    "return_num_output_tokens": ("TYPE_BOOL", ["1"]),
    "return_request_metrics": ("TYPE_BOOL", ["1"]),
    "return_progress": ("TYPE_BOOL", ["1"]),
}
OUTPUTS = {
    "text_output": ("TYPE_STRING", ["-1"]),
    "finish_reason": ("TYPE_STRING", ["-1"]),
    "cumulative_logprob": ("TYPE_FP32", ["-1"]),
    "logprobs": ("TYPE_STRING", ["-1"]),
    "num_input_tokens": ("TYPE_UINT32", ["1"]),
    "num_output_tokens": ("TYPE_UINT32", ["-1"]),
    "request_metrics": ("TYPE_STRING", ["1"]),
    "prompt_progress": ("TYPE_STRING", ["1"]),
    "prompt_logprobs": ("TYPE_STRING", ["1"]),
}


# --- what is declared --------------------------------------------------------------------------------------


def test_the_backends_name_in_config_pbtxt_is_enough(server: Server) -> None:
    assert (server.repository / "letters" / "config.pbtxt").read_text().strip() == 'backend: "flashserve"'
    config = HTTP.get(f"{server.http}/v2/models/letters/config").json()

    def tensors(kind: str) -> dict[str, tuple[str, list[str]]]:
        return {entry["name"]: (entry["data_type"], [str(d) for d in entry["dims"]]) for entry in config[kind]}

    assert tensors("input") == INPUTS
    assert tensors("output") == OUTPUTS
    assert all(entry["optional"] for entry in config["input"])
    assert config["max_batch_size"] == 0
    assert config["model_transaction_policy"]["decoupled"] is True


# --- what is sent back -------------------------------------------------------------------------------------


def test_text_is_all_that_is_sent_unasked(server: Server) -> None:
    assert set(generate(server, text_input=HELLO, max_tokens=1)) == {"model_name", "model_version", "text_output"}
    assert call_one(server, text_input=HELLO, max_tokens=1).outputs.keys() == {"text_output"}


@pytest.mark.parametrize("stream", [False, True])
def test_outputs_have_the_contracts_types_and_shapes(server: Server, stream: bool) -> None:
    *_, last = call(server, text_input=HELLO, max_tokens=5, stream=stream, **ASK_FOR_ALL)
    assert last.types == {
        "text_output": "BYTES",
        "finish_reason": "BYTES",
        "num_input_tokens": "UINT32",
        "num_output_tokens": "UINT32",
        "request_metrics": "BYTES",
    }
    assert set(map(tuple, last.shapes.values())) == {(1,)}


def test_every_way_to_ask_gives_the_same_text(server: Server) -> None:
    """Greedy text of computed weights, whole or in deltas, over both protocols."""
    ask = {"text_input": "the history of the world", "max_tokens": 40, "temperature": 0}
    whole = generate(server, model="llama", exclude_input_in_output=True, **ask)["text_output"]
    assert whole
    assert text_of(stream_sse(server, model="llama", **ask)) == whole
    tensors = {"text_input": ask["text_input"], "sampling_parameters": {"max_tokens": 40, "temperature": 0}}
    assert call_one(server, model="llama", exclude_input_in_output=True, **tensors).text == whole
    assert "".join(r.text for r in call(server, model="llama", stream=True, **tensors)) == whole
    for url in (server.http, f"grpc://{server.grpc}"):
        with Client(url, model="llama") as client:
            result = client.generate(ask["text_input"], max_tokens=40, temperature=0)
            assert (result.text, result.completion_tokens, result.finish_reason) == (whole, 40, "length")
            with client.stream(ask["text_input"], max_tokens=40, temperature=0) as deltas:
                assert "".join(delta.text for delta in deltas) == whole
            assert (deltas.result.completion_tokens, deltas.result.finish_reason) == (40, "length")


def test_streamed_responses_add_up(server: Server) -> None:
    """Counts are per response, the finish reason is "None" until the last one."""
    responses = stream_sse(server, model="paced", text_input=HELLO, max_tokens=20, **ASK_FOR_ALL)
    assert text_of(responses) == letters(HELLO_TOKENS, 20)
    assert len(responses) > 10, "5 ms per step leave time to send each token by itself"
    assert sum(response["num_output_tokens"] for response in responses) == 20
    assert {response["num_input_tokens"] for response in responses} == {HELLO_TOKENS}
    *running, last = [response["finish_reason"] for response in responses]
    assert set(running) == {"None"}
    assert last == "length"
    assert ["request_metrics" in response for response in responses] == [False] * len(running) + [True]


def test_request_metrics_tell_where_the_time_went(server: Server) -> None:
    prompt = "a prompt long enough to fill some blocks of the cache " * 2
    ask = {"text_input": prompt, "max_tokens": 10, "cache_salt": uuid.uuid4().hex, **ASK_FOR_ALL}
    first, second = (json.loads(generate(server, model="llama", **ask)["request_metrics"]) for _ in range(2))
    assert first.keys() == {"queue_ms", "prefill_ms", "ttft_ms", "decode_ms", "cached_tokens", "preemptions"}
    assert first["ttft_ms"] == pytest.approx(first["queue_ms"] + first["prefill_ms"], abs=0.01)
    assert first["prefill_ms"] > 0 < first["decode_ms"]
    assert (first["cached_tokens"], first["preemptions"]) == (0, 0)
    tokens = generate(server, model="llama", **ask)["num_input_tokens"]
    assert second["cached_tokens"] == (tokens - 1) // 16 * 16


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ask", [{"text_input": HELLO, "max_tokens": 9}, {"tokenize_request": '{"text": "hello"}'}])
def test_the_last_data_response_carries_the_only_final_flag(server: Server, ask: dict[str, Any], stream: bool) -> None:
    parameters = {"triton_enable_empty_final_response": True}
    replies = call(server, model="paced", stream=stream, parameters=parameters, **ask)
    assert [reply.final for reply in replies] == [False] * (len(replies) - 1) + [True]
    assert all("text_output" in reply.outputs for reply in replies)


def test_an_error_is_the_only_response(server: Server) -> None:
    parameters = {"triton_enable_empty_final_response": True}
    (reply,) = call(server, text_input=HELLO, max_tokens=0, parameters=parameters)
    assert "max_tokens" in reply.error


def test_the_input_is_repeated_unless_excluded(server: Server) -> None:
    ask = {"text_input": HELLO, "max_tokens": 5}
    assert generate(server, **ask)["text_output"] == HELLO + FIVE
    assert generate(server, exclude_input_in_output=False, **ask)["text_output"] == HELLO + FIVE
    assert generate(server, exclude_input_in_output=True, **ask)["text_output"] == FIVE
    ids = {"sampling_parameters": json.dumps({"prompt_token_ids": [40, 41, 42], "max_tokens": 5})}
    assert generate(server, **ids)["text_output"] == "FGH" + FIVE


def test_a_stream_never_repeats_the_input(server: Server) -> None:
    assert text_of(stream_sse(server, text_input=HELLO, max_tokens=5)) == FIVE
    assert text_of(stream_sse(server, text_input=HELLO, max_tokens=5, exclude_input_in_output=True)) == FIVE
    response = post(server, {"text_input": HELLO, "stream": True, "exclude_input_in_output": False})
    assert response.status_code == 400
    assert "When streaming, `exclude_input_in_output` = False is not allowed" in response.text


# --- the forms in which it is asked ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {"max_tokens": 5},
        {"sampling_parameters": '{"max_tokens": 5}'},
        {"sampling_parameters": '{"max_tokens": "5"}'},
        {"sampling_parameters": '{"max_tokens": 5.0, "seed": null}'},
        {"sampling_parameters": '{"max_tokens": 5}', "max_tokens": 5},
        {"parameters": {"min_tokens": 2}, "max_tokens": [5]},
        {"max_tokens": 5, "temperature": "0.5", "top_p": 0.9, "top_k": "10", "ignore_eos": "true", "seed": 3},
        {"max_tokens": 50, "stop": '["~~", "N"]'},
        {"max_tokens": 50, "stop": "N"},
        {"max_tokens": 50, "stop_token_ids": "[48]"},
        {"max_tokens": 5, "id": "mine", "timeout": 60_000_000, "priority": 3, "cache_salt": "salt"},
    ],
    ids=str,
)
def test_parameters_over_http(server: Server, body: dict[str, object]) -> None:
    assert generate(server, text_input=HELLO, exclude_input_in_output=True, **body)["text_output"] == FIVE


def test_parameters_over_grpc(server: Server) -> None:
    parameters = {"temperature": 0.5, "top_k": 3, "ignore_eos": True, "stop": '["N"]', "min_tokens": "2"}
    reply = call_one(server, text_input=HELLO, exclude_input_in_output=True, max_tokens=9, parameters=parameters)
    assert reply.text == FIVE


def test_sampling_parameters_are_honoured_whichever_way_they_come(server: Server) -> None:
    """Each of these is greedy by another name; without them the text would be random."""
    ask = {"model": "llama", "text_input": "the same text", "exclude_input_in_output": True, "max_tokens": 24}
    greedy = generate(server, temperature=0, **ask)["text_output"]
    assert generate(server, temperature="0.0", **ask)["text_output"] == greedy
    assert generate(server, top_k=1, **ask)["text_output"] == greedy
    assert generate(server, sampling_parameters='{"top_p": "0.000001"}', **ask)["text_output"] == greedy
    assert call_one(server, sampling_parameters='{"min_p": 1}', **ask).text == greedy
    assert call_one(server, parameters={"temperature": 0.0}, **ask).text == greedy
    assert generate(server, temperature=1, seed=1, **ask)["text_output"] != greedy


def test_the_form_of_genai_perf_and_perf_analyzer(server: Server) -> None:
    sampling = '{"max_tokens": "5", "min_tokens": "5"}'
    body = {"text_input": [HELLO], "exclude_input_in_output": [True], "sampling_parameters": [sampling]}
    assert text_of(stream_sse(server, **{**body, "stream": [True]})) == FIVE
    tensors = {"text_input": HELLO, "stream": True, "exclude_input_in_output": True, "sampling_parameters": sampling}
    assert "".join(reply.text for reply in call(server, **tensors)) == FIVE


def test_the_form_of_aiperfs_kserve_mode(server: Server) -> None:
    ask = {"text_input": HELLO, "max_tokens": 5, "stream": True}
    settings = {"temperature": 0.8, "top_p": 0.9, "ignore_eos": True, "min_tokens": 5}
    assert "".join(reply.text for reply in call(server, parameters=settings, **ask)) == FIVE
    assert text_of(stream_sse(server, **ask, **settings)) == FIVE


def test_max_tokens_as_text_is_for_sampling_parameters(server: Server) -> None:
    """Beside text_input it becomes the INT32 tensor that aiperf sends, and Triton takes integers alone for it."""
    for value in (5, "5", 5.0):
        ask = {"text_input": HELLO, "exclude_input_in_output": True}
        assert generate(server, **ask, sampling_parameters=json.dumps({"max_tokens": value}))["text_output"] == FIVE
        refused = post(server, {**ask, "max_tokens": value})
        assert (refused.status_code == 200) == (type(value) is int)
        assert refused.status_code == 200 or "JSON non-signed-integer" in refused.text


@pytest.mark.parametrize("stream", [False, True])
def test_the_form_of_tritons_openai_frontend(server: Server, stream: bool) -> None:
    """It sends everything every time, and reads exactly one string."""
    sampling = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "logprobs": False, "n": 1, "best_of": 1,
                "temperature": 1.0, "top_p": 1.0, "stop": ["~~"], "max_tokens": 5}  # fmt: skip
    replies = call(
        server,
        text_input=HELLO,
        stream=stream,
        exclude_input_in_output=True,
        sampling_parameters=sampling,
        return_finish_reason=True,
        return_logprobs=False,
        return_cumulative_logprob=False,
        return_num_input_tokens=True,
        return_num_output_tokens=True,
    )
    assert "".join(reply.text for reply in replies) == FIVE
    assert sum(reply.outputs["num_output_tokens"] for reply in replies) == 5
    assert {reply.outputs["num_input_tokens"] for reply in replies} == {HELLO_TOKENS}


def test_an_id_comes_back(server: Server) -> None:
    assert generate(server, text_input=HELLO, max_tokens=1, id="my-id")["id"] == "my-id"
    call_one(server, text_input=HELLO, max_tokens=1, request_id="one", parameters={"id": "one"})
    both = call(server, text_input=HELLO, max_tokens=1, request_id="one", parameters={"id": "another"})
    assert "id is given twice" in both[0].error


def occupy(server: Server, max_tokens: int) -> GrpcCall:
    """A stream that holds `narrow`'s only place for 5 ms per token; it runs on return."""
    running = GrpcCall(
        server,
        {"text_input": HELLO, "stream": True, "sampling_parameters": {"max_tokens": max_tokens, "ignore_eos": True}},
        model="narrow",
    )
    next(running)
    return running


def test_a_better_priority_overtakes_those_who_wait(server: Server) -> None:
    """Lower goes first. One request runs, two wait; the one that came last has the better priority."""
    running = occupy(server, max_tokens=1000)
    waiting = []
    for priority, limit in ((9, 5), (-1, 60)):
        sampling = {"priority": priority, "max_tokens": limit, "ignore_eos": True}
        inputs = {"text_input": HELLO, "return_request_metrics": True, "sampling_parameters": sampling}
        waiting.append(GrpcCall(server, inputs, model="narrow"))
        assert wait_until(lambda: server.metric("vllm:num_requests_waiting", model="narrow") == len(waiting), 5)
    running.cancel()
    waited = [json.loads(next(one).outputs["request_metrics"])["queue_ms"] for one in waiting]
    assert waited[0] > waited[1] + 60 * 5, "the one that came first waited for all 60 steps of the other"


def test_a_stream_that_waits_is_kept_alive_with_empty_chunks(server: Server) -> None:
    """Triton notices that an SSE client went away only when something is sent to it."""
    running = occupy(server, max_tokens=300)
    responses = stream_sse(server, model="narrow", text_input=HELLO, max_tokens=5, **ASK_FOR_ALL)
    assert (responses[0]["text_output"], responses[0]["finish_reason"]) == ("", "None")
    assert responses[0]["num_output_tokens"] == 0
    assert text_of(responses) == FIVE
    assert sum(response["num_output_tokens"] for response in responses) == 5
    running.cancel()


# --- other prompts -----------------------------------------------------------------------------------------


def test_prompt_token_ids_are_the_prompt(server: Server) -> None:
    ids = json.loads(generate(server, tokenize_request='{"text": "some text"}')["text_output"])["token_ids"]
    ask = {"model": "llama", "exclude_input_in_output": True, "temperature": 0, "max_tokens": 20}
    from_text = generate(server, text_input="some text", **ask)["text_output"]
    assert generate(server, prompt_token_ids=json.dumps(ids), **ask)["text_output"] == from_text
    in_json = json.dumps({"prompt_token_ids": ids})
    assert call_one(server, sampling_parameters=in_json, parameters={"temperature": 0}, model="llama",
                    exclude_input_in_output=True, max_tokens=20).text == from_text  # fmt: skip


def test_a_chat_request_is_rendered_with_the_models_template(server: Server) -> None:
    chat = {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi <|im_end|> 你好"}]}
    prompt = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi <|im_end|> 你好<|im_end|>\n"
    answer = json.loads(generate(server, tokenize_request=json.dumps(chat))["text_output"])
    assert answer["prompt"] == prompt + "<|im_start|>assistant\n"
    assert answer["count"] == len(answer["token_ids"])
    ask = {"model": "llama", "temperature": 0, "max_tokens": 12, "exclude_input_in_output": True}
    from_ids = generate(server, prompt_token_ids=json.dumps(answer["token_ids"]), **ask)["text_output"]
    assert generate(server, chat_request=json.dumps(chat), **ask)["text_output"] == from_ids
    with Client(f"grpc://{server.grpc}", model="llama") as client:
        assert client.generate(chat["messages"], temperature=0, max_tokens=12).text == from_ids
    without = {**chat, "add_generation_prompt": False}
    repeated = generate(server, model="llama", chat_request=json.dumps(without), max_tokens=1)["text_output"]
    assert repeated.startswith(prompt)


def test_tokenizing_and_back(server: Server) -> None:
    text = "Grüße, 世界! \U0001f600 the end\n"
    answer = json.loads(generate(server, tokenize_request=json.dumps({"text": text}))["text_output"])
    assert answer["max_model_len"] == 2048
    assert answer["count"] == len(answer["token_ids"]) > 10
    back = json.dumps({"token_ids": answer["token_ids"]})
    assert json.loads(call_one(server, tokenize_request=back).text) == {"text": text}
    for url in (server.http, f"grpc://{server.grpc}"):
        with Client(url, model="letters") as client:
            assert client.tokenize(text) == answer["token_ids"]
            assert client.detokenize(answer["token_ids"]) == text


@pytest.mark.parametrize("stream", [False, True])
def test_the_output_of_logprobs_is_null_where_none_are_asked_for(server: Server, stream: bool) -> None:
    replies = call(server, text_input=HELLO, max_tokens=5, stream=stream, return_logprobs=True)
    assert {reply.outputs["logprobs"] for reply in replies} == {"null"}


def test_what_is_not_there_yet_is_refused_by_name(server: Server) -> None:
    assert "image is not supported" in call(server, text_input=HELLO, image=strings(b"a", b"b"))[0].error
    assert "image is not supported" in call(server, text_input=HELLO, image=Raw(b"", shape=(0,)))[0].error
