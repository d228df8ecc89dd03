"""API keys: who may ask what, how much of it at a time.

A keys file is a JSON list; each entry holds the SHA-256 of a key, never the key (`new_key` makes both):

    [{"name": "alice", "sha256": "9f86…", "requests_in_flight": 8, "tokens_per_minute": 60000,
      "models": ["smollm2"], "priority": 0, "weight": 1, "admin": false}]

All but name and sha256 may be left out: no limit, every model, priority 0, weight 1, no say in which models are loaded.
Keys have 256 random bits, so that a plain hash protects them as well as a slow one would.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import orjson

from .errors import ApiError, invalid, model_not_found
from .fair_queue import Share

_MAX_KEY_LENGTH = 512
_IN_FLIGHT_RETRY_S = 1.0
_MOST_WEIGHT = 1000


class KeysFileError(ValueError):
    """The keys file cannot be used; the message says why."""


@dataclass(frozen=True)
class Key:
    """One entry of the file."""

    name: str
    sha256: str
    requests_in_flight: int | None = None
    tokens_per_minute: int | None = None
    models: tuple[str, ...] | None = None
    priority: int = 0
    """Lower goes first. A request may ask for a higher number than its key's, not for a lower one."""
    admin: bool = False
    """May load and unload models: any that the server's machine can read."""
    weight: int = 1
    """Its share of engines that are full, beside other keys that wait: of 2 twice the tokens of 1."""


_NOBODY = Key("anonymous", "")


class Caller:
    """A key and what it uses at present."""

    def __init__(self, key: Key, clock: Callable[[], float] = time.monotonic) -> None:
        self.key = key
        self.share = Share(key.name, key.weight)
        self._clock = clock
        self._in_flight = 0
        self._tokens = float(key.tokens_per_minute or 0)
        self._filled = clock()

    def may_see(self, model: str) -> bool:
        """Whether the model exists for this key."""
        return self.key.models is None or model in self.key.models

    @property
    def is_metered(self) -> bool:
        """Whether its tokens are limited."""
        return self.key.tokens_per_minute is not None

    def priority(self, asked: int | None) -> int | None:
        """That of a request; None leaves it to the engine."""
        if self.key is _NOBODY:
            return asked
        return max(self.key.priority, asked if asked is not None else self.key.priority)

    @contextlib.contextmanager
    def admit(self, model: str, places: int = 1, tokens: int = 0, in_background: bool = False) -> Iterator[Admission]:
        """Lets one HTTP request in, until the block ends. Raises ApiError if the key may not, or not now.

        Args:
            places: how many requests to engines it becomes, all of which count as in flight.
            tokens: what it will probably use of the minute. What it has not used is given back at the end.
            in_background: it takes no places, and waits until the key has half a minute's tokens: what the key asks
                itself is not to wait for its batches.
        """
        places = 0 if in_background else places
        self.check(model, places)
        self.check_room(places, in_background)
        with self.hold(places, tokens) as admission:
            yield admission

    def check(self, model: str, places: int) -> None:
        """Whether the key may ask so at all. Raises ApiError."""
        if not self.may_see(model):
            raise model_not_found(model)
        limit = self.key.requests_in_flight
        if limit is not None and places > limit:  # which waiting would not change
            raise invalid("n", f"n, prompt: this becomes {places} requests; this key may have {limit} in flight")

    def check_room(self, places: int, in_background: bool) -> None:
        """Whether it may now, by what it uses here. Raises ApiError."""
        limit, per_minute = self.key.requests_in_flight, self.key.tokens_per_minute
        if limit is not None and places and self._in_flight + places > limit:
            raise self.too_many_in_flight()
        if per_minute is not None and (wait_s := self._wait_s(per_minute, per_minute // 2 if in_background else 0)) > 0:
            raise self.too_many_tokens(wait_s)

    @contextlib.contextmanager
    def hold(self, places: int, tokens: int) -> Iterator[Admission]:
        """Counts a request that may come in, until the block ends."""
        per_minute = self.key.tokens_per_minute
        reserved = 0 if per_minute is None else min(tokens, per_minute)
        admission = Admission(self, reserved)
        self._in_flight += places
        self._tokens -= reserved
        try:
            yield admission
        finally:
            self._in_flight -= places
            self._tokens += max(0, reserved - admission.used)

    def too_many_in_flight(self) -> ApiError:
        """For a request that would be one more than its key may have."""
        return ApiError(
            429, f"this key may have {self.key.requests_in_flight} requests in flight", code="rate_limit_exceeded",
            retry_after_s=_IN_FLIGHT_RETRY_S,
        )  # fmt: skip

    def too_many_tokens(self, wait_s: float) -> ApiError:
        """For one whose key has used its tokens. ``wait_s``: seconds until it has some again."""
        return ApiError(
            429, f"this key may use {self.key.tokens_per_minute} tokens per minute", code="rate_limit_exceeded",
            retry_after_s=wait_s,
        )  # fmt: skip

    def charge(self, tokens: int) -> None:
        """Takes tokens that were used, also more than are left: the next request waits the longer."""
        self._tokens -= tokens

    def _wait_s(self, per_minute: int, left: int) -> float:
        """Seconds until a token is there, beside those that are to be left; 0 if there is one."""
        now = self._clock()
        rate = per_minute / 60
        self._tokens = min(self._tokens + (now - self._filled) * rate, per_minute)
        self._filled = now
        return max(0.0, (left + 1 - self._tokens) / rate)


class Admission:
    """A request that was let in. What it reserved of its key's tokens is settled when it ends, however it does."""

    def __init__(self, caller: Caller, reserved: int) -> None:
        self._caller = caller
        self._reserved = reserved
        self.used = 0

    def use(self, tokens: int) -> None:
        """Tokens that were read or written; those beyond the reservation are taken at once."""
        before = max(self.used, self._reserved)
        self.used += tokens
        self._caller.charge(max(0, self.used - before))

    def use_up(self) -> None:
        """All that is reserved and not used yet."""
        self.use(max(0, self._reserved - self.used))


class Keyring:
    """All keys; without any, everybody is served."""

    def __init__(self, keys: tuple[Key, ...] | None = None) -> None:
        self._callers = None if keys is None else [Caller(key) for key in keys]
        self._nobody = Caller(_NOBODY)

    @classmethod
    def load(cls, path: Path | None) -> Keyring:
        """Reads a keys file; None: no keys are asked for. Raises KeysFileError."""
        return cls(None if path is None else read_keys(path))

    @property
    def is_open(self) -> bool:
        """Whether everybody is served."""
        return self._callers is None

    def named(self, name: str) -> Caller | None:
        """Who has this name, if anybody."""
        callers = [self._nobody] if self._callers is None else self._callers
        return next((caller for caller in callers if caller.key.name == name), None)

    def caller(self, headers: Mapping[str, str]) -> Caller:
        """Who asks, by `Authorization: Bearer KEY` or `x-api-key`. Raises ApiError."""
        if self._callers is None:
            return self._nobody
        scheme, _, given = headers.get("authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not given:
            raise ApiError(401, "no API key: send Authorization: Bearer KEY", code="invalid_api_key")
        digest = hash_key(given[:_MAX_KEY_LENGTH])
        found = None
        for caller in self._callers:  # all of them, whichever it is: the time tells nothing
            if hmac.compare_digest(digest, caller.key.sha256):
                found = caller
        if found is None:
            raise ApiError(401, "this API key is not known", code="invalid_api_key")
        return found


def hash_key(key: str) -> str:
    """What a keys file holds of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def new_key(name: str) -> tuple[str, dict[str, str]]:
    """A fresh key, and its entry for the file."""
    key = f"fs-{secrets.token_urlsafe(32)}"
    return key, {"name": name, "sha256": hash_key(key)}


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file. Raises KeysFileError."""
    try:
        entries = orjson.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise KeysFileError(f"{path}: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise KeysFileError(f"{path}: must be a list of at least one key")
    keys = tuple(_key(entry, f"{path}: entry {number}") for number, entry in enumerate(entries))
    for what in ("name", "sha256"):
        values = [getattr(key, what) for key in keys]
        if len(set(values)) < len(values):
            raise KeysFileError(f"{path}: two entries have the same {what}")
    return keys


_FIELDS = tuple(item.name for item in fields(Key))


def _key(entry: Any, where: str) -> Key:
    if not isinstance(entry, dict):
        raise KeysFileError(f"{where} is not an object")
    if unknown := [name for name in entry if name not in _FIELDS]:
        raise KeysFileError(f"{where} has an unknown field {unknown[0]!r}; there are {', '.join(_FIELDS)}")
    name, digest = entry.get("name"), entry.get("sha256")
    if not isinstance(name, str) or not name:
        raise KeysFileError(f"{where}: name must be a non-empty string")
    if not isinstance(digest, str) or len(digest) != 64 or not set(digest.lower()) <= set("0123456789abcdef"):
        raise KeysFileError(f"{where}: sha256 must be 64 hexadecimal digits")
    for limit in ("requests_in_flight", "tokens_per_minute"):
        value = entry.get(limit)
        if value is not None and (type(value) is not int or value < 1):
            raise KeysFileError(f"{where}: {limit} must be an integer of at least 1")
    models = entry.get("models")
    if models is not None and not (isinstance(models, list) and all(isinstance(model, str) for model in models)):
        raise KeysFileError(f"{where}: models must be a list of names")
    priority = entry.get("priority", 0)
    if type(priority) is not int or abs(priority) > 2**31 - 1:
        raise KeysFileError(f"{where}: priority must be a 32-bit integer")
    admin = entry.get("admin", False)
    if type(admin) is not bool:
        raise KeysFileError(f"{where}: admin must be true or false")
    weight = entry.get("weight", 1)
    if type(weight) is not int or not 1 <= weight <= _MOST_WEIGHT:
        raise KeysFileError(f"{where}: weight must be an integer in [1, {_MOST_WEIGHT}]")
    return Key(
        name=name,
        sha256=digest.lower(),
        requests_in_flight=entry.get("requests_in_flight"),
        tokens_per_minute=entry.get("tokens_per_minute"),
        models=None if models is None else tuple(models),
        priority=priority,
        admin=admin,
        weight=weight,
    )
