"""Errors survive the trip between Ray's processes, and say their four parts."""

import copy
import pickle  # noqa: TID251 - Ray pickles exceptions between its processes; this proves ours survive

import pytest

import cluster.connection  # noqa: F401 - defines an error of its own
from cluster.errors import Overloaded, TandemError, shown


def whole_tree(root: type[TandemError] = TandemError) -> list[type[TandemError]]:
    return [root, *(kind for child in root.__subclasses__() for kind in whole_tree(child))]


def made(kind: type[TandemError]) -> TandemError:
    extra = (
        {"retry_after_s": 1.5} if "RetryLater" in [base.__name__.strip("_") for base in kind.__mro__] else {}
    )
    return kind("it failed", got="7", allowed="1 to 3", fix="say 2", **extra)


@pytest.mark.parametrize("kind", whole_tree(), ids=lambda kind: kind.__name__)
def test_every_error_survives_pickling_with_its_attributes(kind: type[TandemError]) -> None:
    error = made(kind)
    error.add_note("where it happened")
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        back = pickle.loads(pickle.dumps(error, protocol))
        assert type(back) is kind
        assert back.__dict__ == error.__dict__
        assert (str(back), back.args, back.parts()) == (str(error), error.args, error.parts())
    assert copy.copy(error).__dict__ == error.__dict__


@pytest.mark.parametrize("kind", whole_tree(), ids=lambda kind: kind.__name__)
def test_every_error_has_a_status_and_an_exit_code(kind: type[TandemError]) -> None:
    assert 400 <= kind.http_status < 600
    assert kind.exit_code in (1, 2, 3)


def test_the_tree_in_the_docstring_is_the_tree_in_the_code() -> None:
    import cluster.errors

    here = [kind for kind in whole_tree() if kind.__module__ == "cluster.errors" and kind.__name__[0] != "_"]
    missing = [kind.__name__ for kind in here if kind.__name__ not in (cluster.errors.__doc__ or "")]
    assert missing == []


def test_parts_that_are_not_set_are_not_shown() -> None:
    assert str(TandemError("it failed", fix="wait")) == "it failed\n  fix:     wait"
    assert TandemError("it failed").parts() == {"failed": "it failed"}


def test_an_error_that_says_when_to_retry_keeps_it() -> None:
    assert pickle.loads(pickle.dumps(Overloaded("full", retry_after_s=0.25))).retry_after_s == 0.25


def test_values_are_shown_on_one_line_and_cut() -> None:
    assert shown("a\nb\r\x1b[31m") == r"'a\nb\r\x1b[31m'"
    assert len(shown("x" * 10_000)) == 200
