"""Random life of a scheduler: whatever arrives, every request ends once, rightly, and nothing is lost.

``FakeRunner`` checks each plan (see there); this file throws things at it and does the books at the end.
"""

from __future__ import annotations

import math
import random
import struct

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from mini_engine import MiniEngine
from oracle import EOS, Name, Oracle, check, name_of, request_of

from flashserve.engine.core import MAX_FAILED_STEPS
from flashserve.errors import INTERNAL, INVALID_ARG, UNAVAILABLE


def deadline(oracle: Oracle) -> float:
    return math.inf if oracle.message.deadline is None else oracle.message.deadline


class World:
    """A MiniEngine, and the books on what was done to each request."""

    def __init__(self, **engine: int | bool) -> None:
        self.engine = MiniEngine(**engine)  # type: ignore[arg-type]
        self.aborted: set[Name] = set()
        self.held: dict[int, list[str]] = {}
        """What requests still wait for."""
        self.faults = 0
        # Prompts begin with parts of these, so that prefixes meet at every length, within and between blocks.
        source = random.Random(7)
        self.texts = [[source.randrange(2, 97) for _ in range(200)] for _ in range(3)]

    def add(self, text: int, shared: int, own: int, max_tokens: int | None, **more: object) -> None:
        engine = self.engine
        length = engine.config.max_model_len - 1
        tail = [5000 + engine.num_requests] * own
        prompt = (self.texts[text][:shared] + tail)[:length] or [2]
        request_id = engine.add(prompt, max_tokens, **more)  # type: ignore[arg-type]
        if request_id in engine.ended:
            error = engine.ended[request_id].output.error
            waiting = engine.scheduler.stats().waiting
            full = error is not None and error.code == UNAVAILABLE and waiting > 0
            check(full or (error is not None and error.code == INVALID_ARG and more["n"] != 1), "refused", error)
        elif more.get("holds"):
            self.held[request_id] = list(more["holds"])  # type: ignore[call-overload]

    def names(self, request_id: int) -> list[Name]:
        return [name for name in self.engine.oracles if request_of(name) == request_id]

    def abort(self, request_id: int) -> None:
        self.aborted |= {name for name in self.names(request_id) if name not in self.engine.ended}
        self.engine.abort(request_id)
        check(all(n in self.engine.ended for n in self.names(request_id)), "an abort takes effect at once", request_id)

    def abort_sample(self, request_id: int, index: int) -> None:
        """As after a stop string, which only tokens can complete."""
        engine, name = self.engine, name_of(request_id, index)
        if engine.streams.get(name) and name not in engine.ended:
            self.aborted.add(name)
            engine.abort(samples=[(request_id, index)])
            check(name in engine.ended, "an abort takes effect at once", name)

    def release(self, request_id: int) -> None:
        """One thing less that it waits for."""
        if self.held.get(request_id):
            self.engine.scheduler.release(request_id, self.held[request_id].pop())

    def step(self, fault: str | None = None) -> None:
        engine = self.engine
        running = [r for r in engine.scheduler._requests if any(s.slot is not None for s in r.sequences)]
        oldest = min(running, key=lambda r: (r.terms.priority, r.terms.arrival, r.id), default=None)
        preemptions = oldest.preemptions if oldest else 0
        if engine.runner.failed_in_a_row == MAX_FAILED_STEPS - 1:
            fault = None  # else the engine would give up, and rightly
        self.faults += fault is not None
        plan = engine.step(fault)
        engine.now += 1.0
        stats = engine.scheduler.stats()
        if plan is not None and plan.admissions and stats.running > 1 and fault is None:
            # Decodes took their blocks before; the blocks of requests that ended since can only add.
            check(stats.free_blocks >= engine.config.watermark_blocks, "below the watermark", stats)
        if oldest is not None and fault is None:
            check(oldest.preemptions == preemptions, "the oldest of the best priority was preempted", oldest)
        late = [r for r, o in engine.oracles.items() if deadline(o) <= engine.now - 1.0]
        check(all(r in engine.ended for r in late), "a deadline passed unnoticed", late)
        held = [r for r, holds in self.held.items() if holds]
        check(all(not engine.streams[r] for r in held), "a held request ran", held)

    def finish(self) -> None:
        """Let all requests end, then do the books."""
        engine = self.engine
        for request_id, holds in self.held.items():
            for _ in list(holds):
                self.release(request_id)
        live = [o for r, o in engine.oracles.items() if r not in engine.ended]
        # Each step brings the oldest of the best priority on; that bounds the steps, however much is recomputed. What
        # drafts or looks back does not run ahead.
        bound = (1 + engine.runner.run_ahead) * sum(len(o.tokens) + 3 for o in live) + 10
        while engine.scheduler.has_requests:
            check(bound > 0, "livelock", engine.scheduler.stats())
            self.step()
            bound -= 1
        engine.run(2)  # what is in flight
        engine.check_idle()
        for name in engine.oracles:
            self._check_end(name)
        stats = engine.scheduler.stats()
        check(stats.generation_tokens == sum(map(len, engine.streams.values())), "tokens miscounted", stats)

    def _check_end(self, name: Name) -> None:
        engine = self.engine
        oracle, ended = engine.oracles[name], engine.ended[name]
        tokens, reason, output = ended.token_ids, ended.reason, ended.output
        if reason in ("stop", "length"):
            check(tokens == oracle.generated and reason == oracle.reason, "wrong answer", name, tokens, reason)
        else:
            check(tokens == oracle.generated[: len(tokens)], "wrong beginning", name, tokens, oracle.generated)
            whole = oracle.generated and len(tokens) == len(oracle.generated)
            check(not whole, "a whole answer must end by itself", name, reason)
        if oracle.message.pooling is not None and reason == "stop":
            (embedding,) = struct.unpack("<f", output.embedding or b"")
            check(math.isclose(embedding, oracle.embedding, rel_tol=1e-6), "wrong embedding", name, embedding)
        else:
            check(output.embedding is None, "an embedding that is none", name, output)
        if reason == "abort":
            check(name in self.aborted, "nobody aborted it", name)
        elif reason == "deadline":
            check(deadline(oracle) <= engine.now, "ended before its deadline", name)
        elif reason == "error":
            assert output.error is not None
            allowed = {UNAVAILABLE} | ({INTERNAL} if self.faults else set())
            allowed |= {INVALID_ARG} if oracle.message.params.n > 1 else set()
            check(output.error.code in allowed, "an error without a fault", name, output.error)
        if output.timings is not None:
            cached = output.timings.cached_tokens
            check(cached < oracle.num_prompt and cached % engine.blocks.block_size == 0, "cached tokens", cached)


# --- guided by hypothesis: short lives, and shrinking when one goes wrong -----------------------------------


class Life(RuleBasedStateMachine):
    """Rules are what can happen to an engine."""

    @initialize(
        num_blocks=st.integers(2, 24),
        block_size=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.integers(1, 6),
        extra_budget=st.integers(0, 12),
        run_ahead=st.booleans(),
        drafts=st.booleans(),
        caching=st.booleans(),
        watermark_blocks=st.integers(0, 3),
        max_waiting_requests=st.integers(1, 6),
        max_waiting_tokens=st.integers(4, 100),
    )
    def start(self, max_num_seqs: int, extra_budget: int, **engine: int) -> None:
        self.world = World(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_seqs + extra_budget, **engine)

    @rule(
        text=st.integers(0, 2),
        shared=st.integers(0, 30),
        own=st.integers(0, 6),
        max_tokens=st.one_of(st.none(), st.integers(1, 12)),
        min_tokens=st.integers(0, 3),
        priority=st.integers(-1, 1),
        wait=st.one_of(st.none(), st.integers(0, 20)),
        salt=st.sampled_from(["", "", "b"]),
        ignore_eos=st.booleans(),
        stops=st.lists(st.integers(2, 96), max_size=12),
        n=st.sampled_from([1, 1, 2, 3]),
        pooling=st.sampled_from([None, None, None, "last", "mean", "cls"]),
        prompt_logprobs=st.sampled_from([None, None, 0]),
        holds=st.sampled_from([(), (), (), ("a grammar",), ("a grammar", "an image")]),
        presence_penalty=st.sampled_from([0.0, 0.0, 1.0]),
        dry_multiplier=st.sampled_from([0.0, 0.0, 1.0]),
        forces=st.sampled_from([False, False, True]),
    )
    def add(self, max_tokens: int | None, min_tokens: int, wait: int | None, stops: list[int], **more: object) -> None:
        self.world.add(
            max_tokens=max_tokens,
            min_tokens=min(min_tokens, max_tokens or min_tokens),
            deadline=None if wait is None else self.world.engine.now + wait,
            stop_token_ids=tuple(stops),
            **more,
        )

    @rule(count=st.integers(1, 6))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.world.step()

    @precondition(lambda self: self.world.engine.num_requests)
    @rule(which=st.integers(0, 1000))
    def abort(self, which: int) -> None:
        self.world.abort(which % self.world.engine.num_requests)

    @precondition(lambda self: self.world.engine.num_requests)
    @rule(which=st.integers(0, 1000), index=st.integers(0, 2))
    def abort_sample(self, which: int, index: int) -> None:
        self.world.abort_sample(which % self.world.engine.num_requests, index)

    @precondition(lambda self: self.world.held)
    @rule(which=st.integers(0, 1000))
    def release(self, which: int) -> None:
        self.world.release(list(self.world.held)[which % len(self.world.held)])

    @rule(fault=st.sampled_from(["submit", "wait"]))
    def fault(self, fault: str) -> None:
        self.world.step(fault)

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "world"):
            self.world.engine.scheduler.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.finish()


# The same examples in every run: a red test must not depend on luck. Raise the numbers to search for more. A failing
# life is not shrunk, which would take minutes: add Phase.shrink to see a short one.
Life.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)
TestLife = Life.TestCase


# --- long and crowded lives from a seed ---------------------------------------------------------------------


def crowded_life(seed: int, steps: int, run_ahead: bool, caching: bool, drafts: bool) -> World:
    """Some hundred requests on few blocks; the rates change, so that queues fill and drain again."""
    rng, wishes, embeddings = random.Random(seed), random.Random(-seed), random.Random(-1 - seed)
    grammars = random.Random(1000 + seed)
    seqs = rng.choice([2, 4, 8, 16])
    world = World(
        num_blocks=rng.choice([12, 20, 40]),
        block_size=rng.choice([1, 4, 8]),
        run_ahead=run_ahead,
        caching=caching,
        drafts=drafts,
        max_num_seqs=seqs,
        max_num_batched_tokens=seqs + rng.choice([0, 1, 7, 40]),
        watermark_blocks=rng.choice([0, 1, 3]),
        max_waiting_requests=rng.choice([2, 20, 1000]),
        max_waiting_tokens=rng.choice([50, 10_000]),
    )
    rate = 0.0
    for step in range(steps):
        if step % 50 == 0:
            rate = rng.choice([0.1, 0.4, 1.0, 0.0])
        while rng.random() < rate / 2:
            max_tokens = rng.choice([None, 1, 5, 20, 60])
            world.add(
                text=rng.randrange(3),
                shared=rng.choice([0, 3, 8, 17, 60]),
                own=rng.choice([0, 0, 1, 5, 30]),
                max_tokens=max_tokens,
                min_tokens=min(rng.choice([0, 0, 3]), max_tokens or 3),
                priority=rng.choice([0, 0, 0, -5, 5]),
                arrival=world.engine.now - rng.choice([0, 0, 3]),
                deadline=rng.choice([None, None, None, world.engine.now + rng.randrange(60)]),
                salt=rng.choice(["", "", "b"]),
                ignore_eos=rng.random() < 0.5,
                stop_token_ids=tuple(rng.sample(range(2, 97), rng.choice([0, 5]))),
                n=rng.choice([1, 1, 1, 2, 4]),
                prompt_logprobs=None if world.engine.num_requests % 4 else 1,
                holds=rng.choice([(), (), (), ("a grammar",)]),
                presence_penalty=wishes.choice([0, 0, 1]),
                dry_multiplier=wishes.choice([0, 0, 1]),
                forces=grammars.random() < 0.2,
            )
        if rate and embeddings.random() < 0.05:
            world.add(
                text=embeddings.randrange(3),
                shared=embeddings.choice([0, 8, 60]),
                own=embeddings.choice([0, 1, 30]),
                max_tokens=None,
                pooling=embeddings.choice(["last", "mean", "cls"]),
                n=1,
            )
        if world.engine.oracles and rng.random() < 0.03:
            world.abort(rng.randrange(world.engine.num_requests))
        if world.engine.oracles and rng.random() < 0.03:
            world.abort_sample(rng.randrange(world.engine.num_requests), rng.randrange(4))
        for held in [name for name, holds in world.held.items() if holds]:
            if rng.random() < 0.1:
                world.release(held)
        world.step(fault=rng.choice(["submit", "wait"]) if rng.random() < 0.003 else None)
    return world


@pytest.mark.parametrize("run_ahead", [False, True], ids=["synchronous", "run-ahead"])
@pytest.mark.parametrize("caching", [False, True], ids=["uncached", "cached"])
@pytest.mark.parametrize("drafts", [False, True], ids=["plain", "drafts"])
def test_crowded_life(run_ahead: bool, caching: bool, drafts: bool) -> None:
    chunks = hits = preemptions = copies = embedded = jumps = parts = 0
    lengths: set[int] = set()
    reasons: set[str] = set()
    for seed in range(14):
        world = crowded_life(seed, 400, run_ahead, caching, drafts)
        world.finish()
        stats = world.engine.scheduler.stats()
        chunks += stats.prefill_chunks
        hits += stats.prefix_cache_hits
        preemptions += stats.preemptions
        copies += sum(len(plan.block_copies) for plan in world.engine.plans)
        lengths |= world.engine.runner.lengths
        jumps += world.engine.runner.jumps
        parts += world.engine.runner.parts
        embedded += sum(ended.output.embedding is not None for ended in world.engine.ended.values())
        reasons |= {ended.reason for ended in world.engine.ended.values()}
    # The test is worth something only if all of this happened.
    assert reasons == {"stop", "length", "abort", "deadline", "error"}
    assert chunks > 100 and preemptions > 50 and copies > 50 and embedded > 50
    assert jumps > 150 and parts > 20
    assert lengths == ({0, 1, 2, 3, 4} if drafts else {0, 1})
    assert (hits > 500) == caching


def test_same_answers_however_they_are_computed() -> None:
    """One workload in every mode: memory, budget, caching and order of the loop must not show in the tokens."""
    answers = set()
    for run_ahead in (False, True):
        for caching in (False, True):
            for blocks, budget, drafts in ((200, 400, False), (14, 9, False), (200, 400, True), (14, 9, True)):
                world = World(
                    num_blocks=blocks,
                    block_size=4,
                    run_ahead=run_ahead,
                    caching=caching,
                    drafts=drafts,
                    max_num_seqs=8,
                    max_num_batched_tokens=budget,
                    max_model_len=56,
                )
                for i in range(24):
                    more = {"ignore_eos": i % 4 > 0, "forces": i % 5 > 2}
                    world.add(text=i % 3, shared=i, own=i % 2, max_tokens=20, **more)
                world.finish()
                world.engine.check_answers()
                answers.add(str(sorted(world.engine.streams.items(), key=str)))
                assert (world.engine.scheduler.stats().preemptions > 0) == (blocks == 14)
    assert len(answers) == 1


def test_end_tokens_of_the_fake_model_are_reachable() -> None:
    """The oracle must produce both reasons, else half of the checks above are empty."""
    world = World()
    for i in range(40):
        world.add(text=0, shared=i + 1, own=0, max_tokens=30, ignore_eos=False)
    world.finish()
    ends = [world.engine.ended[i] for i in range(40)]
    assert {ended.reason for ended in ends} == {"stop", "length"}
    assert all(ended.token_ids[-1] in EOS for ended in ends if ended.reason == "stop")
