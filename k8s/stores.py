"""Which storage locations mean the same thing to every pod."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.errors import BadInput
from cluster.location import Location


def check_reachable(uris: Mapping[str, str]) -> None:
    """Refuse locations on one machine's disk; `uris` by the field that names each.

    Raises:
        BadInput: one is a path or a `file://` URI.
    """
    for field, uri in uris.items():
        if Location.parse(uri).scheme == "file":
            raise BadInput(
                f"'{field}' can't be used on Kubernetes",
                got=uri,
                allowed="s3://, gs:// or az://",
                fix="each pod has a disk of its own, which goes with it: copy the data to object storage",
            )
