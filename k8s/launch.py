"""Makes one RayJob of a schedule, as the CronJob's pod: `python -m k8s.launch FILE`.

The RayJob is called as the Kubernetes Job that this pod belongs to, whose name tells the time that it was
due: a pod that is tried again makes nothing twice. What to do about RayJobs that still run or have ended is
decided by `decide`, which is pure; `Api` is the API server, asked as the pod's service account.

Knows no recipe: the RayJob lies in the file, whole but for its name.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import httpx

from cluster.errors import BadInput, TandemError, shown

RAYJOB_FILE = "rayjob.json"
SCHEDULE_LABEL = "tandem/schedule"
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_DEADLINE_S = 30.0

Concurrency = Literal["Allow", "Forbid", "Replace"]
Manifest = Mapping[str, Any]


class Decision(NamedTuple):
    """What to do: `delete` these RayJobs by name, and then make the new one or not."""

    make: bool
    delete: tuple[str, ...]
    why: str


def decide(
    jobs: Sequence[Manifest], name: str, concurrency: Concurrency, keep_succeeded: int, keep_failed: int
) -> Decision:
    """What becomes of a schedule's RayJobs as the next one is due.

    Args:
        jobs: all RayJobs of the schedule.
        name: of the one that is due.
    """
    by_age = sorted(jobs, key=lambda job: (str(job["metadata"].get("creationTimestamp")), _name(job)))
    if any(_name(job) == name for job in by_age):
        return Decision(False, (), f"{name} was made before")
    running = [_name(job) for job in by_age if _state(job) is None]
    old: list[str] = []
    for state, keep in (("succeeded", keep_succeeded), ("failed", keep_failed)):
        ended = [_name(job) for job in by_age if _state(job) == state]
        old += ended[: max(0, len(ended) - keep)]
    if running and concurrency == "Forbid":
        return Decision(False, tuple(old), f"{name} is left out: {', '.join(running)} still runs")
    if running and concurrency == "Replace":
        return Decision(True, (*old, *running), f"{name} takes the place of {', '.join(running)}")
    return Decision(True, tuple(old), f"{name} begins")


def _name(job: Manifest) -> str:
    return str(job["metadata"]["name"])


def _state(job: Manifest) -> Literal["succeeded", "failed"] | None:
    """How it ended; None: not yet. One that was stopped has not succeeded."""
    status = job.get("status") or {}
    if status.get("jobDeploymentStatus") not in ("Complete", "Failed"):
        return None
    return "succeeded" if status.get("jobStatus") == "SUCCEEDED" else "failed"


class Api:
    """The RayJobs of one namespace.

    Args:
        client: at the API server, authorised.
        namespace: theirs.
    """

    def __init__(self, client: httpx.Client, namespace: str) -> None:
        self._client = client
        self._path = f"/apis/ray.io/v1/namespaces/{namespace}/rayjobs"

    @classmethod
    def in_a_pod(cls, env: Mapping[str, str], account: Path = _ACCOUNT) -> Api:
        """As the pod that this runs in.

        Raises:
            BadInput: it isn't one, or carries no token.
        """
        try:
            url = f"https://{_host(env['KUBERNETES_SERVICE_HOST'])}:{env['KUBERNETES_SERVICE_PORT']}"
            token = (account / "token").read_text("ascii").strip()
            namespace = (account / "namespace").read_text("ascii").strip()
        except (KeyError, OSError) as error:
            raise BadInput(
                "this isn't a pod that may ask the API server",
                got=shown(str(error)),
                allowed="a pod with automountServiceAccountToken: true",
                fix="this is what a CronJob of `tandem k8s render` runs; nobody else needs it",
            ) from None
        client = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"},
            verify=str(account / "ca.crt"),
            timeout=_DEADLINE_S,
            trust_env=False,
        )
        return cls(client, namespace)

    def jobs(self, schedule: str) -> list[Manifest]:
        """All RayJobs of a schedule."""
        found = self._ask("GET", self._path, params={"labelSelector": f"{SCHEDULE_LABEL}={schedule}"})
        return list(found.get("items") or [])

    def make(self, job: Manifest) -> None:
        """Make a RayJob. One of that name that is there already is left as it is."""
        self._ask("POST", self._path, body=job, fine=(409,))

    def delete(self, name: str) -> None:
        """Delete a RayJob, and with it its cluster. One that is gone already is as good."""
        params = {"propagationPolicy": "Background"}
        self._ask("DELETE", f"{self._path}/{name}", params=params, fine=(404,))

    def _ask(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Manifest | None = None,
        fine: Sequence[int] = (),
    ) -> dict[str, Any]:
        try:
            answer = self._client.request(method, path, params=params, json=body)
        except httpx.HTTPError as error:
            raise TandemError(
                f"the API server can't be asked ({method} {path})", got=shown(str(error))
            ) from None
        if answer.is_success or answer.status_code in fine:
            found: dict[str, Any] = answer.json()
            return found
        raise TandemError(
            f"the API server refused {method} {path}",
            got=f"{answer.status_code} {shown(answer.text)}",
            fix="look at the Role of this schedule and at the operator's CRDs",
        )


def launch(
    api: Api, job: Manifest, name: str, concurrency: Concurrency, keep_succeeded: int, keep_failed: int
) -> str:
    """Make the RayJob that is due, or don't, and say why.

    Args:
        job: the RayJob, with the label of its schedule.
        name: what it is to be called.
    """
    schedule = str(job["metadata"]["labels"][SCHEDULE_LABEL])
    decision = decide(api.jobs(schedule), name, concurrency, keep_succeeded, keep_failed)
    for one in decision.delete:
        api.delete(one)
    if decision.make:
        # The namespace is the pod's own: an overlay may have moved the whole schedule.
        described = {key: value for key, value in job["metadata"].items() if key != "namespace"}
        api.make({**job, "metadata": {**described, "name": name}})
    return decision.why


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def main(arguments: Sequence[str] | None = None) -> int:
    """The program of the CronJob's pod; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m k8s.launch", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--concurrency", choices=("Allow", "Forbid", "Replace"), default="Forbid")
    parser.add_argument("--keep-succeeded", type=int, default=3)
    parser.add_argument("--keep-failed", type=int, default=3)
    given = parser.parse_args(arguments)
    try:
        name = os.environ["TANDEM_JOB_NAME"]
        job = json.loads(given.file.read_text("utf-8"))
        said = launch(
            Api.in_a_pod(os.environ),
            job,
            name,
            given.concurrency,
            given.keep_succeeded,
            given.keep_failed,
        )
    except (KeyError, OSError, ValueError) as error:
        sys.stderr.write(f"nothing to launch: {error!r}\n")
        return 2
    except TandemError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(said + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
