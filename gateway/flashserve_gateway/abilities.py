"""What the engine lacks, in one table: requests that ask for it are refused by name, and nothing is ignored.

What it learns goes out of here and into `parameters.ENGINE`; the routes stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ApiError, invalid


@dataclass(frozen=True)
class Ability:
    """One thing that the engine cannot do.

    Attributes:
        words: for the message.
        fields: request fields that ask for it, with the values under which they ask for nothing (null always does).
    """

    words: str
    fields: Mapping[str, tuple[Any, ...]]


TABLE: tuple[Ability, ...] = (
    Ability("a choice of the best of several answers", {"best_of": (1,)}),
    Ability("log probabilities of a prompt, unless a completion echoes it", {"prompt_logprobs": ()}),
    Ability(
        "the older names of structured_outputs",
        {"guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": ()},
    ),
    Ability("text after the completion", {"suffix": ("",)}),
    Ability("audio", {"audio": (), "modalities": (["text"],)}),
    Ability("predicted output", {"prediction": ()}),
    Ability("web search", {"web_search_options": ()}),
    Ability("a choice of how much to reason", {"reasoning_effort": ()}),
    Ability("a choice of how much to say", {"verbosity": ()}),
    Ability("moderation", {"moderation": ()}),
    Ability("functions (give tools instead)", {"functions": ([],), "function_call": ("auto", "none")}),
)  # fmt: skip

FIELDS = frozenset(name for ability in TABLE for name in ability.fields)


def refuse_missing(body: Mapping[str, Any]) -> None:
    """Raises ApiError for the first field that asks for an ability that the engine lacks."""
    for ability in TABLE:
        for name, neutral in ability.fields.items():
            value = body.get(name)
            if value is not None and not any(_same(value, item) for item in neutral):
                raise _refusal(name, ability, neutral)


def _same(value: Any, neutral: Any) -> bool:
    """Python takes 0 for False, but `logprobs: 0` asks for something and `logprobs: false` does not."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _refusal(name: str, ability: Ability, neutral: tuple[Any, ...]) -> ApiError:
    only = f"; it may only be {' or '.join(map(repr, neutral))} or left out" if neutral else "; leave it out"
    return invalid(name, f"{name}: this engine does not support {ability.words}{only}", "unsupported_parameter")
