"""Any path that the system takes is served: the stub's embedded Python always has an ASCII file system encoding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness import Server
from null_models import null_model, write_null_model
from requests_helper import generate

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
LOCALES = ({"LANG": "C.UTF-8", "LC_ALL": ""}, {"LC_ALL": "C"}, {"LANG": "", "LC_ALL": ""})


@pytest.mark.parametrize("locale", LOCALES, ids=["utf-8", "c", "none"])
def test_a_model_folder_named_in_chinese(tmp_path: Path, locale: dict[str, str]) -> None:
    """Chat works, and the model's own defaults hold: both were once lost without a word."""
    folder = write_null_model(tmp_path / "模型")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3}))
    with Server({"m": null_model(folder)}, env=locale) as server:
        chat = json.dumps({"messages": [{"role": "user", "content": "hello"}]})
        counts = {"return_num_output_tokens": True, "return_num_input_tokens": True}
        answer = generate(server, model="m", chat_request=chat, **counts)
        assert answer["num_output_tokens"] == 3
        tokenized = generate(server, model="m", tokenize_request=json.dumps({"text": "<user>hello"}))
        assert answer["num_input_tokens"] == json.loads(tokenized["text_output"])["count"]
        assert "Traceback" not in server.log


def test_a_folder_of_that_kind_inside_the_repository() -> None:
    server = Server({"m": {"model": "重量", "device": "null", "num_threads": 1}})
    write_null_model(server.repository / "m" / "1" / "重量")
    with server:
        assert generate(server, model="m", text_input="hello", max_tokens=3)["text_output"]
