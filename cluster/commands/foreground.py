"""Commands that run on a Ray of their own, and what becomes of them when it is stopped under them.

Ray itself notices after a minute that its head is gone. Whoever says `tandem down` doesn't want to wait.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from cluster import output
from cluster.errors import TandemError

_ENDED = 1


@contextlib.contextmanager
def ends_with_its_ray() -> Iterator[None]:
    """This process ends, with a message, as soon as a Ray that it has started is gone meanwhile.

    At once and without unwinding: what there is to clean up was on that Ray, and whoever waits for it would
    wait in vain.
    """
    from cluster.local import lost_rays_told_to

    with lost_rays_told_to(_end):
        yield


def _end(purpose: str) -> None:
    output.show_error(
        TandemError(
            f"the Ray of this command ('{purpose}') is gone",
            got="it was stopped by `tandem down`, or its processes were killed",
            fix="run the same command again; a training run goes on where it was",
        )
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_ENDED)
