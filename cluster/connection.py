"""Connecting this process to a Ray: quietly, with its token, and with an error that says what is wrong.

`ray.init` repeats itself for minutes against an address that doesn't answer or a token that isn't
right, so one small request is made first, with a deadline: it tells unreachable, unauthorised,
not-a-Ray and another-release apart. Nothing is ever written to stdout.

Knows nothing of what is run on Ray.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from cluster.errors import BadInput, TandemError, shown
from cluster.local import LOOPBACK_ONLY, NO_CLUSTERS, LocalRay, find

NAMESPACE = "tandem"
ANSWER_DEADLINE_S = 10.0


class Unreachable(TandemError):
    """The Ray cluster can't be reached, refuses us, or runs another release."""


@contextmanager
def connect(
    address: str | None,
    *,
    namespace: str = NAMESPACE,
    runtime_env: Mapping[str, Any] | None = None,
    local: LocalRay | None = None,
    needs_cpus: int = 1,
    log_to_driver: bool = False,
    answer_deadline_s: float = ANSWER_DEADLINE_S,
) -> Iterator[str]:
    """Connect this process as a driver, and disconnect at the end.

    Args:
        address: `HOST:PORT` of a Ray cluster, or `auto` for the one that this process runs in (inside
            a job). None: `local`, or else a local Ray of its own for the time of the connection.
        namespace: of named actors.
        runtime_env: Ray's, for everything this driver starts.
        local: a local Ray to connect to.
        needs_cpus: how many CPUs at least a local Ray of its own must offer.
        log_to_driver: whether what workers print appears on this process's output.
        answer_deadline_s: within which the cluster must answer at first.

    Yields:
        The address connected to.

    Raises:
        Unreachable: no answer, a missing or wrong token, another Ray release, not a Ray at all.
        BadInput: the address isn't one that a driver can use.
    """
    with ExitStack() as stack:
        if address is None and local is None:
            num_cpus = max(needs_cpus, os.cpu_count() or 1)
            local = stack.enter_context(LocalRay.start(num_cpus=num_cpus, purpose="one command"))
        if address is None and local is not None:
            address = local.address
        assert address is not None
        address = _checked(address)
        # Inside a job Ray has set everything already.
        env = {} if address == "auto" else _introduced(address, local or find(address), answer_deadline_s)
        stack.enter_context(_environment(env))
        stack.enter_context(_driver(address, namespace, runtime_env, log_to_driver))
        yield address


def auth_token(address: str) -> str | None:
    """The token for `address`: a local Ray's own, else where Ray looks for one.

    That is $RAY_AUTH_TOKEN, then the file $RAY_AUTH_TOKEN_PATH, then ~/.ray/auth_token.

    Raises:
        BadInput: $RAY_AUTH_TOKEN_PATH names a file that can't be read.
    """
    local = find(address)
    if local is not None:
        return local.record.token
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named).expanduser() if named else Path.home() / ".ray" / "auth_token"
    try:
        return path.read_text().strip() or None
    except OSError as error:
        if named is None:
            return None
        raise BadInput(
            "the token file can't be read",
            got=shown(named),
            allowed="a file with the cluster's token",
            fix=f"correct RAY_AUTH_TOKEN_PATH ({error.strerror})",
        ) from None


def _checked(address: str) -> str:
    host, colon, port = address.rpartition(":")
    if address == "auto" or (colon and host and port.isdigit() and "/" not in address):
        return address
    raise BadInput(
        "the address can't be used",
        got=shown(address),
        allowed="HOST:PORT of the cluster's head, such as 10.0.0.5:6379",
        fix="from outside the cluster, send a job instead: tandem submit --address http://HOST:8265",
    )


def _introduced(address: str, local: LocalRay | None, deadline_s: float) -> dict[str, str]:
    """Ask the cluster for its release and whether it wants a token.

    A token goes only to a cluster that asks for one. One that asks for none must also not be met in
    token mode, since its own processes could then not call this one.

    Returns:
        What this process's environment must hold to connect.
    """
    import grpc
    import ray

    wanted = local is not None
    token = auth_token(address) if local is None else local.record.token
    try:
        try:
            release = _release(address, token if wanted else None, deadline_s)
        except grpc.RpcError as refused:
            wanted = refused.code() is grpc.StatusCode.UNAUTHENTICATED and token is not None
            if not wanted:
                raise
            release = _release(address, token, deadline_s)
    except grpc.RpcError as error:
        raise _unreachable(address, error, wanted, deadline_s) from None
    if release != ray.__version__:
        raise Unreachable(
            f"the cluster at {address} runs another Ray",
            got=f"Ray {release} there",
            allowed=f"Ray {ray.__version__}, as here",
            fix=f"pip install 'ray[default,train,serve]=={release}' here, or upgrade the cluster",
        )
    if local is not None:
        return local.env
    env = LOOPBACK_ONLY if _listens_on_loopback_only(address) else {}
    return env | ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if wanted and token else {})


def _listens_on_loopback_only(address: str) -> bool:
    """Whether a Ray of this machine can't be reached where Ray would look for it: it takes a loopback
    address for the machine's outer one, and then tries for ever."""
    from ray._private.services import is_localhost, node_ip_address_from_perspective

    host, _, port = address.rpartition(":")
    if not is_localhost(host):
        return False
    try:
        with socket.create_connection((node_ip_address_from_perspective(None), int(port)), timeout=1):
            return False
    except OSError:
        return True


def _release(address: str, token: str | None, deadline_s: float) -> str:
    import grpc
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        head = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        alive = head.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=deadline_s, metadata=metadata)
    return str(alive.ray_version)


def _unreachable(address: str, error: Any, with_token: bool, deadline_s: float) -> Unreachable:
    code = error.code().name
    if code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        return Unreachable(
            f"the cluster at {address} refused us",
            got="a wrong token" if with_token else "no token",
            allowed="the token that the cluster was started with",
            fix="put it in RAY_AUTH_TOKEN, or in ~/.ray/auth_token",
        )
    if code == "UNIMPLEMENTED":
        return Unreachable(
            f"what answers at {address} is not the head of a Ray cluster",
            got=shown(error.details()),
            allowed="the port of Ray's GCS, 6379 by default (not the dashboard's)",
            fix="ask the cluster: `ray status` on its head prints the address",
        )
    return Unreachable(
        f"no Ray cluster answers at {address}",
        got=shown(error.details()),
        allowed=f"an answer within {deadline_s:g} s",
        fix="check the address and that this machine may reach it; leave --address out for a local Ray",
    )


@contextmanager
def _environment(env: Mapping[str, str]) -> Iterator[None]:
    """`env` laid over this process's environment for the time of the connection."""
    before = {name: os.environ.get(name) for name in env}
    os.environ.update(env)
    _refresh_ray()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _refresh_ray()


def _refresh_ray() -> None:
    """Have Ray, which reads these variables once, read them again."""
    from ray._private import ray_constants
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined] # its stub omits them

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    ray_constants.ENABLE_RAY_CLUSTER = os.environ.get(NO_CLUSTERS, "1") != "0"


@contextmanager
def _driver(
    address: str, namespace: str, runtime_env: Mapping[str, Any] | None, log_to_driver: bool
) -> Iterator[None]:
    import ray
    from ray._private import worker as ray_worker

    # Without this, Ray tells of workers that died on stdout even where logs are not asked for.
    ray_worker._worker_logs_enabled = log_to_driver
    in_main_thread = threading.current_thread() is threading.main_thread()
    on_sigterm = signal.getsignal(signal.SIGTERM) if in_main_thread else None
    try:
        ray.init(
            address=address,
            namespace=namespace,
            runtime_env=dict(runtime_env) if runtime_env else None,
            log_to_driver=log_to_driver,
            logging_level="ERROR",
        )
    except (ConnectionError, RuntimeError) as error:
        raise Unreachable(
            f"connecting to the Ray cluster at {address} failed",
            got=shown(str(error).strip()),
            allowed="a cluster that this process may join as a driver",
            fix="look at the cluster's health: `ray status` on its head",
        ) from None
    finally:
        if in_main_thread:  # Ray puts its own handler in place; what ends a command is the command's matter
            signal.signal(signal.SIGTERM, on_sigterm or signal.SIG_DFL)
    try:
        yield
    finally:
        ray.shutdown()
