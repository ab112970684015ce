"""`tandem serve`: a service in the foreground, from the first look at the registry to the last answer.

Order at the start: the registry is read first, so that a name that doesn't exist costs no Ray; the ready
line is printed once every model has answered over HTTP. Order at the end: applications are deleted, which
drains their replicas while HAProxy still runs, then Serve goes, then Ray, if it was ours.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from types import TracebackType
from typing import Any, Self

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.connection import connect
from cluster.errors import BadInput, TandemError, shown
from cluster.keys import Keys
from cluster.local import LocalRay
from cluster.registry import Registry
from cluster.storage import Deadlines, open_store
from serving.ingress import describe_exposure, free_port, ingress_env
from serving.layout import Application, applications, grpc_application
from serving.pool.size import check_fits
from serving.service import Service

READY_DEADLINE_S = 120.0
_LOOK_EVERY_S = 0.1
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
LOOPBACK = "127.0.0.1"
_LOOPBACKS = (LOOPBACK, "::1", "localhost")


def run_service(
    service: Service,
    *,
    address: str | None,
    host: str = LOOPBACK,
    port: int = 0,
    grpc_port: int | None = None,
    haproxy: bool = True,
    json_output: bool = False,
    ready_deadline_s: float = READY_DEADLINE_S,
    clock: Clock = SYSTEM_CLOCK,
) -> int:
    """Serve until SIGTERM or SIGINT, then drain.

    Args:
        address: a Ray to use, which must have been started with `serving.ingress.ingress_env`; None for one
            of our own on this machine.
        port: 0 for a free one.
        grpc_port: where gRPC is answered; 0 for a free one, None for nowhere.
        haproxy: HAProxy as the ingress, rather than Serve's own proxy; for a Ray of our own only.
        json_output: print one line of JSON, rather than words, when ready.

    Returns:
        The exit code: 0 after a clean drain.

    Raises:
        NotFound: a model or alias doesn't exist.
        BadInput: callers need a key, and there are none.
        TandemError: it didn't become ready.
    """
    models = check_models(service)
    if not haproxy and any(served.other_replicas for served in service.models):
        raise BadInput(
            "two kinds of replica need HAProxy, which spreads requests over both",
            got="other_replicas, without HAProxy",
            fix="leave --no-haproxy away, or other_replicas",
        )
    service = with_keys_settled(service, host)
    stopping = _Stop()
    with stopping, contextlib.ExitStack() as stack:
        local = None
        if address is None:
            cpus = _cpus_needed(service)
            env = ingress_env(haproxy=haproxy, loopback=host == LOOPBACK)
            local = LocalRay.start(num_cpus=cpus, env=env, purpose=f"serve {service.name}")
            stack.callback(local.stop)
            exposure = describe_exposure(host, env, grpc=grpc_port is not None)
            print(f"listens beyond this machine: {exposure}", file=sys.stderr)  # noqa: T201
        port = port or free_port()
        url = f"http://{_reachable(host)}:{port}"
        grpc_port = grpc_port if grpc_port != 0 else free_port()
        wanted = stack.enter_context(_serving(service, address, local, host, port, grpc_port))
        stopping.listen()  # again: whoever connects to Ray or starts Serve may have put handlers of its own
        if not _await_ready(service, wanted, url, stopping, clock.monotonic_s() + ready_deadline_s, clock):
            return 0
        grpc_url = f"{_reachable(host)}:{grpc_port}" if grpc_port else None
        _announce(url, grpc_url, models, json_output)
        stopping.wait()
    return 0


def check_models(service: Service) -> list[dict[str, Any]]:
    """What the service's aliases point at now: model, alias and version of each.

    Raises:
        NotFound: one doesn't exist.
        BadInput: one is larger than the pool that it is to live in.
    """
    registry = Registry(open_store(service.store, Deadlines(retry_s=10)))
    found = [(served.ref, registry.resolve(served.ref)) for served in service.models]
    if service.pool is not None:
        pooled = {served.ref for served in service.pooled}
        check_fits(registry, [version for ref, version in found if ref in pooled], service.pool.memory_bytes)
    return [{"model": ref.model, "alias": ref.alias, "version": v.version} for ref, v in found]


def with_keys_settled(service: Service, host: str) -> Service:
    """`service` with `keys` either `required` or `off`: `auto` asks for keys beyond loopback.

    Raises:
        BadInput: keys are required, and there are none.
    """
    keys = service.keys if service.keys != "auto" else "off" if host in _LOOPBACKS else "required"
    if keys == "required" and not Keys(open_store(service.store, Deadlines(retry_s=10))).tenants():
        raise BadInput(
            "nobody could ask this service: callers need a key, and there are none",
            got=f"host {host}, keys: {service.keys}",
            fix=f"make one: tandem keys create TENANT --store {service.store} (or say keys: off)",
        )
    return service.model_copy(update={"keys": keys})


class _Stop:
    """Set by the first SIGTERM or SIGINT."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    def __enter__(self) -> Self:
        self._before = [signal.getsignal(number) for number in _STOP_SIGNALS]
        self.listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in zip(_STOP_SIGNALS, self._before, strict=True):
            signal.signal(number, handler)

    def listen(self) -> None:
        """Take the signals, whoever has them now."""
        for number in _STOP_SIGNALS:
            signal.signal(number, lambda *_: self._asked.set())

    @property
    def asked(self) -> bool:
        """Whether one has come."""
        return self._asked.is_set()

    def wait(self) -> None:
        """Until one comes. In short waits, so that the handler gets to run."""
        while not self._asked.wait(0.2):
            pass


@contextlib.contextmanager
def _serving(
    service: Service, address: str | None, local: LocalRay | None, host: str, port: int, grpc_port: int | None
) -> Iterator[list[Application]]:
    """The service's applications, deployed and, at the end, drained."""
    with connect(address, namespace="serve", local=local):
        from ray import serve
        from ray.serve.config import HTTPOptions
        from ray.serve.schema import LoggingConfig

        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # what it says at a start alarms for nothing
        serve.start(
            http_options=HTTPOptions(host=host, port=port),
            proxy_location="EveryNode",
            logging_config=LoggingConfig(enable_access_log=False),
        )
        wanted = applications(service)
        if grpc_port:
            wanted.append(_gateway(service, host, port, grpc_port))
        targets = [serve.RunTarget(_build(a), name=a.name, route_prefix=a.route_prefix) for a in wanted]
        serve.run_many(targets, wait_for_applications_running=False)
        try:
            yield wanted
        finally:
            models_count = sum(len(served.kinds) for served in service.models)
            _drain([application.name for application in wanted], models_count)


def _gateway(service: Service, host: str, port: int, grpc_port: int) -> Application:
    """The gRPC gateway, on this node: here people were told to find it, and here is an ingress."""
    import ray

    return grpc_application(
        service,
        address=f"[{host}]:{grpc_port}" if ":" in host else f"{host}:{grpc_port}",
        ingress=f"http://{_reachable(host)}:{port}",
        node_id=ray.get_runtime_context().get_node_id(),
    )


def _build(application: Application) -> Any:
    module, _, name = application.import_path.partition(":")
    return getattr(import_module(module), name)(application.args)


def _drain(names: Sequence[str], models_count: int) -> None:
    from ray import serve

    models, doors = names[:models_count], names[models_count:]
    with ThreadPoolExecutor(len(names)) as pool:
        # The front and the gateway first: what they pass on still finds its models.
        list(pool.map(serve.delete, doors))
        list(pool.map(serve.delete, models))
    serve.shutdown()


def _await_ready(
    service: Service,
    wanted: Sequence[Application],
    url: str,
    stopping: _Stop,
    deadline_s: float,
    clock: Clock,
) -> bool:
    """Wait until every model answers over HTTP; False where we are asked to stop before that.

    Raises:
        TandemError: a deployment failed, or the deadline passed.
    """
    waiting = [f"{url}/v2/models/{s.ref.model}/ready" for s in service.models if s.replicas.min > 0]
    if waiting or len(service.models) > 1:
        waiting.append(f"{url}/v2/health/ready")
    while True:
        waiting = [one for one in waiting if not _answers(one)]
        # A question to a model that rests would wake it, so then Serve is asked instead.
        if not waiting and _all_routed(wanted, url):
            return True
        if stopping.asked:
            return False
        _raise_if_failed()
        if clock.monotonic_s() > deadline_s:
            raise TandemError(
                "the service did not become ready in time",
                got=f"no answer from {', '.join(waiting) or url}",
                allowed="an answer from each of its models",
                fix="see whether the cluster has the CPUs and GPUs that the replicas ask for",
            )
        clock.sleep(_LOOK_EVERY_S)


def _raise_if_failed() -> None:
    from ray import serve

    for name, status in serve.status().applications.items():
        if status.status == "DEPLOY_FAILED":
            reasons = [d.message for d in status.deployments.values() if d.message] or [status.message]
            raise TandemError(
                f"application '{name}' can't be deployed",
                got=shown(reasons[0].strip().splitlines()[-1]),
                fix="look at the model: tandem models show NAME",
            )


def _all_routed(wanted: Sequence[Application], url: str) -> bool:
    """Whether every application runs and the ingress knows the way to it."""
    from ray import serve

    names = {application.name for application in wanted}
    reached = {application.name for application in wanted if application.route_prefix}
    found = serve.status().applications
    running = {name for name, status in found.items() if status.status == "RUNNING"}
    routes = _read(f"{url}/-/routes")
    return names <= running and routes is not None and reached <= set(json.loads(routes).values())


def _answers(url: str) -> bool:
    return _read(url) is not None


def _read(url: str) -> bytes | None:
    """What a GET gives, None where it isn't answered with 200."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as answer:
            return bytes(answer.read()) if answer.status == 200 else None
    except OSError:
        return None


def _announce(url: str, grpc_url: str | None, models: list[dict[str, Any]], json_output: bool) -> None:
    if json_output:
        line = json.dumps({"url": url, "grpc_url": grpc_url, "pid": os.getpid(), "models": models})
    else:
        names = ", ".join(f"{m['model']}@{m['alias']} (version {m['version']})" for m in models)
        grpc = f" and by gRPC at {grpc_url}" if grpc_url else ""
        line = f"{names} at {url}{grpc}; stop with Ctrl-C"
    print(line, flush=True)  # noqa: T201 - the command's output


def _cpus_needed(service: Service) -> int:
    """CPUs that a Ray of our own offers: this machine's, and enough for one replica of each kind."""
    least = sum(max(kind.min, 1) * kind.cpus for kind in service.kinds)
    return max(os.cpu_count() or 1, int(least + 0.999))


def _reachable(host: str) -> str:
    return LOOPBACK if host in ("0.0.0.0", "::", "") else host
