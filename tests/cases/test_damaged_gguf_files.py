"""Case: a file that lies. Two hundred damaged GGUF files, each refused at once by its name and the field that is wrong.

The file is written here byte by byte, so that the place of each field is known.
"""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import pytest

from flashserve.config import EngineConfig
from flashserve.errors import ConfigError
from flashserve.models.registry import open_model

MOST_SECONDS, MOST_BYTES = 1.0, 4 << 20
LIES = (0xFFFFFFFFFFFFFFFF, 1 << 63, 1 << 60, 1 << 40, 1 << 31, 100_000)
ALIGNMENT = 32


class Writer:
    """A small llama; remembers where each field lies and how it is packed."""

    def __init__(self, extra: Mapping[str, object] | None = None, **changes: object) -> None:
        self._extra = extra or {}
        self.data = bytearray()
        self.fields: list[tuple[str, int, str]] = []
        self._changes = changes
        self._write()

    def number(self, field: str, form: str, value: int) -> None:
        self.fields.append((field, len(self.data), form))
        self.data += struct.pack(f"<{form}", self._changes.get(field, value))

    def string(self, field: str, text: str) -> None:
        self.number(f"the length of {field}", "Q", len(text.encode()))
        self.data += text.encode()

    def _value(self, key: str, value: object) -> None:
        self.string(f"key {key}", key)
        if isinstance(value, list):
            kind = 8 if isinstance(value[0], str) else 6 if isinstance(value[0], float) else 5
            self.number(f"the type of {key}", "I", 9)
            self.number(f"the type of the values of {key}", "I", kind)
            self.number(f"the number of values of {key}", "Q", len(value))
            for index, one in enumerate(value):
                if isinstance(one, str):
                    self.string(f"{key}[{index}]", one)
                else:
                    self.data += struct.pack("<f" if kind == 6 else "<i", one)
            return
        self.number(f"the type of {key}", "I", 8 if isinstance(value, str) else 6 if isinstance(value, float) else 4)
        if isinstance(value, str):
            self.string(key, value)
        elif isinstance(value, float):
            self.data += struct.pack("<f", value)
        else:
            self.number(key, "I", value)

    def _write(self) -> None:
        hidden, inner, vocab = 32, 64, 8
        values = {
            "general.architecture": "llama",
            "llama.context_length": 64,
            "llama.embedding_length": hidden,
            "llama.block_count": 1,
            "llama.feed_forward_length": inner,
            "llama.attention.head_count": 2,
            "llama.attention.head_count_kv": 1,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": ["<end>", *"abcdef", "ab"],
            "tokenizer.ggml.token_type": [3, *[1] * 7],
            "tokenizer.ggml.merges": ["a b"],
            "tokenizer.ggml.eos_token_id": 0,
            **self._extra,
        }
        matrices = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
        matrices |= {"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
        tensors = {"token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,)}
        tensors |= {f"blk.0.{name}.weight": shape for name, shape in matrices.items()}
        tensors |= {"blk.0.attn_norm.weight": (hidden,), "blk.0.ffn_norm.weight": (hidden,)}
        self.data += b"GGUF"
        self.number("version", "I", 3)
        self.number("the number of tensors", "Q", len(tensors))
        self.number("the number of metadata values", "Q", len(values))
        for key, value in values.items():
            self._value(key, value)
        offset = 0
        for name, shape in tensors.items():
            self.string(f"the name of tensor {name}", name)
            self.number(f"the number of dimensions of tensor {name}", "I", len(shape))
            for axis, size in enumerate(reversed(shape)):
                self.number(f"size {axis} of tensor {name}", "Q", size)
            self.number(f"the type of tensor {name}", "I", 0)
            self.number(f"the offset of tensor {name}", "Q", offset)
            offset += 4 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        self.header_bytes = len(self.data)
        self.data += bytes(-len(self.data) % ALIGNMENT) + bytes(offset)


GOOD = Writer()


def damaged_files() -> list[tuple[str, bytes]]:
    """Each with what was done to it."""
    files = [(f"cut to {size}", bytes(GOOD.data[:size])) for size in _cuts()]
    for field, at, form in GOOD.fields:
        lies = [lie for lie in LIES if lie < 1 << (8 * struct.calcsize(form))]
        for lie in random.Random(field).sample(lies, 2):
            data = bytearray(GOOD.data)
            struct.pack_into(f"<{form}", data, at, lie)
            files.append((f"{field} = {lie}", bytes(data)))
    return files


def _cuts() -> list[int]:
    """In the header, at its end and in the data."""
    rng = random.Random(1)
    inside = rng.sample(range(GOOD.header_bytes), 40)
    return [0, 1, 3, 4, 23, GOOD.header_bytes, len(GOOD.data) - 1, *sorted(inside)]


FILES = damaged_files()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def open_whole(file: Path) -> None:
    """All that is read before the weights are."""
    files = open_model(EngineConfig(str(file)))
    files.end_token_ids(files.config["vocab_size"])
    assert files.card


def test_the_file_is_good_before_it_is_damaged(tmp_path):
    file = tmp_path / "good.gguf"
    file.write_bytes(GOOD.data)
    open_whole(file)


def test_there_are_two_hundred_of_them():
    assert len({data for _, data in FILES}) >= 200


# Numbers that a reader cannot know to be wrong: what they say is possible.
POSSIBLE = ("llama.context_length = ", "tokenizer.ggml.eos_token_id = ")


@pytest.mark.parametrize(("damage", "data"), FILES, ids=[damage for damage, _ in FILES])
def test_it_is_refused_at_once_with_its_name(damage, data, tmp_path):
    file = tmp_path / "damaged.gguf"
    file.write_bytes(data)
    if damage.startswith(POSSIBLE):
        open_whole(file)
        return
    tracemalloc.start()
    begun = time.process_time()
    with pytest.raises(ConfigError) as caught:
        open_whole(file)
    seconds, (_, most) = time.process_time() - begun, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "damaged.gguf" in str(caught.value)
    assert seconds < MOST_SECONDS
    assert most < MOST_BYTES


@pytest.mark.parametrize(
    ("field", "lie"),
    [
        ("the number of tensors", 1 << 60),
        ("the number of metadata values", 1 << 60),
        ("the number of values of tokenizer.ggml.tokens", 1 << 61),
        ("the number of values of tokenizer.ggml.token_type", 1 << 62),
        ("the length of tokenizer.ggml.tokens[3]", 1 << 40),
        ("the type of llama.context_length", 77),
        ("the type of the values of tokenizer.ggml.merges", 9),
        ("the number of dimensions of tensor blk.0.attn_q.weight", 5),
        ("the offset of tensor blk.0.attn_q.weight", 64),
    ],
)
def test_the_field_is_named(field, lie, tmp_path):
    file = tmp_path / "damaged.gguf"
    file.write_bytes(Writer(**{field: lie}).data)
    with pytest.raises(ConfigError, match=f"^damaged.gguf: {field.replace('[', '.').replace(']', '.')} "):
        open_whole(file)


def test_a_number_that_makes_no_config_is_named(tmp_path):
    file = tmp_path / "damaged.gguf"
    file.write_bytes(Writer(**{"llama.attention.head_count": 0}).data)
    with pytest.raises(ConfigError, match=r"^damaged\.gguf: llama\.attention\.head_count must be"):
        open_whole(file)


def write_split(folder: Path, numbers: list[int], count: int) -> list[Path]:
    files = []
    for part, number in enumerate(numbers):
        data = bytearray(b"GGUF" + struct.pack("<IQQ", 3, 0, 3))
        for key, kind, value in (
            ("general.architecture", 8, "llama"),
            ("split.no", 4, number),
            ("split.count", 4, count),
        ):
            data += struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind)
            data += struct.pack("<Q", len(value)) + value.encode() if kind == 8 else struct.pack("<I", value)
        files.append(folder / f"m-{part + 1:05d}-of-{count:05d}.gguf")
        files[-1].write_bytes(data)
    return files


@pytest.mark.parametrize(
    ("numbers", "count", "words"),
    [
        ([0, 0], 2, "m-00002-of-00002.gguf: split.no"),  # the first one again
        ([0, 2, 1], 3, "m-00002-of-00003.gguf: split.no"),  # a cycle
        ([1, 0], 2, "m-00001-of-00002.gguf: split.no"),
        ([0], 2, "m-00002-of-00002.gguf is missing"),
        ([0], 65535, "is missing"),
        ([0, 1], 2, "lacks tokenizer.ggml.model"),  # whole, and empty
    ],
)
def test_parts_that_do_not_fit_together_are_refused(numbers, count, words, tmp_path):
    first = write_split(tmp_path, numbers, count)[0]
    with pytest.raises(ConfigError) as caught:
        open_whole(first)
    assert words in str(caught.value)


def test_a_part_that_is_a_link_to_another_is_refused(tmp_path):
    files = write_split(tmp_path, [0, 1], 2)
    files[1].unlink()
    files[1].symlink_to(files[0])
    with pytest.raises(
        ConfigError, match=r"m-00002-of-00002\.gguf: split\.no and split\.count are 0 and 2, not 1 and 2"
    ):
        open_whole(files[0])


@pytest.mark.parametrize("content", [b"", b"GGML" + bytes(100), b"GGUF\0\0\0\3" + bytes(100), b"PK\3\4" + bytes(100)])
def test_what_is_no_such_file_is_told(content, tmp_path):
    file = tmp_path / "other.gguf"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"other\.gguf"):
        open_whole(file)


SENTENCEPIECE = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0] * 8}


@pytest.mark.parametrize(
    ("name", "extra", "words"),
    [
        (
            "damaged.gguf",
            {**SENTENCEPIECE, "tokenizer.ggml.tokens": [*"abcdefg", "x" * 100_000]},
            "tokenizer.ggml.tokens holds a token of 100000 characters",
        ),
        (
            "damaged.gguf",
            {"llama.attention.head_count_kv": list(range(1 << 20))},
            "llama.attention.head_count_kv must be one value, or one for each layer, not an array",
        ),
        ("damaged.gguf-00001-of-4194304.gguf", {"split.no": 0, "split.count": 1 << 22}, "split.count is 4194304"),
    ],
)
def test_what_is_far_too_much_is_refused_at_once(name, extra, words, tmp_path):
    file = tmp_path / name
    file.write_bytes(Writer(extra).data)
    begun = time.process_time()
    with pytest.raises(ConfigError) as caught:
        open_whole(file)
    assert time.process_time() - begun < MOST_SECONDS
    assert str(caught.value).startswith(f"{name}: {words}")


def test_a_vocabulary_of_pieces_is_a_tokenizer(tmp_path):
    file = tmp_path / "good.gguf"
    file.write_bytes(Writer(SENTENCEPIECE).data)
    open_whole(file)
