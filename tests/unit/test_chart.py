"""Curves in a terminal."""

import math

import pytest

from cluster.chart import curve


def test_a_plain_curve() -> None:
    points = [(float(x), 10.0 - x) for x in range(10)]
    assert curve(points, width=21, height=4, plain=True) == [
        "       10 |****",
        "          |    ***",
        "          |       **",
        "        1 |         *",
        "           0        9",
    ]


def test_dots_are_finer_than_characters() -> None:
    lines = curve([(float(x), math.sin(x / 50)) for x in range(400)], width=40, height=5)
    assert len(lines) == 6
    assert all(len(line) <= 40 for line in lines)
    assert all("⠀" <= char <= "⣿" for line in lines[:5] for char in line.split("│")[1] if char != " ")


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(
    "points",
    [
        [(5.0, 1.0)],
        [(0.0, 2.0), (10.0, 2.0)],
        [(0.0, 1e-9), (1.0, 1e9)],
        [(0.0, -5.0), (1.0, math.nan), (2.0, math.inf), (3.0, 5.0)],
        [(float(x), float(x % 7)) for x in range(5000)],
    ],
)
def test_any_points(points: list[tuple[float, float]], plain: bool) -> None:
    for width in (1, 20, 79, 300):
        lines = curve(points, width=width, plain=plain)
        assert len(lines) == 9
        assert (
            any(char in line for line in lines[:-1] for char in ("*" if plain else "⠁⠂⠄⡀⠈⠐⠠⢀⠉⠒⠤⣀⣿"))
            or not plain
        )
        assert not plain or "\n".join(lines).isascii()


def test_nothing_to_draw() -> None:
    assert curve([], width=80) == []
    assert curve([(0.0, math.nan)], width=80) == []
