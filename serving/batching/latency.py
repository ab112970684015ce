"""How long a batch takes, learned from the batches that ran: a + b * rows + c * rows * length.

Two estimates at two speeds, because two things change. The *shape* (a, b, c, none negative) is a fit of
relative errors by least squares that forgets with a memory of some fifty batches; outliers count less, and
what recent batches say nothing of (all had the same size, say) stays as it was known last. The *speed* is
the median ratio of the last few batches to that shape, and is taken out of them before the shape learns: it
follows a machine that slows down within three batches, and a single slow batch doesn't move it.

The margin is a high quantile of the relative errors that predictions made: what the model can't explain.

Pure: numbers in, numbers out. Knows nothing of queues, deadlines or clocks.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from itertools import combinations
from statistics import median

MEMORY = 0.98
"""What one batch leaves of the weight of those before it."""
MARGIN_QUANTILE = 0.95
WORTH = 0.97
"""The share of a full batch's speed that a batch must have to be worth its fixed cost."""
MOST_OF_SLO = 0.8
FIRST_MARGIN = 0.1
"""The margin until there are errors to learn it from."""
MAX_MARGIN = 1.0
_ERRORS = 64
_ERRORS_NEEDED = 8
_RECENT = 5
_ANCHOR = 1e-3
_OUTLIER_SCALES = 3.0
_LEAST_SCALE = 0.03
_FASTEST, _SLOWEST = 0.05, 20.0
_FIT_ALWAYS = 16
_FIT_EVERY_S = 0.02
"""A fit takes some 30 µs, so it is made once in this much time of batches."""
_UNKNOWN_SHARE = 0.02
_SUBSETS = [subset for size in (3, 2, 1) for subset in combinations(range(3), size)]

_Row = tuple[float, float, float]


class LatencyModel:
    """The latency of one model on one machine. Until it has seen a batch, every batch takes no time."""

    def __init__(self) -> None:
        self.margin = FIRST_MARGIN
        """The relative safety margin that `safe_s` adds."""
        self.speed = 1.0
        """How much longer batches take now than the shape says."""
        self._shape: _Row = (0.0, 0.0, 0.0)
        self._squares = [[0.0] * 3 for _ in range(3)]
        self._products = [0.0] * 3
        self._recent: deque[tuple[_Row, float]] = deque(maxlen=_RECENT)
        self._errors: deque[float] = deque(maxlen=_ERRORS)
        self._sorted_errors: list[float] = []
        self._scale = _LEAST_SCALE
        self._observed = 0
        self._since_fit_s = 0.0

    @property
    def known(self) -> bool:
        """Whether it has learned anything."""
        return self._observed > 0

    @property
    def terms_s(self) -> _Row:
        """Seconds for each batch, for each row and for each element of a row, as things are now."""
        a, b, c = self._shape
        return a * self.speed, b * self.speed, c * self.speed

    def observe(self, rows: int, length: int, duration_s: float) -> None:
        """Learn from a batch.

        Args:
            rows: of the batch.
            length: elements of one padded row; 0 for a model whose rows all have one size.
            duration_s: how long it took.
        """
        if rows < 1 or duration_s <= 0:
            return
        features = (1.0, float(rows), float(rows * length))
        usual_s = _dot(self._shape, features)
        expected_s = usual_s * self.speed
        weight = 1.0
        if expected_s > 0:
            error = duration_s / expected_s - 1.0
            self._note_error(error)
            weight = min(1.0, _OUTLIER_SCALES * self._scale / max(abs(error), 1e-9))
        usual_took_s = duration_s / self.speed  # what it would have taken at the shape's own speed
        self._accumulate(features, usual_took_s, weight, usual_s or usual_took_s)
        self._recent.append((features, duration_s))
        self._observed += 1
        self._since_fit_s += duration_s
        if self._observed <= _FIT_ALWAYS or self._since_fit_s >= _FIT_EVERY_S:
            self._since_fit_s = 0.0
            self._fit(features, usual_took_s)

    def estimate_s(self, rows: int, length: int = 0) -> float:
        """The expected duration of a batch."""
        a, b, c = self._shape
        return self.speed * (a + rows * (b + c * length))

    def safe_s(self, rows: int, length: int = 0) -> float:
        """A duration that a batch rarely exceeds."""
        return self.estimate_s(rows, length) * (1.0 + self.margin)

    def rows_within(self, time_s: float, length: int, max_rows: int) -> int:
        """The most rows, up to `max_rows`, whose batch is safe within `time_s`; 0 where not even one is."""
        a, b, c = self._shape
        left_s = time_s / (self.speed * (1.0 + self.margin)) - a
        if left_s < 0:
            return 0
        row_s = b + c * length
        return max_rows if left_s >= row_s * max_rows else int(left_s / row_s)

    def working_rows(self, max_rows: int, length: int, slo_s: float) -> int:
        """The size of batches under load.

        Whoever just missed a batch should be met by the next, so it takes at most half the SLO; but where
        that is too small to be worth its fixed cost, it may take most of it.
        """
        half = self.rows_within(slo_s / 2, length, max_rows)
        if half == max_rows:
            return half
        a, b, c = self._shape
        row_s = b + c * length
        worth = WORTH * max_rows * a / (a + row_s * max_rows * (1 - WORTH))
        return max(1, half, min(int(worth + 1), self.rows_within(MOST_OF_SLO * slo_s, length, max_rows)))

    def _note_error(self, error: float) -> None:
        if len(self._errors) == _ERRORS:
            del self._sorted_errors[bisect_left(self._sorted_errors, self._errors[0])]
        self._errors.append(error)
        insort(self._sorted_errors, error)

    def _accumulate(self, features: _Row, duration_s: float, weight: float, unit_s: float) -> None:
        weight /= unit_s * unit_s
        for i, x in enumerate(features):
            row = self._squares[i]
            for j, y in enumerate(features):
                row[j] = row[j] * MEMORY + weight * x * y
            self._products[i] = self._products[i] * MEMORY + weight * x * duration_s

    def _fit(self, features: _Row, duration_s: float) -> None:
        anchors = []
        for known_s, x, share in zip(self._shape, features, (1.0, 0.1, 0.1), strict=True):
            # What was never told apart is taken for the cost of a batch rather than of its rows.
            reach_s = max(
                known_s, (share if self._observed == 1 else _UNKNOWN_SHARE) * duration_s / max(x, 1.0)
            )
            anchors.append(_ANCHOR / (reach_s * reach_s))
        squares = [[*row] for row in self._squares]
        products = [*self._products]
        for i, anchor in enumerate(anchors):
            squares[i][i] += anchor
            products[i] += anchor * self._shape[i]
        self._shape = _least(squares, products)
        ratios = [took_s / max(_dot(self._shape, x), 1e-12) for x, took_s in self._recent]
        self.speed = min(max(median(ratios), _FASTEST), _SLOWEST)
        if len(self._errors) >= _ERRORS_NEEDED:
            quantile = self._sorted_errors[int(MARGIN_QUANTILE * (len(self._sorted_errors) - 1) + 0.5)]
            self.margin = min(max(quantile, 0.0), MAX_MARGIN)
            self._scale = max(_LEAST_SCALE, median(abs(error) for error in self._errors))


def _dot(left: _Row, right: _Row) -> float:
    return left[0] * right[0] + left[1] * right[1] + left[2] * right[2]


def _least(squares: list[list[float]], products: list[float]) -> _Row:
    """The w >= 0 that makes w'Sw - 2p'w least, S being positive definite: the best of all subsets."""
    best, best_value = (0.0, 0.0, 0.0), 0.0
    for subset in _SUBSETS:
        solution = _solve([[squares[i][j] for j in subset] for i in subset], [products[i] for i in subset])
        if solution is None or any(w < 0 for w in solution):
            continue
        value = -sum(products[i] * w for i, w in zip(subset, solution, strict=True))
        if value < best_value:
            full = [0.0, 0.0, 0.0]
            for i, w in zip(subset, solution, strict=True):
                full[i] = w
            best, best_value = (full[0], full[1], full[2]), value
        if len(subset) == 3:
            break  # nothing is negative: no constraint binds
    return best


def _solve(matrix: list[list[float]], right: list[float]) -> list[float] | None:
    """Gauss's elimination, scaled to a unit diagonal; None where the matrix isn't positive definite."""
    size = len(right)
    if any(matrix[i][i] <= 0 for i in range(size)):
        return None
    scales: list[float] = [matrix[i][i] ** -0.5 for i in range(size)]
    rows = [
        [matrix[i][j] * scales[i] * scales[j] for j in range(size)] + [right[i] * scales[i]]
        for i in range(size)
    ]
    for i in range(size):
        if rows[i][i] <= 1e-15:
            return None
        for k in range(i + 1, size):
            factor = rows[k][i] / rows[i][i]
            for j in range(i, size + 1):
                rows[k][j] -= factor * rows[i][j]
    solution = [0.0] * size
    for i in reversed(range(size)):
        known = sum(rows[i][j] * solution[j] for j in range(i + 1, size))
        solution[i] = (rows[i][size] - known) / rows[i][i]
    return [value * scale for value, scale in zip(solution, scales, strict=True)]
