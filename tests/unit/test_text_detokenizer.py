"""Detokenizing token by token gives the text that decoding all tokens at once gives, in valid UTF-8 throughout."""

import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from flashserve.text.detokenizer import ByteLevelDetokenizer, DetokenizerFactory, PieceDetokenizer, WindowDetokenizer
from small_tokenizers import byte_level, metaspace, sentencepiece, word_piece

BYTE_LEVEL, LLAMA, GEMMA, METASPACE, WORD_PIECE = (
    byte_level(), sentencepiece(), sentencepiece(strip=False), metaspace(), word_piece(),
)  # fmt: skip
ALL = (BYTE_LEVEL, LLAMA, GEMMA, METASPACE, WORD_PIECE)
FACTORIES = {id(t): DetokenizerFactory(t) for t in ALL}
BEFORE = {id(t): t.token_to_id(token) for t, token in zip(ALL, ("t", "▁the", "▁the", "▁the", "play"), strict=True)}
"""A token of a prompt: what is streamed continues it."""


def decoded(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> str:
    """What all the ids give at once, behind the prompt."""
    before = [BEFORE[id(tokenizer)]]
    whole = tokenizer.decode(before + ids, skip_special_tokens=skip)
    return whole[len(tokenizer.decode(before)) :]


def streamed(tokenizer: Tokenizer, ids: list[int], skip: bool = True, sizes: list[int] | None = None) -> str:
    """The text of a stream that got the ids in pieces of these sizes (default: one by one)."""
    detokenizer = FACTORIES[id(tokenizer)].create(skip, [BEFORE[id(tokenizer)]])
    pieces, position = [], 0
    for size in sizes or []:
        pieces.append(detokenizer.feed(ids[position : position + size]))
        position += size
    pieces += [detokenizer.feed([token_id]) for token_id in ids[position:]]
    pieces.append(detokenizer.finish())
    for piece in pieces:
        piece.encode()  # raises for anything that is not Unicode text
    return "".join(pieces)


def ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    # Ids beyond the vocabulary, too: embedding tables are padded, and a model may pick such a row.
    return st.lists(st.integers(0, tokenizer.get_vocab_size() + 2), max_size=40)


SIZES = st.lists(st.integers(0, 5), max_size=8)


def test_each_decoder_gets_its_incremental_form():
    for tokenizer, kind in (
        (BYTE_LEVEL, ByteLevelDetokenizer),
        (LLAMA, PieceDetokenizer),
        (GEMMA, PieceDetokenizer),
        (METASPACE, PieceDetokenizer),
        (WORD_PIECE, WindowDetokenizer),
    ):
        assert type(FACTORIES[id(tokenizer)].create()) is kind


@settings(max_examples=300, deadline=None)
@given(ids=ids_of(BYTE_LEVEL), skip=st.booleans(), sizes=SIZES)
def test_byte_level_stream_equals_decode(ids, skip, sizes):
    assert streamed(BYTE_LEVEL, ids, skip, sizes) == decoded(BYTE_LEVEL, ids, skip)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, METASPACE.get_vocab_size() + 2), max_size=12), skip=st.booleans(), sizes=SIZES)
def test_metaspace_stream_equals_decode(ids, skip, sizes):
    assert streamed(METASPACE, ids, skip, sizes) == decoded(METASPACE, ids, skip)


BYTE_TOKEN = re.compile(r"<0x(..)>")


def by_runs(tokenizer: Tokenizer, ids: list[int], skip: bool, text_of_run: Callable[[bytes], str]) -> str:
    """What a SentencePiece decoder without strip does, given what it makes of a run of byte tokens."""
    special = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special} if skip else set()
    tokens = [t for i in ids if i not in special and (t := tokenizer.id_to_token(i)) is not None]
    runs: list[bytes] = []
    text = ""
    for token in tokens:
        if match := BYTE_TOKEN.fullmatch(token):
            if text.endswith("\0"):
                runs[-1] += bytes([int(match[1], 16)])
            else:
                text += "\0"
                runs.append(bytes([int(match[1], 16)]))
        else:
            text += token.replace("▁", " ")
    parts = text.split("\0")
    result = parts[0]
    for run, part in zip(runs, parts[1:], strict=True):
        result += text_of_run(run) + part
    return result


def all_or_nothing(run: bytes) -> str:
    """The rule of ByteFallback."""
    try:
        return run.decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(run)


def good_prefix(run: bytes) -> str:
    """Ours: a stream has already shown the whole characters at the start of a run that turns out broken."""
    try:
        return run.decode()
    except UnicodeDecodeError as error:
        return run[: error.start].decode() + "\ufffd" * (len(run) - error.start)


@settings(max_examples=500, deadline=None)
@given(ids=ids_of(GEMMA), skip=st.booleans(), sizes=SIZES)
def test_sentencepiece_stream_equals_decode_but_for_good_bytes_in_broken_runs(ids, skip, sizes):
    assert streamed(GEMMA, ids, skip, sizes) == by_runs(GEMMA, ids, skip, good_prefix)
    assert decoded(GEMMA, ids, skip) == by_runs(GEMMA, ids, skip, all_or_nothing)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(259, LLAMA.get_vocab_size() + 2), max_size=30), skip=st.booleans(), sizes=SIZES)
def test_sentencepiece_stream_equals_decode_exactly_for_text_pieces(ids, skip, sizes):
    assert streamed(LLAMA, ids, skip, sizes) == decoded(LLAMA, ids, skip)


TEXTS = st.text(alphabet=st.characters(exclude_categories=("Cs",), exclude_characters="▁"), max_size=40)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS, sizes=SIZES)
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, LLAMA, GEMMA], ids=["byte_level", "llama", "gemma"])
def test_any_text_survives_the_round_trip(tokenizer, text, sizes):
    ids = tokenizer.encode(text).ids
    assert streamed(tokenizer, ids, sizes=sizes) == decoded(tokenizer, ids)
    in_front = " " if text and tokenizer is not BYTE_LEVEL else ""  # which encoding adds
    assert streamed(tokenizer, ids, sizes=sizes) == in_front + text


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, LLAMA], ids=["byte_level", "llama"])
def test_an_incomplete_character_is_held_back_until_it_is_whole(tokenizer):
    detokenizer = FACTORIES[id(tokenizer)].create()
    *incomplete, last = tokenizer.encode("😀", add_special_tokens=False).ids[-3:]
    if tokenizer is LLAMA:
        incomplete.insert(0, tokenizer.token_to_id("<0xF0>"))  # four byte tokens; the other one merges the first two
    assert [detokenizer.feed([i]) for i in incomplete] == [""] * len(incomplete)
    assert detokenizer.feed([last]) == "😀"
    assert detokenizer.finish() == ""


@pytest.mark.parametrize(("tokenizer", "at_end"), [(BYTE_LEVEL, "\ufffd"), (LLAMA, "\ufffd\ufffd\ufffd")])
def test_what_never_became_a_character_is_replaced_at_the_end(tokenizer, at_end):
    detokenizer = FACTORIES[id(tokenizer)].create()
    all_but_last = tokenizer.encode("😀", add_special_tokens=False).ids[-4:-1]
    assert detokenizer.feed(all_but_last) == ""
    assert detokenizer.finish() == at_end == tokenizer.decode(all_but_last)


def test_a_newline_that_is_a_byte_token_appears_at_once():
    """Llama 2 has no other newline; stop strings and code would lag behind by a token."""
    newline = LLAMA.token_to_id("<0x0A>")
    assert FACTORIES[id(LLAMA)].create().feed([newline]) == "\n"


def test_good_characters_before_broken_bytes_stay():
    ids = [LLAMA.token_to_id(f"<0x{b:02X}>") for b in (*"é".encode(), 0xFF, 0x41)]
    assert LLAMA.decode(ids) == "\ufffd" * 4
    assert streamed(LLAMA, ids) == "é\ufffd\ufffd"


def test_special_tokens_do_not_interrupt_a_character():
    a, b = (LLAMA.token_to_id(f"<0x{byte:02X}>") for byte in "é".encode())
    assert streamed(LLAMA, [a, LLAMA.token_to_id("<s>"), b]) == "é"
    assert streamed(LLAMA, [a, LLAMA.token_to_id("<s>"), b], skip=False) == "\ufffd<s>\ufffd"


@pytest.mark.parametrize("tokenizer", [LLAMA, METASPACE], ids=["llama", "metaspace"])
def test_a_continuation_keeps_its_leading_space(tokenizer):
    ids = [tokenizer.token_to_id("▁hello"), tokenizer.token_to_id("▁the")]
    assert FACTORIES[id(tokenizer)].create().feed(ids) == " hello the"


def test_special_tokens_are_shown_on_request():
    ids = BYTE_LEVEL.encode("<|im_start|>hello").ids
    assert streamed(BYTE_LEVEL, ids, skip=True) == "hello"
    assert streamed(BYTE_LEVEL, ids, skip=False) == "<|im_start|>hello"


def test_added_tokens_that_are_not_special_are_text():
    assert streamed(BYTE_LEVEL, BYTE_LEVEL.encode("<tool>é à").ids) == "<tool>é à"


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(1, WORD_PIECE.get_vocab_size() - 1), max_size=12), sizes=SIZES)
def test_other_decoders_are_exact_too(ids, sizes):
    assert streamed(WORD_PIECE, ids, sizes=sizes) == decoded(WORD_PIECE, ids)


def test_other_decoders_see_the_end_of_the_prompt():
    play, ing, world = (WORD_PIECE.token_to_id(t) for t in ("play", "##ing", "world"))
    detokenizer = FACTORIES[id(WORD_PIECE)].create(prompt_tail=[play])
    assert [detokenizer.feed([ing]), detokenizer.feed([world])] == ["ing", " world"]
