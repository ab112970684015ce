"""Who is called before anything else: a keeper on every node for workers, and Ray Train's controller.

Both have much to import: keepers torch (`training.crew.nursery`), the controller Ray Train. Nothing else on
the way to the first step takes as long. So on a cluster that is up they are called before the recipe is
checked, and wait there until they are told what for. If the recipe is refused, they go with the `with`.

Knows Ray, and nothing of runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import ray

from training.crew.coordinator import new_keeper
from training.crew.placement import start_controller

_MOST_KEEPERS = 64
"""More nodes than these get their keepers when they get workers."""


class Called:
    """Called when made; gone at `close`, which is also the end of the `with`.

    Args:
        worker: Ray's resources of one worker, which a node must have to get a keeper.
        life: what training processes live by, as `module:function`.
    """

    def __init__(self, worker: Mapping[str, float], life: str) -> None:
        self.life = life
        fit = [
            node["NodeID"]
            for node in ray.nodes()
            if node["Alive"] and all(node["Resources"].get(name, 0) >= need for name, need in worker.items())
        ]
        self.keepers: dict[str, Any] = {node: new_keeper(node, life) for node in fit[:_MOST_KEEPERS]}
        """Handles of the actors, by the nodes' ids."""
        self.controller: Any = start_controller()

    def close(self) -> None:
        """End them, and with them whatever they have started."""
        for actor in [*self.keepers.values(), self.controller]:
            ray.kill(actor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
