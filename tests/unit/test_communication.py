"""The exposed part of DDP's exchange is booked as communication, and nothing else changes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from training.communication import ExposedExchange
from training.goodput import Account


class TickingClock:
    """Each look at the clock takes a second, so that the account counts looks."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic_s(self) -> float:
        self.now_s += 1
        return self.now_s


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/sync", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))


def test_from_the_second_pass_on_the_wait_is_communication(alone: None) -> None:
    account = Account(TickingClock(), "compute")  # type: ignore[arg-type]
    exchange = ExposedExchange(account, TickingClock())  # type: ignore[arg-type]
    model = DistributedDataParallel(net())
    exchange.watch(model)
    booked = []
    for _ in range(3):
        model(torch.ones(2, 4)).sum().backward()
        exchange.finished()
        booked.append(account.totals()["communication"])
    assert booked == [0, 1, 2]
    exchange.unwatch()
    model(torch.ones(2, 4)).sum().backward()
    exchange.finished()
    assert account.totals()["communication"] == 2


def test_gradients_are_the_same_to_the_bit(alone: None) -> None:
    plain, watched = DistributedDataParallel(net()), DistributedDataParallel(net())
    exchange = ExposedExchange(Account())
    exchange.watch(watched)
    for step in range(3):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        for model in (plain, watched):
            model.zero_grad()
            model(x).square().mean().backward()
        exchange.finished()
        for ours, theirs in zip(watched.parameters(), plain.parameters(), strict=True):
            assert ours.grad is not None
            assert torch.equal(ours.grad, theirs.grad)


def test_a_model_without_an_exchange_books_nothing() -> None:
    account = Account(kind="compute")
    exchange = ExposedExchange(account)
    exchange.finished()
    exchange.watch(net().requires_grad_(False))
    exchange.finished()
    assert account.totals()["communication"] == 0
