"""Every worker-second is of one kind: in one process by construction, over a run from its events."""

import random
import threading
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest

from cluster.events import EventWriter, read_events
from cluster.goodput import KINDS, Goodput, SeatBook
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
    book = SeatBook()
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
    teller.tell(generation=1, rank=0, final=True)
    events.flush()
    told = list(read_events(store, "runs/r"))
    assert [event["seconds"]["compute"] for event in told] == [TELL_EVERY_S, 2 * TELL_EVERY_S, 25]
    assert [event["final"] for event in told] == [False, False, True]
    assert only(of(*told)) == {"compute": 25}


def account_of(member: str, stop_s: float, final: bool = False, **seconds: float) -> dict:
    return {"event": "account", "at": at(stop_s), "member": member, "seconds": seconds, "final": final}


def seat(change: str, at_s: float, name: str = "s0", **fields: object) -> dict:
    return {"event": change, "at": at(at_s), "seat": name, **fields}


def test_a_death_is_a_restart_until_the_next_member_accounts_for_itself() -> None:
    goodput = of(
        seat("seat-held", 0),
        seat("member-started", 2, member="a"),
        account_of("a", 30, compute=27, restart=1),  # then killed, at some time before 35
        seat("member-started", 35, member="b"),
        account_of("b", 55, final=True, compute=19, restart=1),
        seat("seat-released", 60),
    )
    assert only(goodput) == {"compute": 46, "restart": 2 + 1 + 5 + 1, "idle": 5}
    assert goodput.total_s == goodput.wall_s == 60
    assert goodput.goodput == pytest.approx(46 / 60)


def test_a_lent_seat() -> None:
    goodput = of(
        seat("seat-held", 0),
        seat("member-started", 0, member="a"),
        account_of("a", 10, final=True, compute=10),
        seat("seat-lent", 12),
        seat("seat-returned", 42),
        seat("member-started", 44, member="b"),
        account_of("b", 50, final=True, compute=6),
        seat("seat-released", 50),
    )
    assert only(goodput) == {"compute": 16, "idle": 2 + 2, "lent": 30}
    assert goodput.goodput == pytest.approx(16 / 20)


def test_a_run_lies_still_between_two_drivers_and_that_costs_nothing() -> None:
    goodput = of(
        seat("seat-held", 0, "e1s0"),  # this driver died, and nobody wrote when its seat was released
        seat("member-started", 0, "e1s0", member="a"),
        account_of("a", 10, compute=10),
        seat("seat-held", 1000, "e2s0"),
        seat("member-started", 1000, "e2s0", member="b"),
        account_of("b", 1020, compute=20),
    )
    assert only(goodput) == {"compute": 30}
    assert goodput.wall_s == 1020


def test_without_a_coordinator_each_member_has_a_seat() -> None:
    assert only(of(account_of("a", 10, compute=10), account_of("b", 12, data=3))) == {
        "compute": 10,
        "data": 3,
    }
    assert of().goodput is None
    assert of().total_s == 0


@pytest.mark.parametrize(
    "damaged",
    [
        {},
        {"event": "account"},
        {"event": "account", "at": at(1), "member": "a", "seconds": 7},
        {"event": "account", "at": "then", "member": "a", "seconds": {"compute": 9}},
        {"event": "account", "at": 5, "member": "a", "seconds": {"compute": 9}},
        {"event": "account", "at": at(1), "member": "a", "seconds": {"compute": "9", "data": -1, "x": 4}},
        {"event": "seat-held", "at": at(1)},
        {"event": "seat-held", "at": at(1), "seat": 7},
        {"event": "seat-released", "at": at(1), "seat": "never held"},
    ],
)
def test_damaged_events_are_passed_over(damaged: dict) -> None:
    assert only(of(damaged, account_of("b", 12, data=3))) == {"data": 3}


@pytest.mark.parametrize("seed", range(20))
def test_the_parts_sum_to_the_time_that_seats_were_held(seed: int) -> None:
    """Members come, work, die and leave on several seats, with clocks a little apart; events arrive in any
    order. The parts sum to the seats' time within 1%."""
    chance = random.Random(seed)
    events: list[dict] = []
    held_s = 0.0
    for number in range(chance.randint(1, 4)):
        name, now_s = f"s{number}", chance.uniform(0, 20)
        began_s = now_s
        events.append(seat("seat-held", now_s, name))
        for life in range(chance.randint(1, 6)):
            now_s += chance.uniform(0, 5)
            clock = FakeClock(skew_s=chance.uniform(-0.2, 0.2))
            clock.now_s = now_s
            member = f"m{number}.{life}"
            events.append(seat("member-started", now_s, name, member=member))
            account = Account(clock)
            for step in range(chance.randint(1, 60)):
                account.begin_step(step, reached=chance.choice([0, 30]))
                for kind in ("data", "compute", "communication", "save"):
                    account.switch(kind)
                    clock.sleep(chance.uniform(0, 1))
                if chance.random() < 0.2:
                    events.append(account_of(member, clock.now_s + clock.skew_s, **account.totals()))
            now_s = clock.now_s
            if chance.random() < 0.5:
                told = account_of(member, now_s + clock.skew_s, final=True, **account.totals())
                events.append(told)
            if chance.random() < 0.3:
                events.append(seat("seat-lent", now_s + 0.5, name))
                now_s += chance.uniform(1, 100)
                events.append(seat("seat-returned", now_s, name))
        now_s += 0.5
        events.append(seat("seat-released", now_s, name))
        held_s += now_s - began_s
    chance.shuffle(events)
    goodput = of(*events)
    assert goodput.total_s == pytest.approx(held_s, rel=0.01, abs=0.5)
    assert all(seconds >= 0 for seconds in goodput.worker_s.values())
