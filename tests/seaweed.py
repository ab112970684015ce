"""A real S3 server for tests: SeaweedFS in one process, on free loopback ports, gone afterwards."""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

_READY_WITHIN_S = 60
_STOPPED_WITHIN_S = 15
_TRIES = 3
_GRPC_OFFSET = 10_000


class Seaweed:
    """A context manager: an S3 server with one identity and one bucket, `tandem`.

    Attributes:
        endpoint: the server's URL.
        env: what a client's environment needs, credentials included.
    """

    BUCKET = "tandem"

    def __init__(self) -> None:
        self.endpoint = ""
        self.env: dict[str, str] = {}
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._ports: dict[str, int] = {}

    def uri(self, bucket: str, prefix: str = "") -> str:
        """The URI of a place on this server; the endpoint is in `env`. Buckets are made when written to."""
        return f"s3://{bucket}/{prefix}".rstrip("/")

    @property
    def pid(self) -> int:
        """The server's process."""
        assert self._process is not None, "not started"
        return self._process.pid

    def __enter__(self) -> Seaweed:
        for attempt in range(_TRIES):
            self._start()
            try:
                self._wait_until_ready()
                return self
            except TimeoutError:
                log = self._log()
                self._stop()
                if attempt == _TRIES - 1:  # another process may have taken a port meanwhile
                    raise AssertionError(f"the S3 server did not start:\n{log}") from None
        raise AssertionError("unreachable")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _start(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="tandem-seaweed-"))
        self._folder = folder
        secret = f"{random.SystemRandom().getrandbits(128):032x}"
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": "tandem", "secretKey": secret}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        (folder / "data").mkdir()
        self._ports = ports = _free_ports(["master", "volume", "filer", "s3", "admin"])
        command = [
            str(Path(sys.executable).parent / "weed"),
            f"-logdir={folder}",
            "mini",
            f"-dir={folder / 'data'}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-s3.config={folder / 's3.json'}",
            f"-bucket={self.BUCKET}",
            "-admin.ui=false",
            "-webdav=false",
            "-master.telemetry=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-filer.localSocket={folder / 'filer.sock'}",
            f"-s3.localSocket={folder / 's3.sock'}",
            *(f"-{name}.port={port}" for name, port in ports.items()),
        ]
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, "GOMEMLIMIT": "200MiB"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_end_with_parent,  # noqa: PLW1509 - calls the kernel, nothing of Python's
            )
        self.endpoint = f"http://127.0.0.1:{ports['s3']}"
        self.env = {
            "AWS_ACCESS_KEY_ID": "tandem",
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
        }

    def _wait_until_ready(self) -> None:
        """Until a write succeeds: listening is not enough, volumes must have been assigned."""
        store = S3Store(
            self.BUCKET,
            endpoint=self.endpoint,
            region="us-east-1",
            access_key_id=self.env["AWS_ACCESS_KEY_ID"],
            secret_access_key=self.env["AWS_SECRET_ACCESS_KEY"],
            client_options={"allow_http": True, "timeout": "2s"},
            retry_config={"max_retries": 0},
        )
        deadline_s = time.monotonic() + _READY_WITHIN_S
        while time.monotonic() < deadline_s:
            if self._process is None or self._process.poll() is not None:
                raise TimeoutError("ended")
            try:
                obstore.put(store, "ready", b"1")
                return
            except BaseError:
                time.sleep(0.1)
        raise TimeoutError("not ready")

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()  # asked politely it takes 15 s, to save what is deleted next
            process.wait(_STOPPED_WITHIN_S)
            for port in self._ports.values():
                for left in Path("/tmp").glob(f"seaweedfs-*-grpc-{port + _GRPC_OFFSET}.sock"):
                    left.unlink()
        folder, self._folder = self._folder, None
        if folder is not None:
            shutil.rmtree(folder)

    def _log(self) -> str:
        assert self._folder is not None
        return (self._folder / "log").read_text("utf-8", "replace")[-4000:]


def _end_with_parent() -> None:
    """In the child: be killed when the tests are, however they end (prctl's PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _free_ports(names: list[str]) -> dict[str, int]:
    """Ports that are free together with the one 10,000 above, which each service takes for gRPC."""
    found: dict[str, int] = {}
    # Both below where the kernel picks ports for outgoing connections.
    candidates = random.SystemRandom().sample(range(13_000, 22_000), 500)
    for name in names:
        found[name] = next(
            port
            for port in candidates
            if port not in found.values() and _is_free(port) and _is_free(port + _GRPC_OFFSET)
        )
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
