"""The pool's policy: never over its bytes, never a model in use, the least recently used first."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from cluster.errors import NotReady
from serving.pool.budget import Budget, Grant

LIMIT = 10
MODELS = "abcdef"


def loaded(budget: Budget, model: str, size_bytes: int = 3) -> Grant:
    budget.enter(model)
    grant = budget.want(model, size_bytes)
    assert budget.step().granted == (grant,)
    budget.leave(model)
    return grant


def test_the_least_recently_used_goes_first_and_no_more_than_needed() -> None:
    budget = Budget(LIMIT)
    a, _, _ = (loaded(budget, model) for model in "abc")
    budget.enter("a")
    budget.leave("a")
    wanted = budget.want("d", 4)
    step = budget.step()
    assert (step.granted, step.evict) == ((), ("b",))
    assert budget.step().evict == ()  # it is going already
    assert budget.held_bytes == 9
    budget.enter("a")
    budget.release(a)
    assert budget.step().granted == (wanted,)


def test_what_is_in_use_stays_and_nobody_goes_in_vain() -> None:
    budget = Budget(LIMIT)
    for model in "abc":
        loaded(budget, model)
    budget.enter("a")
    budget.enter("b")
    wanted = budget.want("d", 5)
    assert budget.step().evict == ()  # c alone would not be enough
    assert not budget.could_have("e", 1)  # it would overtake
    budget.leave("a")
    assert budget.step().evict == ("c", "a")
    budget.withdraw(wanted)
    assert budget.step().granted == ()


def test_larger_than_everything_is_told_at_once() -> None:
    with pytest.raises(NotReady, match="larger than the whole pool"):
        Budget(LIMIT).want("a", LIMIT + 1)


def test_dropping_only_what_rests() -> None:
    budget = Budget(LIMIT)
    assert not budget.drop("a")
    loaded(budget, "a")
    budget.enter("a")
    assert not budget.drop("a")
    budget.leave("a")
    assert budget.drop("a")
    assert not budget.drop("a")


class Pool(RuleBasedStateMachine):
    """Loads, uses and evictions in any order, against a model kept apart."""

    waiting = Bundle("waiting")
    using = Bundle("using")

    def __init__(self) -> None:
        super().__init__()
        self.budget = Budget(LIMIT)
        self.queue: list[Grant] = []
        self.held: list[Grant] = []
        self.leaving: set[Grant] = set()
        self.used: list[str] = []
        self.last_used: dict[str, int] = {}
        self.now = 0

    def touch(self, model: str) -> None:
        self.now += 1
        self.last_used[model] = self.now

    def settle(self) -> None:
        step = self.budget.step()
        for grant in step.granted:
            assert grant is self.queue.pop(0), "in order"
            self.held.append(grant)
        staying = {g.model for g in self.held if g not in self.leaving}
        rest = staying - set(step.evict) - set(self.used)
        for model in step.evict:
            assert model not in self.used, "in use"
            assert model in staying, "twice, or not here"
            assert model != self.queue[0].model
            older = {other for other in rest if self.last_used[other] < self.last_used[model]}
            assert older <= {self.queue[0].model}, "an older one stays"
        self.leaving |= {g for g in self.held if g.model in step.evict}

    @rule(target=using, model=st.sampled_from(MODELS))
    def enter(self, model: str) -> str:
        self.budget.enter(model)
        self.used.append(model)
        self.touch(model)
        return model

    @rule(model=consumes(using))
    def leave(self, model: str) -> None:
        self.budget.leave(model)
        self.used.remove(model)
        self.touch(model)
        self.settle()

    @rule(target=waiting, model=st.sampled_from(MODELS), size_bytes=st.integers(1, LIMIT))
    def want(self, model: str, size_bytes: int) -> Grant:
        if model not in self.last_used:
            self.budget.enter(model)
            self.budget.leave(model)
            self.touch(model)
        grant = self.budget.want(model, size_bytes)
        self.queue.append(grant)
        self.settle()
        return grant

    @rule(target=waiting, grant=consumes(waiting))
    def withdraw_or_release(self, grant: Grant) -> object:
        if grant in self.queue:
            self.budget.withdraw(grant)
            self.queue.remove(grant)
        else:
            self.budget.release(grant)
            self.held.remove(grant)
            self.leaving.discard(grant)
        self.settle()
        return multiple()

    @invariant()
    def never_over(self) -> None:
        assert self.budget.held_bytes == sum(g.size_bytes for g in self.held) <= LIMIT

    @invariant()
    def whoever_waits_waits_for_something(self) -> None:
        """The first in line waits only for what is going, or for models in use or its own."""
        if not self.queue:
            return
        staying = [g for g in self.held if g not in self.leaving]
        idle = [g for g in staying if g.model not in {*self.used, self.queue[0].model}]
        free = LIMIT - sum(g.size_bytes for g in self.held)
        assert self.queue[0].size_bytes > free
        going = sum(g.size_bytes for g in self.leaving)
        if self.queue[0].size_bytes > free + going:
            assert self.queue[0].size_bytes > free + going + sum(g.size_bytes for g in idle)


TestPool = Pool.TestCase
