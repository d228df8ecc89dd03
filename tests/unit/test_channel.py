"""The socket between stub and engine: framing, waiting, and the ends of both sides."""

import socket
import threading
import time

import pytest

from flashserve.ipc.channel import Channel, ChannelClosed
from flashserve.protocol import Abort, GenerateRequest, SamplingParams, StubMessage


@pytest.fixture
def pair():
    left, right = socket.socketpair()
    channels = Channel(left, StubMessage), Channel(right, StubMessage)
    yield channels
    for channel in channels:
        channel.close()


def request(request_id: int, prompt_len: int = 4) -> GenerateRequest:
    params = SamplingParams(temperature=0.5, stop=("a", "b"), seed=2**62)
    return GenerateRequest(request_id, list(range(prompt_len)), params, arrival=1.5, deadline=None)


def test_messages_arrive_whole_typed_and_in_order(pair):
    sent = [request(1), Abort([1, 2]), request(2, prompt_len=0)]
    for message in sent:
        pair[0].send(message)
    assert pair[1].receive(1) == sent


def test_a_message_larger_than_every_buffer_arrives(pair):
    big = request(1, prompt_len=2_000_000)
    sender = threading.Thread(target=pair[0].send, args=(big,))
    sender.start()
    received = pair[1].receive(10)
    sender.join(10)
    assert received == [big]


def test_receive_returns_empty_after_its_timeout(pair):
    started = time.monotonic()
    assert pair[0].receive(0.05) == []
    assert time.monotonic() - started >= 0.05
    assert pair[0].receive(0) == []


def test_messages_split_at_every_byte_are_put_together(pair):
    raw, channel = pair[0]._sock, pair[1]
    left, right = socket.socketpair()
    probe = Channel(left, StubMessage)
    probe.send(request(7))
    data = right.recv(1 << 20)
    for byte in data[:-1]:
        raw.sendall(bytes([byte]))
        assert channel.receive(0) == []
    raw.sendall(data[-1:])
    assert channel.receive(1) == [request(7)]
    probe.close()
    right.close()


def test_what_was_sent_before_the_close_is_still_received(pair):
    pair[0].send(request(1))
    pair[0].close()
    assert pair[1].receive(1) == [request(1)]
    with pytest.raises(ChannelClosed):
        pair[1].receive(1)
    with pytest.raises(ChannelClosed):
        pair[1].send(request(2))


def test_shutdown_from_another_thread_wakes_the_receiver(pair):
    threading.Timer(0.05, pair[0].shutdown).start()
    with pytest.raises(ChannelClosed):
        pair[0].receive(10)
