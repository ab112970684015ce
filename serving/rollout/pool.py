"""Evidence from all replicas, through the store.

    models/digits/trials/00000007/00000009/REPLICA.json     what one replica saw in step 9 of trial 7

Replicas of several services, on several clusters even, may follow one alias, and don't know each other. So
each writes what it has seen, every few seconds and only while a trial is on, and any of them may read all.
A replica that has died leaves what it saw, which was seen all the same.
"""

from __future__ import annotations

from pydantic import ValidationError

from cluster.names import check_name
from cluster.registry import MODELS
from cluster.storage import Store
from cluster.trial import Trial
from serving.rollout.evidence import Evidence


class Pool:
    """The evidence on one step of a trial.

    Methods raise `StorageError` where the store fails.
    """

    def __init__(self, store: Store, model: str, trial: Trial) -> None:
        self._store = store
        self._prefix = f"{MODELS}/{check_name(model, 'model')}/trials/{trial.began:08d}/{trial.stepped:08d}"

    def give(self, replica: str, evidence: Evidence) -> None:
        """Write what a replica has seen so far, in place of what it wrote before."""
        self._store.put(f"{self._prefix}/{replica}.json", evidence.model_dump_json().encode())

    def replicas(self) -> list[str]:
        """Keys of what replicas gave, sorted."""
        return sorted(self._store.keys(self._prefix))

    def together(self, keys: list[str]) -> Evidence:
        """All that stands under these keys, added up; what can't be read is passed over."""
        total = Evidence()
        for key in keys:
            try:
                total = total.plus(Evidence.model_validate_json(self._store.get(key)))
            except ValidationError:
                continue
        return total
