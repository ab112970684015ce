"""Sending a recipe to a Ray cluster as a job, over the Ray Jobs API.

What is shipped is the recipe as it was understood here: checked, with its overrides applied and its
paths made absolute, and, where the user has a package of their own, that folder; never the current
directory. The cluster runs it with its own Tandem. The run's name is fixed here, so a resubmission
under that name continues the run.

The jobs API runs anybody's commands, so an address beyond this machine isn't even asked without a
token (ShadowRay).
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import secrets
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import yaml

from cluster.connection import Unreachable, auth_token
from cluster.errors import BadInput, RunFailed, shown
from cluster.local import find

DASHBOARD_PORT = 8265
ANSWER_DEADLINE_S = 10.0
MAX_PACKAGE_BYTES = 100 * 1024 * 1024
_NOT_SHIPPED = ("__pycache__", "*.pyc", ".*", "*.egg-info", "node_modules")
# They tell of every upload and every closed stream.
_CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
# Both override any address given in code.
_OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job that the cluster has accepted."""

    job_id: str
    run: str
    address: str


@dataclass(frozen=True, slots=True)
class Ended:
    """How a job ended. `exit_code` is its command's, None where it never ran."""

    status: str
    message: str
    exit_code: int | None


class Jobs:
    """The jobs API of one cluster, reached and authorised.

    Args:
        address: `http(s)://HOST:PORT` of the dashboard, or `HOST[:PORT]`.
        deadline_s: within which the cluster must answer at first.

    Raises:
        BadInput: the address can't be used, or is beyond this machine and there is no token.
        Unreachable: no answer, or the token was refused.
    """

    def __init__(self, address: str, deadline_s: float = ANSWER_DEADLINE_S) -> None:
        self.address = dashboard_url(address)
        token = auth_token(self.address)
        _refuse_open_doors(self.address, token)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        _ask(self.address, headers, deadline_s)
        from ray.job_submission import JobSubmissionClient

        for name in _CHATTY:
            logging.getLogger(name).setLevel(logging.ERROR)
        with _without(_OVERRIDES), self._explained("connecting"):
            self._client = JobSubmissionClient(self.address, headers=headers)

    def submit(
        self, recipe: Mapping[str, Any], *, run: str, package: Path | None = None, tandem: str = "tandem"
    ) -> Submitted:
        """Have the cluster run `tandem train` on a recipe.

        Args:
            recipe: as plain data, complete: nothing of it is read from this machine later.
            run: the run's name; an existing run is continued.
            package: a folder importable as a Python package, for a task of the user's own.
            tandem: the command on the cluster.
        """
        # To Ray, "auto" is any Ray of the machine; where there may be several, the job is told which.
        local = find(self.address)
        address = local.address if local else "auto"
        command = [*shlex.split(tandem), "train", "recipe.yaml", "--json", "--run", run, "--address", address]
        with tempfile.TemporaryDirectory(prefix="tandem-submit-") as folder:
            (Path(folder) / "recipe.yaml").write_text(yaml.safe_dump(dict(recipe), sort_keys=False))
            if package is not None:
                _copy_package(package, Path(folder))
            return self.run_command(
                shlex.join(command), Path(folder), run=run, model=str(recipe.get("model", ""))
            )

    def run_command(self, command: str, folder: Path, *, run: str, model: str) -> Submitted:
        """Have the cluster run a shell command in a copy of `folder`, on the head, outside any quota."""
        with self._explained("submitting"):
            job_id = self._client.submit_job(
                entrypoint=command,
                submission_id=f"{run}-{secrets.token_hex(3)}",
                runtime_env={"working_dir": str(folder)},
                metadata={"run": run, "model": model},
            )
        return Submitted(job_id=str(job_id), run=run, address=self.address)

    def follow(self, job_id: str, write: Callable[[str], object]) -> Ended:
        """Pass a job's output on as it comes, until it ends."""

        async def stream() -> None:
            async for lines in self._client.tail_job_logs(job_id):
                write(lines)

        with self._explained("following"):
            asyncio.run(stream())
        return self.ended(job_id)

    def ended(self, job_id: str) -> Ended:
        """How a job that has ended did so.

        Raises:
            RunFailed: it hasn't ended, so its output broke off.
        """
        with self._explained("asking after"):
            info = self._client.get_job_info(job_id)
        status = str(info.status)
        if not info.status.is_terminal():
            raise RunFailed(
                f"the output of job '{job_id}' broke off",
                got=f"status {status}",
                fix="the job goes on; follow its run with: tandem logs RUN --follow",
            )
        return Ended(
            status=status, message=str(info.message or "").split("\n", 1)[0], exit_code=info.driver_exit_code
        )

    def stop(self, job_id: str) -> None:
        """Ask a job to end. One that has ended is left as it is."""
        with self._explained("stopping"):
            self._client.stop_job(job_id)

    @contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        import requests

        try:
            yield
        except (RuntimeError, ConnectionError, requests.exceptions.RequestException) as error:
            raise Unreachable(
                f"{doing} a job at {self.address} failed",
                got=shown(str(error).strip().split("\n", 1)[0]),
                allowed="a cluster whose dashboard takes jobs",
                fix="look at the cluster's dashboard and at the log of its dashboard agent",
            ) from None


def dashboard_url(address: str) -> str:
    """`address` as the URL of a dashboard.

    Raises:
        BadInput: it isn't one.
    """
    text = address if "://" in address else f"http://{address}"
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    if parts.scheme not in ("http", "https") or not host or "@" in parts.netloc or parts.query:
        raise BadInput(
            "the address can't be used",
            got=shown(address) if "@" not in address else f"{address.split('://', 1)[0]}://…",
            allowed="http://HOST:8265 or https://HOST of the cluster's dashboard, without credentials",
            fix="put the token in RAY_AUTH_TOKEN",
        )
    if port is None and parts.scheme == "http":
        return f"http://{parts.netloc}:{DASHBOARD_PORT}{parts.path}".rstrip("/")
    return text.rstrip("/")


def _refuse_open_doors(url: str, token: str | None) -> None:
    if token or is_loopback(url):
        return
    raise BadInput(
        "a cluster beyond this machine takes jobs only with a token",
        got=f"{url}, no token",
        allowed="a token in RAY_AUTH_TOKEN, in the file RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token",
        fix="start the cluster with RAY_AUTH_MODE=token: without it, whoever reaches it runs what they like",
    )


def is_loopback(url: str) -> bool:
    """Whether `url` leads to this machine and no further."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _ask(url: str, headers: Mapping[str, str], deadline_s: float) -> None:
    import ray

    try:
        # No proxy on the way to this machine itself; elsewhere the user's settings hold.
        with httpx.Client(
            timeout=deadline_s, headers=dict(headers), trust_env=not is_loopback(url)
        ) as client:
            answer = client.get(f"{url}/api/version")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unreachable(
            f"no Ray dashboard answers at {url}",
            got=shown(str(error) or type(error).__name__),
            allowed=f"an answer within {deadline_s:g} s",
            fix="check the address, and that the cluster serves its dashboard (tandem up --dashboard)",
        ) from None
    if answer.status_code in (401, 403):
        raise Unreachable(
            f"the cluster at {url} refused us",
            got=f"{'a wrong token' if headers else 'no token'} (HTTP {answer.status_code})",
            allowed="the token that the cluster was started with",
            fix="put it in RAY_AUTH_TOKEN, or in ~/.ray/auth_token",
        )
    release = _release(answer)
    if release is None or release.split(".")[:2] != ray.__version__.split(".")[:2]:
        raise Unreachable(
            f"what answers at {url} is not a Ray that we can send jobs to",
            got=f"Ray {release}" if release else f"HTTP {answer.status_code}",
            allowed=f"the dashboard of Ray {ray.__version__}",
            fix="check the address, and install the same Ray on both sides",
        )


def _release(answer: httpx.Response) -> str | None:
    try:
        return str(answer.json()["ray_version"])
    except (ValueError, KeyError, TypeError):
        return None


def _copy_package(package: Path, folder: Path) -> None:
    if not package.is_dir() or not package.resolve().name.isidentifier():
        raise BadInput(
            "the package can't be sent along",
            got=shown(str(package)),
            allowed="a folder that Python can import by its name",
            fix="name the folder that holds your task's modules: --package ./mypackage",
        )
    shipped = list(_shipped(package))
    size = sum(path.stat().st_size for path in shipped)
    if size > MAX_PACKAGE_BYTES:
        raise BadInput(
            "the package is too large to be sent along",
            got=f"{size:,} bytes",
            allowed=f"at most {MAX_PACKAGE_BYTES:,} bytes",
            fix="keep data out of it; data belongs in a store that the cluster reads",
        )
    for path in shipped:
        target = folder / package.resolve().name / path.relative_to(package)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _shipped(package: Path) -> Iterator[Path]:
    """The package's files, without caches, version control and environments."""
    ignored = shutil.ignore_patterns(*_NOT_SHIPPED)
    for folder, folders, files in os.walk(package):
        left_out = ignored(folder, [*folders, *files])
        folders[:] = [name for name in folders if name not in left_out]
        yield from (Path(folder, name) for name in files if name not in left_out)


@contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    taken = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)
