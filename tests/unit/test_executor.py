"""The async driver: one outcome a request, whatever happens to its neighbours."""

import asyncio
import threading

import numpy as np

from cluster.clock import SystemClock
from cluster.errors import DeadlineExceeded, NotReady, Overloaded, TooLarge
from cluster.signature import Signature, Tensor
from serving.batching.executor import MOST_INLINE_S, Executor
from serving.batching.model import TINY_S, BatchModel
from serving.batching.run import Answer, Failure

FAR_S = 1e12


class FakeRuntime:
    """Doubles its input; a negative value is a poison; `gate` holds batches back."""

    platform = "fake"

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[list[float]] = []
        self.model = BatchModel(self)

    def run(self, inputs):
        assert self.gate.wait(10)
        x = inputs["x"]
        self.batches.append(x[:, 0].tolist())
        if (x < 0).any():
            raise ValueError("poison")
        return {"y": x * 2}

    def close(self) -> None:
        pass


def rows(*values: float) -> dict[str, np.ndarray]:
    return {"x": np.array(values, np.float32).reshape(-1, 1)}


def executor(max_batch_size: int = 4, max_queue_rows: int = 16) -> Executor:
    return Executor(max_batch_size=max_batch_size, max_queue_rows=max_queue_rows, slo_s=60)


async def queue_up(work: Executor, runtime: FakeRuntime, *requests: dict) -> list[asyncio.Task]:
    """Start `requests` behind one that holds the slot."""
    runtime.gate.clear()
    tasks = [asyncio.create_task(work.submit(runtime.model, rows(0), 1, FAR_S))]
    await asyncio.sleep(0)
    for inputs in requests:
        tasks.append(asyncio.create_task(work.submit(runtime.model, inputs, len(inputs["x"]), FAR_S)))
    await asyncio.sleep(0)
    return tasks


def test_what_gathers_while_the_model_is_busy_runs_as_one_batch() -> None:
    async def main() -> None:
        runtime, work = FakeRuntime(), executor()
        tasks = await queue_up(work, runtime, rows(1), rows(2, 3), rows(4))
        assert work.waiting_rows == 4
        runtime.gate.set()
        outcomes = await asyncio.gather(*tasks)
        assert [o.outputs["y"][:, 0].tolist() for o in outcomes] == [[0], [2], [4, 6], [8]]
        assert runtime.batches == [[0], [1, 2, 3, 4]]
        await work.close()

    asyncio.run(main())


def test_a_poisoned_request_fails_alone() -> None:
    async def main() -> None:
        runtime, work = FakeRuntime(), executor(max_batch_size=8)
        tasks = await queue_up(work, runtime, rows(1), rows(2), rows(-3), rows(4), rows(5))
        runtime.gate.set()
        outcomes = await asyncio.gather(*tasks)
        assert [isinstance(o, Failure) for o in outcomes] == [False, False, False, True, False, False]
        assert str(outcomes[3].error) == "poison"
        assert [o.outputs["y"][0, 0] for o in outcomes if isinstance(o, Answer)] == [0, 2, 4, 8, 10]
        await work.close()

    asyncio.run(main())


def test_a_large_request_is_split_and_rejoined() -> None:
    async def main() -> None:
        runtime, work = FakeRuntime(), executor(max_batch_size=4)
        tasks = await queue_up(work, runtime, rows(*range(10)), rows(11))
        runtime.gate.set()
        outcomes = await asyncio.gather(*tasks)
        assert outcomes[1].outputs["y"][:, 0].tolist() == [2.0 * n for n in range(10)]
        assert runtime.batches == [[0], [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 11]]
        await work.close()

    asyncio.run(main())


def test_a_large_request_with_a_poison_fails_once_and_stops() -> None:
    async def main() -> None:
        runtime, work = FakeRuntime(), executor(max_batch_size=2)
        tasks = await queue_up(work, runtime, rows(-1, 0, 1, 2, 3, 4), rows(7))
        runtime.gate.set()
        outcomes = await asyncio.gather(*tasks)
        assert isinstance(outcomes[1], Failure)
        assert outcomes[2].outputs["y"][0, 0] == 14
        assert work.waiting_rows == 0
        await work.close()

    asyncio.run(main())


def test_the_cancelled_never_run() -> None:
    async def main() -> None:
        runtime, work = FakeRuntime(), executor()
        tasks = await queue_up(work, runtime, rows(1), rows(2))
        tasks[1].cancel()
        await asyncio.sleep(0)
        assert work.waiting_rows == 1
        runtime.gate.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(outcomes[1], asyncio.CancelledError)
        assert runtime.batches == [[0], [2]]
        await work.close()

    asyncio.run(main())


def test_the_expired_never_run() -> None:
    async def main() -> None:
        runtime, work = FakeRuntime(), executor()
        tasks = await queue_up(work, runtime)
        late = asyncio.create_task(work.submit(runtime.model, rows(9), 1, 0.0))
        await asyncio.sleep(0)
        work.drop_expired()
        outcome = await late
        assert isinstance(outcome, Failure)
        assert isinstance(outcome.error, DeadlineExceeded)
        runtime.gate.set()
        await asyncio.gather(*tasks)
        assert runtime.batches == [[0]]
        await work.close()

    asyncio.run(main())


def test_a_full_queue_refuses_at_once_and_recovers() -> None:
    async def main() -> None:
        runtime, work = FakeRuntime(), executor(max_batch_size=2, max_queue_rows=2)
        tasks = await queue_up(work, runtime, rows(1), rows(2))
        refused = await work.submit(runtime.model, rows(3), 1, FAR_S)
        assert isinstance(refused, Failure)
        assert isinstance(refused.error, Overloaded)
        assert refused.error.retry_after_s >= 1
        impossible = await work.submit(runtime.model, rows(1, 2, 3), 3, FAR_S)
        assert isinstance(impossible, Failure)
        assert isinstance(impossible.error, TooLarge)
        runtime.gate.set()
        await asyncio.gather(*tasks)
        assert isinstance(await work.submit(runtime.model, rows(3), 1, FAR_S), Answer)
        await work.close()

    asyncio.run(main())


class Padded(FakeRuntime):
    """Answers with the rows' sums and the inputs themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.model = BatchModel(self, PADDED)
        self.shapes: list[tuple[int, ...]] = []

    def run(self, inputs):
        assert self.gate.wait(10)
        self.shapes.append(inputs["x"].shape)
        return {"sum": inputs["x"].sum(axis=1), "same": inputs["x"]}


PADDED = Signature(
    task="t",
    inputs=(Tensor(name="x", dtype="FP32", shape=(-1, -1), padding=0),),
    outputs=(
        Tensor(name="sum", dtype="FP32", shape=(-1,)),
        Tensor(name="same", dtype="FP32", shape=(-1, -1), follows="x"),
    ),
)


def test_lengths_share_a_batch_by_padding_and_each_gets_its_own_back() -> None:
    async def main() -> None:
        runtime, work = Padded(), executor()
        sent = [{"x": np.arange(1, n + 1, dtype=np.float32)[None]} for n in (20, 21, 22)]
        tasks = await queue_up(work, runtime, *sent)
        runtime.gate.set()
        outcomes = await asyncio.gather(*tasks)
        for inputs, outcome in zip(sent, outcomes[1:], strict=True):
            assert isinstance(outcome, Answer)
            assert outcome.outputs["sum"].tolist() == [inputs["x"].sum()]
            assert outcome.outputs["same"].tolist() == inputs["x"].tolist()
        assert runtime.shapes == [(1, 1), (3, 22)]
        await work.close()

    asyncio.run(main())


def test_what_the_latency_forbids_is_refused_but_an_idle_model_is_asked_once() -> None:
    class StillClock(SystemClock):
        def monotonic_s(self) -> float:
            return 100.0

    async def main() -> None:
        runtime = FakeRuntime()
        work = Executor(max_batch_size=4, max_queue_rows=16, slo_s=60, clock=StillClock())
        for _ in range(20):
            runtime.model.latency.observe(1, 0, 50.0)
        assert isinstance(await work.submit(runtime.model, rows(1), 1, 105.0), Answer)  # a probe
        refused = await work.submit(runtime.model, rows(2), 1, 105.0)
        assert isinstance(refused, Failure)
        assert isinstance(refused.error, Overloaded)
        assert refused.error.retry_after_s >= 1
        assert runtime.batches == [[1]]
        await work.close()

    asyncio.run(main())


def test_load_tells_of_the_queue_and_of_what_was_lost() -> None:
    async def main() -> None:
        runtime, work = FakeRuntime(), executor(max_batch_size=2, max_queue_rows=2)
        tasks = await queue_up(work, runtime, rows(1), rows(2))
        await work.submit(runtime.model, rows(3), 1, FAR_S)
        load = work.load()
        assert load.waiting_requests == 2
        assert load.oldest_waiting_s >= 0
        assert load.arrivals_per_s == load.arriving_rows_per_s > load.lost_per_s > 0
        assert load.capacity_rows_per_s is None
        runtime.gate.set()
        await asyncio.gather(*tasks)
        assert (work.load().capacity_rows_per_s or 0) > 0
        await work.close()

    asyncio.run(main())


def test_closing_answers_what_was_accepted_and_takes_nothing_more() -> None:
    async def main() -> None:
        runtime, work = FakeRuntime(), executor()
        tasks = await queue_up(work, runtime, rows(1), rows(2))
        closing = asyncio.create_task(work.close())
        await asyncio.sleep(0)
        late = await work.submit(runtime.model, rows(3), 1, FAR_S)
        assert isinstance(late, Failure)
        assert isinstance(late.error, NotReady)
        runtime.gate.set()
        assert all(isinstance(o, Answer) for o in await asyncio.gather(*tasks))
        await asyncio.wait_for(closing, 10)

    asyncio.run(main())


def test_outputs_with_too_few_rows_are_a_failure_not_a_shift() -> None:
    class Short(FakeRuntime):
        def run(self, inputs):
            return {"y": super().run(inputs)["y"][1:]}

    async def main() -> None:
        work = executor()
        outcome = await work.submit(Short().model, rows(1), 1, FAR_S)
        assert isinstance(outcome, Failure)
        assert "shape (0, 1) for 1 rows" in str(outcome.error)
        await work.close()

    asyncio.run(main())


def test_what_comes_in_one_turn_of_the_event_loop_shares_a_batch() -> None:
    async def main() -> None:
        runtime, work = FakeRuntime(), executor()
        tasks = [work.submit(runtime.model, rows(value), 1, FAR_S) for value in (1, 2, 3)]
        outcomes = await asyncio.gather(*tasks)
        assert [o.outputs["y"][0, 0] for o in outcomes] == [2, 4, 6]
        assert runtime.batches == [[1, 2, 3]]
        await work.close()

    asyncio.run(main())


def test_a_tiny_model_runs_on_the_event_loop_until_its_batches_turn_out_long() -> None:
    class Where(FakeRuntime):
        def __init__(self) -> None:
            super().__init__()
            self.threads: list[str] = []

        def run(self, inputs):
            self.threads.append(threading.current_thread().name)
            return super().run(inputs)

    async def main() -> None:
        runtime, work = Where(), executor(max_batch_size=8)
        runtime.model.is_tiny = True
        outcomes = await asyncio.gather(
            *[work.submit(runtime.model, rows(value), 1, FAR_S) for value in (1, -2, 3)]
        )
        assert [isinstance(o, Failure) for o in outcomes] == [False, True, False]
        assert set(runtime.threads) == {threading.current_thread().name}
        for _ in range(20):
            runtime.model.latency.observe(1, 0, 2 * MOST_INLINE_S)
        await work.submit(runtime.model, rows(4), 1, FAR_S)
        assert runtime.threads[-1].startswith("tandem-model")
        await work.close()

    asyncio.run(main())


def test_only_a_model_whose_full_batch_was_short_is_tiny() -> None:
    class Slow(FakeRuntime):
        row_s = 0.0

        def run(self, inputs):
            now.append(now[-1] + self.row_s * len(inputs["x"]))
            return super().run(inputs)

    class Now(SystemClock):
        def monotonic_s(self) -> float:
            return now[-1]

    now = [0.0]
    signature = Signature(
        task="t",
        inputs=(Tensor(name="x", dtype="FP32", shape=(-1, 1)),),
        outputs=(Tensor(name="y", dtype="FP32", shape=(-1, 1)),),
    )
    for full_s, tiny in ((TINY_S / 2, True), (TINY_S * 2, False)):
        runtime = Slow()
        runtime.row_s = full_s / 16
        model = BatchModel(runtime, signature)
        model.measure(16, Now())
        assert model.is_tiny == tiny
