"""The byte-level BPE tokenizer of the demo model."""

from __future__ import annotations

import json
import random
from pathlib import Path

from corpus import ASSISTANT, END, END_OF_TEXT, SPECIAL_TOKENS, USER
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 4096
# As GPT-4 splits (a word takes the one character before it along, numbers go by three digits), except
# that a newline takes the indentation which follows it: a line's start is one token at any usual depth,
# and a prompt which ends in "):" ends at a boundary between tokens.
SPLIT_PATTERN = (
    r"[\r\n]+[ \t]*"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
# The system turn has no token of its own: it is said by the user, ahead of the first question. Training
# saw no system turns at all, so that the nearest thing it has seen is the honest rendering.
CHAT_TEMPLATE = (
    "{%- set ns = namespace(system='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}"
    "{%- set ns.system = ns.system + message['content'] + '\n' -%}"
    "{%- elif message['role'] == 'user' -%}"
    "{{- '" + USER + "\n' + ns.system + message['content'] + '" + END + "\n' -}}"
    "{%- set ns.system = '' -%}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- '" + ASSISTANT + "\n' + message['content'] + '" + END + "\n' -}}"
    "{%- else -%}"
    "{{- raise_exception('unknown role: ' + message['role']) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '" + ASSISTANT + "\n' -}}{%- endif -%}"
)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train the tokenizer; every byte has a token, hence any text makes the round trip exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=2,
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_with_cuts(tokenizer: Tokenizer, text: str, rng: random.Random, mean_gap: int = 600) -> list[int]:
    """Encode a text cut at random places, half of them just after a newline.

    A prompt may end anywhere, e.g. after "):\n", where the usual encoding of the whole text has no
    boundary. One cut in 600 characters shows the model how to go on from there, for 1% more tokens.
    """
    ids: list[int] = []
    start = 0
    while start < len(text):
        end = start + 1 + int(rng.expovariate(1 / mean_gap))
        if rng.random() < 0.5:
            end = text.find("\n", end) + 1 or len(text)
        ids += tokenizer.encode(text[start:end], add_special_tokens=False).ids
        start = end
    return ids


def write_tokenizer_config(folder: Path, max_length: int) -> None:
    """Write tokenizer_config.json, which also holds the chat template."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [USER, ASSISTANT, END],
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
