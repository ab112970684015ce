"""Object storage behind one small interface: a directory, S3 and its kin, GCS, Azure.

`open_store(uri)` gives a `Store`; keys below it are plain `a/b/c` paths. All writes go through
obstore, because pyarrow publishes truncated objects when a stream is abandoned and cannot write
conditionally; pyarrow only reads datasets (`arrow_filesystem`).

Every request has a connect, a request and a total deadline, since the clients underneath wait for
ever on a black hole. Credentials come from the standard places (environment, shared credentials
file, instance or pod identity), never from a URI, and no error shows one.

Knows nothing of manifests, runs or models.
"""

from __future__ import annotations

import configparser
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import AzureStore, GCSStore, LocalStore, MemoryStore, ObjectStore, S3Store

from cluster.errors import NotFound, StorageError, shown
from cluster.location import Location

__all__ = ["Deadlines", "Location", "Store", "arrow_filesystem", "memory_store", "open_store"]

_CHUNK_BYTES = 8 * 1024 * 1024
_PIECES_AT_ONCE = 4


@dataclass(frozen=True)
class Deadlines:
    """How long a store may take: to connect, to answer one request, to be asked again after failures.

    A request that begins just before `retry_s` may still take `request_s`: `total_s` bounds a call.
    """

    connect_s: float = 5
    request_s: float = 30
    retry_s: float = 60

    @property
    def total_s(self) -> float:
        """The most that one request takes, with its retries."""
        return self.retry_s + self.request_s


DEADLINES = Deadlines()


class Store:
    """A prefix of an object store. Safe to use from several threads.

    Every method raises `StorageError` when the store refuses or can't be reached within the
    deadlines; readers raise `NotFound` for a key that isn't there.
    """

    def __init__(self, backend: ObjectStore, uri: str, deadlines: Deadlines = DEADLINES) -> None:
        self._backend = backend
        self._deadlines = deadlines
        self.uri = uri

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def get(self, key: str) -> bytes:
        """The whole object."""
        chunks = list(self.chunks(key))
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def chunks(self, key: str) -> Iterator[bytes]:
        """The object in pieces of up to 8 MiB, in order, a few of them fetched ahead.

        A request's deadline covers its body, so a large object in one request would run into it on
        a slow line; in pieces it doesn't. An object replaced meanwhile is an error, never a mixture.
        """
        try:
            whole = obstore.get(self._backend, key)
            size, etag = int(whole.meta["size"]), whole.meta["e_tag"]
            if size <= _CHUNK_BYTES:
                yield bytes(whole.bytes())
                return
            del whole

            def piece(start: int) -> bytes:
                end = min(start + _CHUNK_BYTES, size)
                options: Any = {"range": (start, end)} | ({"if_match": etag} if etag else {})
                return bytes(obstore.get(self._backend, key, options=options).bytes())

            yield from _ahead(piece, range(0, size, _CHUNK_BYTES))
        except (FileNotFoundError, BaseError, OSError) as error:
            raise self._translated("reading", key, error) from None

    def size_bytes(self, key: str) -> int | None:
        """The object's size, or None where there is no such object."""
        try:
            return int(obstore.head(self._backend, key)["size"])
        except FileNotFoundError:
            return None
        except (BaseError, OSError) as error:
            raise self._translated("looking up", key, error) from None

    def put(self, key: str, data: bytes | Path) -> None:
        """Write an object whole (a file in concurrent parts), replacing what was there."""
        try:
            obstore.put(self._backend, key, data)
        except (BaseError, OSError) as error:
            raise self._translated("writing", key, error) from None

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Create an object; False where the key is taken by other bytes.

        A response lost on the way makes the client repeat a write that has succeeded and be told
        that the key is taken. So a refusal is checked against what is there: our own bytes (the
        caller puts a nonce in them) mean that we won.
        """
        try:
            obstore.put(self._backend, key, data, mode="create")
            return True
        except (AlreadyExistsError, PreconditionError):
            return self.get(key) == data
        except (BaseError, OSError) as error:
            raise self._translated("creating", key, error) from None

    def keys(self, prefix: str) -> list[str]:
        """Every key below a folder, sorted. For clean-up and copying, never to guess a latest."""
        try:
            pages = list(obstore.list(self._backend, prefix.rstrip("/") + "/" if prefix else None))
        except (BaseError, OSError) as error:
            raise self._translated("listing", prefix, error) from None
        return sorted(meta["path"] for page in pages for meta in page)

    def folders(self, prefix: str) -> list[str]:
        """Names of the folders directly below a folder, sorted."""
        try:
            found = obstore.list_with_delimiter(self._backend, prefix.rstrip("/") + "/" if prefix else None)
        except (BaseError, OSError) as error:
            raise self._translated("listing", prefix, error) from None
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found["common_prefixes"])

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; those that aren't there are passed over."""
        for key in keys:
            try:
                obstore.delete(self._backend, key)
            except FileNotFoundError:
                continue
            except (BaseError, OSError) as error:
                raise self._translated("deleting", key, error) from None

    def _translated(self, doing: str, key: str, error: Exception) -> Exception:
        if isinstance(error, FileNotFoundError) and doing == "reading":
            return NotFound("no such object", got=shown(key), allowed=f"a key in {self.uri}")
        # The first line says it; what follows is the client's debug dump.
        said = str(error).split("\n", 1)[0]
        refused = isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError)
        refused = refused or " 401 " in said or " 403 " in said  # which listings report as any failure
        no_credentials = "169.254" in str(error) or "credential" in str(error).lower()
        if refused:
            fix = "check the credentials and their rights"
        elif no_credentials and self.uri.startswith("s3:"):  # with none at hand, it asks EC2's metadata
            fix = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile in ~/.aws/credentials"
        else:
            fix = "check the endpoint, the network and the space left, then try again"
        return StorageError(
            f"{doing} '{key}' in {self.uri} failed",
            got=shown(said),
            allowed="a store that answers within "
            f"{self._deadlines.total_s:g} s and lets these credentials read, write and delete",
            fix=fix,
        )


def _ahead(fetch: Callable[[int], bytes], starts: Iterable[int]) -> Iterator[bytes]:
    """What `fetch` gives for each start, in order, a few fetched at once."""
    with ThreadPoolExecutor(_PIECES_AT_ONCE) as pool:
        waiting: deque[Future[bytes]] = deque()
        try:
            for start in starts:
                waiting.append(pool.submit(fetch, start))
                if len(waiting) > _PIECES_AT_ONCE:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def open_store(uri: str, deadlines: Deadlines = DEADLINES) -> Store:
    """The store at `uri`: `file://`, `s3://` (with `?endpoint=`), `gs://`, `az://`, or a path.

    A directory is made where there is none. No server is contacted here.

    Raises:
        BadInput: the URI can't be used.
        StorageError: the directory can't be made.
    """
    where = Location.parse(uri)
    return Store(_backend(where, deadlines), where.uri, deadlines)


def memory_store() -> Store:
    """A store in this process's memory, for tests and simulations."""
    return Store(MemoryStore(), "memory://")


def _backend(where: Location, deadlines: Deadlines) -> ObjectStore:
    if where.scheme == "file":
        try:
            return LocalStore("/" + where.prefix, mkdir=True, automatic_cleanup=False)
        except (BaseError, OSError) as error:
            raise StorageError(
                f"the folder /{where.prefix} can't be used",
                got=shown(str(error).split("\n", 1)[0]),
                allowed="a folder that this user may write to, or make",
                fix="correct the path, or its rights",
            ) from None
    retry: Any = {"max_retries": 8, "retry_timeout": timedelta(seconds=deadlines.retry_s)}
    client: Any = {
        "timeout": timedelta(seconds=deadlines.request_s),
        "connect_timeout": timedelta(seconds=deadlines.connect_s),
    }
    prefix = where.prefix or None
    if where.scheme == "gs":
        return GCSStore(where.bucket, prefix=prefix, client_options=client, retry_config=retry)
    if where.scheme in ("az", "abfs"):
        return AzureStore(where.bucket, prefix=prefix, client_options=client, retry_config=retry)
    s3 = _s3_settings(where)
    if s3["endpoint"]:
        client["allow_http"] = s3["endpoint"].startswith("http://")
    config: Any = {key: value for key, value in s3.items() if value}
    return S3Store(where.bucket, prefix=prefix, client_options=client, retry_config=retry, **config)


def _s3_settings(where: Location) -> dict[str, str]:
    """Endpoint, region and, from the shared credentials file only, keys. Empty: the client's default."""
    env = os.environ
    endpoint = (
        where.options.get("endpoint") or env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL", "")
    )
    region = where.options.get("region") or env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION", "")
    settings = {"endpoint": endpoint, "region": region or ("us-east-1" if endpoint else "")}
    if "AWS_ACCESS_KEY_ID" in env:
        return settings
    profiles = configparser.ConfigParser(interpolation=None)
    profiles.read(env.get("AWS_SHARED_CREDENTIALS_FILE", Path.home() / ".aws" / "credentials"))
    profile = env.get("AWS_PROFILE", "default")
    if profiles.has_section(profile):
        section = profiles[profile]
        settings["access_key_id"] = section.get("aws_access_key_id", "")
        settings["secret_access_key"] = section.get("aws_secret_access_key", "")
        settings["session_token"] = section.get("aws_session_token", "")
    return settings


def arrow_filesystem(uri: str, deadlines: Deadlines = DEADLINES) -> tuple[Any, str]:
    """A pyarrow filesystem and the path in it, for reading datasets (never for writing).

    Raises:
        BadInput: the URI can't be used.
    """
    from pyarrow import fs

    where = Location.parse(uri)
    if where.scheme == "file":
        return fs.LocalFileSystem(), "/" + where.prefix
    path = f"{where.bucket}/{where.prefix}".rstrip("/")
    if where.scheme != "s3":
        filesystem, _ = fs.FileSystem.from_uri(f"{where.scheme}://{path}")
        return filesystem, path
    s3 = _s3_settings(where)
    scheme, _, host = s3["endpoint"].partition("://")
    keys = {"access_key": s3.get("access_key_id"), "secret_key": s3.get("secret_access_key")}
    filesystem = fs.S3FileSystem(
        endpoint_override=host or None,
        scheme=scheme or None,
        region=s3["region"] or None,
        connect_timeout=deadlines.connect_s,
        request_timeout=deadlines.request_s,
        **({**keys, "session_token": s3.get("session_token")} if all(keys.values()) else {}),
    )
    return filesystem, path
