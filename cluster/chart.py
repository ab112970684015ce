"""A curve in a terminal: braille dots where the output can show them, asterisks elsewhere.

Sixty lines of our own rather than a dependency. Knows nothing of losses or runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_BRAILLE = 0x2800
_DOT = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""The bit of each of a cell's 4 rows and 2 columns."""
_MARGIN = 9
"""Characters of a number in four digits, such as 1.234e-05."""
_WIDE_RANGE = 10.0
"""Values that differ by so much, and are all above zero, get a logarithmic axis."""


def curve(
    points: Sequence[tuple[float, float]], *, width: int, height: int = 8, plain: bool = False
) -> list[str]:
    """Points (x, y), in order of x, as lines of text; the mean where several fall into one column.

    Args:
        width: of a line, labels included, in characters.
        height: lines, beside the one that names the ends of the x axis.
        plain: only ASCII.

    Returns:
        No lines where no point is finite.
    """
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not points:
        return []
    bar = "|" if plain else "│"
    cells = max(width - _MARGIN - 2, 8)
    columns, rows = (cells, height) if plain else (2 * cells, 4 * height)
    means = _columns(points, columns)
    low, high = (pick(mean for mean in means if mean is not None) for pick in (min, max))
    labels = [f"{high:.4g}", f"{low:.4g}"]
    dots = _dots(means, low, high, rows)
    lines = _plain_lines(dots, cells, height) if plain else _braille_lines(dots, cells, height)
    named = [labels[0], *[""] * (height - 2), labels[1]] if height > 1 else [labels[1]]
    drawn = [f"{label:>{_MARGIN}} {bar}{line}".rstrip() for label, line in zip(named, lines, strict=True)]
    first, last = f"{points[0][0]:g}", f"{points[-1][0]:g}"
    return [*drawn, f"{'':{_MARGIN}}  {first}{last:>{max(cells - len(first), len(last) + 1)}}"]


def _columns(points: Sequence[tuple[float, float]], columns: int) -> list[float | None]:
    """The mean y of the points in each column; None where there is none."""
    start, span = points[0][0], (points[-1][0] - points[0][0]) or 1.0
    sums, counts = [0.0] * columns, [0] * columns
    for x, y in points:
        column = min(int((x - start) / span * columns), columns - 1)
        sums[column] += y
        counts[column] += 1
    return [total / count if count else None for total, count in zip(sums, counts, strict=True)]


def _dots(means: list[float | None], low: float, high: float, rows: int) -> set[tuple[int, int]]:
    """(row from the top, column) of each dot; neighbouring columns are joined."""
    logarithmic = low > 0 and high / low >= _WIDE_RANGE
    scale = math.log if logarithmic else float
    bottom, span = scale(low), (scale(high) - scale(low)) or 1.0
    dots: set[tuple[int, int]] = set()
    before: int | None = None
    for column, mean in enumerate(means):
        if mean is None:
            continue
        row = rows - 1 - round((scale(mean) - bottom) / span * (rows - 1))
        joined = range(min(row, before), max(row, before) + 1) if before is not None else (row,)
        dots.update((each, column) for each in joined if each != before or each == row)
        before = row
    return dots


def _braille_lines(dots: set[tuple[int, int]], cells: int, height: int) -> list[str]:
    bits = [[0] * cells for _ in range(height)]
    for row, column in dots:
        bits[row // 4][column // 2] |= _DOT[row % 4][column % 2]
    return ["".join(chr(_BRAILLE + bit) if bit else " " for bit in line) for line in bits]


def _plain_lines(dots: set[tuple[int, int]], cells: int, height: int) -> list[str]:
    return [
        "".join("*" if (row, column) in dots else " " for column in range(cells)) for row in range(height)
    ]
