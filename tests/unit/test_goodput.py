"""Every worker-second is of one kind: in one process by construction, over a run from its events."""

import random
import threading
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest

from cluster.events import EventWriter, read_events
from cluster.goodput import KINDS, Goodput, TimeBook
from cluster.storage import memory_store
from training.goodput import TELL_EVERY_S, Account, AccountTeller

START = datetime(2026, 1, 2, tzinfo=UTC)


class FakeClock:
    """Wall and monotonic time that move only when told to."""

    def __init__(self, skew_s: float = 0.0) -> None:
        self.now_s = 0.0
        self.skew_s = skew_s

    def wall(self) -> datetime:
        return START + timedelta(seconds=self.now_s + self.skew_s)

    def monotonic_s(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s


def at(seconds: float) -> str:
    return (START + timedelta(seconds=seconds)).isoformat()


def only(goodput: Goodput) -> dict[str, float]:
    return {kind: round(seconds, 6) for kind, seconds in goodput.worker_s.items() if seconds}


def of(*events: dict) -> Goodput:
    book = TimeBook()
    for event in events:
        book.add(event)
    return book.goodput()


def test_the_parts_of_an_account_sum_to_its_time() -> None:
    clock = FakeClock()
    clock.now_s = 100.0
    account = Account(clock)
    clock.sleep(3)
    assert account.switch("data") == "restart"
    clock.sleep(1)
    account.switch("compute")
    clock.sleep(5)
    with account.during("save"):
        clock.sleep(0.5)
    clock.sleep(1)
    totals = account.totals()
    assert totals == dict.fromkeys(KINDS, 0.0) | {"restart": 3, "data": 1, "compute": 6, "save": 0.5}
    assert sum(totals.values()) == clock.now_s - 100


def test_a_block_that_fails_ends_all_the_same() -> None:
    clock = FakeClock()
    account = Account(clock, "compute")

    def fail() -> None:
        with account.during("communication"):
            clock.sleep(2)
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        fail()
    clock.sleep(1)
    assert account.totals()["communication"] == 2
    assert account.totals()["compute"] == 1


def test_what_is_moved_is_never_more_than_there_is() -> None:
    clock = FakeClock()
    account = Account(clock, "compute")
    clock.sleep(2)
    account.move(0.5, "compute", "communication")
    assert account.totals()["compute"] == 1.5
    account.move(10, "compute", "communication")
    account.move(-1, "compute", "communication")
    assert account.totals()["compute"] == 0
    assert account.totals()["communication"] == 2


def test_steps_done_before_are_redone() -> None:
    clock = FakeClock()
    account = Account(clock, "compute")
    for step in (0, 1, 2, 1, 2, 3):  # rolled back from 3 to 1
        account.begin_step(step)
        with account.during("data"):
            clock.sleep(1)
        clock.sleep(2)
        account.move(1, "compute", "communication")
        with account.during("save"):
            clock.sleep(0.25)
    totals = account.totals()
    assert totals["redone"] == 2 * 3
    assert (totals["data"], totals["compute"], totals["communication"]) == (4, 4, 4)
    assert totals["save"] == 6 * 0.25


def test_steps_that_another_process_did_are_redone_too() -> None:
    clock = FakeClock()
    account = Account(clock, "compute")
    for step in (5, 6, 7):
        account.begin_step(step, reached=7)
        clock.sleep(1)
    assert account.totals()["redone"] == 2
    assert account.totals()["compute"] == 1


def test_totals_may_be_read_from_another_thread() -> None:
    account = Account()
    stop = threading.Event()
    sums: list[float] = []

    def read() -> None:
        while not stop.is_set():
            sums.append(sum(account.totals().values()))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(2000):
        account.switch("data")
        account.switch("compute")
    stop.set()
    reader.join(30)
    assert all(later >= earlier - 1e-9 for earlier, later in pairwise(sums))  # sums round


def test_the_account_is_told_now_and_then_and_at_the_end() -> None:
    clock, store = FakeClock(), memory_store()
    events = EventWriter(store, "runs/r", "a", clock)
    teller = AccountTeller(Account(clock, "compute"), events, "m1", clock)
    for _ in range(25):
        clock.sleep(1)
        teller.tell_if_due(generation=1, rank=0)
    teller.tell(generation=1, rank=0)
    events.flush()
    told = list(read_events(store, "runs/r"))
    assert [event["seconds"]["compute"] for event in told] == [TELL_EVERY_S, 2 * TELL_EVERY_S, 25]
    assert only(of(*told)) == {"compute": 25}


def account_of(member: str, stop_s: float, **seconds: float) -> dict:
    return {"event": "account", "at": at(stop_s), "member": member, "seconds": seconds}


def started(generation: int, at_s: float, world: int) -> dict:
    return {"event": "generation-started", "at": at(at_s), "generation": generation, "world": world}


def lent(at_s: float, workers: int, world: int) -> dict:
    return {"event": "lent", "at": at(at_s), "workers": workers, "world": world}


def returned(at_s: float) -> dict:
    return {"event": "returned", "at": at(at_s)}


def test_a_death_is_a_restart_until_the_next_member_accounts_for_itself() -> None:
    goodput = of(
        started(1, 2, world=2),
        account_of("a", 60, compute=48, restart=12),  # from 0, a survivor
        account_of("b", 30, compute=28, restart=2),  # from 0; killed at some time before 35
        account_of("c", 60, compute=20, restart=5),  # forked at 35
        started(2, 40, world=2),
    )
    assert only(goodput) == {"compute": 96, "restart": 19 + 5}
    assert goodput.total_s == 2 * goodput.wall_s == 120
    assert goodput.goodput == pytest.approx(96 / 120)


def test_a_lent_seat() -> None:
    goodput = of(
        started(1, 0, world=2),
        account_of("a", 60, compute=60),
        account_of("b", 10, compute=10),  # leaves
        lent(12, workers=1, world=1),
        started(2, 13, world=1),
        account_of("c", 60, compute=16, restart=2),  # forked at 42 on the seat that comes back
        started(3, 44, world=2),
        returned(44),
    )
    assert only(goodput) == {"compute": 86, "restart": 2 + 2, "lent": 30}
    assert goodput.total_s == 120
    assert goodput.goodput == pytest.approx(86 / 90)


def test_a_run_lies_still_between_two_drivers_and_that_costs_nothing() -> None:
    goodput = of(
        started(1, 0, world=1),
        account_of("a", 10, compute=10),
        lent(9, workers=1, world=1),  # and with its driver the loan is forgotten
        started(1, 1000, world=1),
        account_of("b", 1020, compute=20),
    )
    assert only(goodput) == {"compute": 30, "lent": 1}
    assert goodput.wall_s == 1020


def test_without_a_coordinator_members_speak_for_themselves() -> None:
    assert only(of(account_of("a", 10, compute=10), account_of("b", 12, data=3))) == {
        "compute": 10,
        "data": 3,
    }
    assert of().goodput is None
    assert of(started(1, 0, world=4)).total_s == 0


@pytest.mark.parametrize(
    "damaged",
    [
        {},
        {"event": "account"},
        {"event": "account", "at": at(1), "member": "a", "seconds": 7},
        {"event": "account", "at": "then", "member": "a", "seconds": {"compute": 9}},
        {"event": "account", "at": 5, "member": "a", "seconds": {"compute": 9}},
        {"event": "account", "at": at(1), "member": "a", "seconds": {"compute": "9", "data": -1, "x": 4}},
        {"event": "generation-started", "at": at(1)},
        {"event": "generation-started", "at": at(1), "generation": "1", "world": 1e9},
        {"event": "lent", "at": at(1), "workers": True},
        {"event": "returned", "at": None},
    ],
)
def test_damaged_events_are_passed_over(damaged: dict) -> None:
    assert only(of(damaged, account_of("b", 12, data=3))) == {"data": 3}


@pytest.mark.parametrize("seed", range(20))
def test_the_parts_sum_to_the_time_that_seats_were_held(seed: int) -> None:
    """Members work, die at any time and are replaced, on several seats, with clocks a little apart; accounts
    are told now and then. The parts sum to seats times wall-clock within 1%."""
    chance = random.Random(seed)
    world = chance.randint(1, 4)
    events: list[dict] = [started(1, 3, world)]
    stop_s = 400.0
    for seat in range(world):
        now_s, life = 0.0, 0
        while now_s < stop_s:
            clock = FakeClock(skew_s=chance.uniform(-0.05, 0.05))
            clock.now_s = now_s
            account = Account(clock)
            clock.sleep(3)
            dies_s = now_s + chance.uniform(10, 300)
            told_s = now_s
            while clock.now_s < min(dies_s, stop_s):
                account.begin_step(int(clock.now_s), reached=chance.choice([0, 10**6]))
                for kind in ("data", "compute", "communication", "save"):
                    account.switch(kind)
                    clock.sleep(chance.uniform(0, 1))
                if clock.now_s - told_s > TELL_EVERY_S or clock.now_s >= stop_s:
                    clock.now_s = min(clock.now_s, stop_s)
                    told_s = clock.now_s
                    stamp_s = clock.now_s + clock.skew_s
                    events.append(account_of(f"m{seat}.{life}", stamp_s, **account.totals()))
            now_s, life = clock.now_s + chance.uniform(0, 5), life + 1
    chance.shuffle(events)
    goodput = of(*events)
    assert goodput.total_s == pytest.approx(world * stop_s, rel=0.01)
    assert all(seconds >= 0 for seconds in goodput.worker_s.values())
