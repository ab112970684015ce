"""Small real datasets that come with installed packages, as Parquet, for the quickstart and the tests.

The files are the same bytes every time, so a call that was interrupted is simply repeated.
"""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image
from pyarrow import csv

from cluster.errors import NotFound
from training.data.publish import publish_again, published
from training.data.split import split_rows

_EVAL_FRACTION = 0.2
_SEED = 0
_GROUP_ROWS = 128


def write_digits(destination: str) -> tuple[str, str]:
    """1,797 handwritten digits, 8 x 8 grey: columns `image` (PNG) and `label` (int64, 0 to 9).

    Written below `destination` (a storage URI or a path) unless they are there.

    Returns:
        The URIs of the training (80%) and the evaluation dataset.

    Raises:
        StorageError: the store can't be written.
    """
    from sklearn.datasets import load_digits

    if there := published(destination):
        return there["train"], there["eval"]
    digits = load_digits()
    # Ink is 0 to 16 in the data; an image file holds 0 to 255.
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    images = pa.array([_png(image) for image in pixels], pa.binary())
    table = pa.table({"image": images, "label": pa.array(digits.target, pa.int64())})
    return _publish(table, digits.target, destination)


def write_breast_cancer(destination: str) -> tuple[str, str]:
    """569 cases: 30 measurements as float64 columns, and `label` ('malignant' or 'benign').

    Written below `destination` (a storage URI or a path) unless they are there.

    Returns:
        The URIs of the training (80%) and the evaluation dataset.

    Raises:
        StorageError: the store can't be written.
    """
    from sklearn.datasets import load_breast_cancer

    if there := published(destination):
        return there["train"], there["eval"]
    data = load_breast_cancer()
    columns = {str(name): data.data[:, i] for i, name in enumerate(data.feature_names)}
    table = pa.table(columns | {"label": data.target_names[data.target].tolist()})
    return _publish(table, data.target, destination)


def write_diabetes(destination: str) -> tuple[str, str]:
    """442 patients: 10 measurements as float64 columns, and `label`, the disease's progression in a year.

    Written below `destination` (a storage URI or a path) unless they are there.

    Returns:
        The URIs of the training (80%) and the evaluation dataset.

    Raises:
        StorageError: the store can't be written.
    """
    from sklearn.datasets import load_diabetes

    if there := published(destination):
        return there["train"], there["eval"]
    data = load_diabetes(scaled=False)
    columns = {str(name): data.data[:, i] for i, name in enumerate(data.feature_names)}
    table = pa.table(columns | {"label": data.target.astype(np.float64)})
    return _publish(table, np.zeros(len(data.target)), destination)


def write_diamonds(destination: str) -> tuple[str, str]:
    """53,940 diamonds: carat, measures, cut, colour and clarity, and `label`, the price in USD (float64).

    The table comes with the package plotnine, which need not be imported for it.
    Written below `destination` (a storage URI or a path) unless they are there.

    Returns:
        The URIs of the training (80%) and the evaluation dataset.

    Raises:
        NotFound: plotnine isn't installed.
        StorageError: the store can't be written.
    """
    if there := published(destination):
        return there["train"], there["eval"]
    spec = importlib.util.find_spec("plotnine")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        if (file := Path(folder) / "data" / "diamonds.csv").is_file():
            table = csv.read_csv(file)
            break
    else:
        raise NotFound(
            "the diamonds are not on this machine",
            got="no package plotnine, with which they come",
            allowed="plotnine installed beside Tandem",
            fix="pip install plotnine (with --no-deps: only its data is read)",
        )
    prices = table.column("price").cast(pa.float64())
    table = table.drop_columns(["price"]).append_column("label", prices)
    return _publish(table, np.zeros(table.num_rows), destination, group_rows=4096)


def _publish(
    table: pa.Table, classes: NDArray[Any], destination: str, group_rows: int = _GROUP_ROWS
) -> tuple[str, str]:
    rows = dict(zip(("train", "eval"), split_rows(classes, _EVAL_FRACTION, _SEED), strict=True))
    # Small row groups, so that even these datasets have several to shuffle.
    splits = {
        split: [table.take(pa.array(ids[i : i + group_rows])) for i in range(0, len(ids), group_rows)]
        for split, ids in rows.items()
    }
    uris = publish_again(splits, destination, label="label").uris
    return uris["train"], uris["eval"]


def _png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
