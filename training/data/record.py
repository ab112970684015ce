"""`_tandem.json`: what an import leaves beside a dataset's files, so that nobody need scan them again.

It is written last, if it isn't there, and so is also the mark that the import was finished.
"""

from __future__ import annotations

from typing import Literal

from pyarrow import fs
from pydantic import ValidationError

from cluster.config import Frozen
from cluster.errors import StorageError, shown
from training.facts import DatasetFacts

RECORD_NAME = "_tandem.json"
_MAX_BYTES = 256 * 1024 * 1024


class Record(Frozen):
    """Schema (the type of each column) and statistics of one dataset."""

    format: Literal[1] = 1
    types: dict[str, str]
    facts: DatasetFacts


def read_record(filesystem: fs.FileSystem, root: str) -> Record | None:
    """The record of the dataset in folder `root`; None where there is none, or none that makes sense.

    Raises:
        StorageError: the store can't be read.
    """
    try:
        with filesystem.open_input_file(f"{root}/{RECORD_NAME}") as source:
            return Record.model_validate_json(bytes(source.read(_MAX_BYTES)))
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None
    except OSError as error:
        raise StorageError(
            f"reading {RECORD_NAME} failed",
            got=shown(str(error).split("\n", 1)[0]),
            allowed="a store that these credentials may read",
            fix="check the credentials, the endpoint and the network, then try again",
        ) from None
