"""What ``flashserve serve`` prints to be tried first."""

from __future__ import annotations

import pytest

from flashserve.launcher.serve import examples


@pytest.mark.parametrize(
    ("grpc", "chat"),
    [
        ("localhost:8001", "flashserve chat    and ask"),
        ("localhost:9001", "flashserve chat --url grpc://localhost:9001    and ask"),
        ("192.168.1.5:8001", "flashserve chat --url grpc://192.168.1.5:8001    and ask"),
    ],
)
def test_a_chat_goes_to_where_the_server_listens(grpc: str, chat: str) -> None:
    assert any(line.strip().startswith(chat) for line in examples(["smollm2"], "localhost:8000", grpc))
