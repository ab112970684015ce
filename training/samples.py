"""Small real datasets that come with scikit-learn, as Parquet, for the quickstart and the tests."""

from __future__ import annotations


def write_digits(destination: str) -> tuple[str, str]:
    """1,797 handwritten digits, 8 x 8 grey: columns `image` (PNG) and `label` (int, 0 to 9).

    Written below `destination` unless they are there.

    Returns:
        The URIs of the training (80%) and the evaluation dataset.
    """
    raise NotImplementedError


def write_breast_cancer(destination: str) -> tuple[str, str]:
    """569 cases: 30 measurements as float columns, and `label` ('malignant' or 'benign').

    Returns:
        The URIs of the training (80%) and the evaluation dataset.
    """
    raise NotImplementedError
