"""Waiting with an end: who is late is broken off once, whoever leaves in time never."""

import asyncio
import gc

import pytest

from serving import collector
from serving.waiting import ClientGone, InTime, Overdue, WhileConnected

WITHIN_S = 10
SOON_S = 0.01


async def for_ever() -> None:
    await asyncio.Event().wait()


def test_the_late_are_broken_off_and_the_others_are_left_alone() -> None:
    async def main() -> None:
        overdue = Overdue(SOON_S)

        async def one(stays: bool) -> str:
            try:
                with InTime(overdue):
                    if stays:
                        await for_ever()
            except TimeoutError:
                return "late"
            await asyncio.sleep(3 * SOON_S)  # it has left: nothing reaches it any more
            return "in time"

        found = await asyncio.gather(*[one(number % 2 == 0) for number in range(20)])
        assert found == ["late", "in time"] * 10

    asyncio.run(asyncio.wait_for(main(), WITHIN_S))


def test_it_goes_on_after_a_pause_and_on_another_event_loop() -> None:
    overdue = Overdue(SOON_S)

    async def late() -> None:
        for _ in range(2):
            with pytest.raises(TimeoutError), InTime(overdue):
                await for_ever()
            await asyncio.sleep(3 * SOON_S)
        with InTime(overdue):
            pass

    for _ in range(2):
        asyncio.run(asyncio.wait_for(late(), WITHIN_S))


def test_being_cancelled_from_outside_stays_that() -> None:
    async def main() -> None:
        async def one() -> None:
            with InTime(Overdue(WITHIN_S)):
                await for_ever()

        task = asyncio.create_task(one())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(main(), WITHIN_S))


def test_a_client_is_watched_only_once_it_has_waited() -> None:
    async def main() -> None:
        asked: list[str] = []

        async def receive() -> dict[str, str]:
            asked.append("once")
            return {"type": "http.disconnect"}

        with WhileConnected(Overdue(WITHIN_S), receive):
            await asyncio.sleep(SOON_S)
        assert not asked
        with pytest.raises(ClientGone), WhileConnected(Overdue(SOON_S), receive):
            await for_ever()
        assert asked == ["once"]

    asyncio.run(asyncio.wait_for(main(), WITHIN_S))


def test_what_is_loaded_is_never_looked_at_again() -> None:
    before = gc.get_threshold()
    try:
        collector.settle()
        assert gc.get_freeze_count() > 10_000
        assert gc.get_threshold() == (collector.YOUNG_OBJECTS, *before[1:])
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)
