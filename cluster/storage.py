"""Object storage behind one small interface: a directory, S3 and its kin, GCS, Azure.

`open_store(uri)` gives a `Store`; keys below it are plain `a/b/c` paths. All writes go through
obstore, because pyarrow publishes truncated objects when a stream is abandoned and cannot write
conditionally; pyarrow only reads datasets (`arrow_filesystem`).

Every request has a connect, a request and a total deadline, since the clients underneath wait for
ever on a black hole. Until the total deadline, whatever may be gone the next time is tried again:
connections refused or cut, time-outs, half an answer, 429 and 5xx. What a directory is told to keep
is on its disk when the call returns (fsync), because the next thing done may be to delete what it
replaces. Credentials come from the standard places (environment, shared credentials
file, instance or pod identity), never from a URI, and no error shows one.

Knows nothing of manifests, runs or models.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import LocalStore, MemoryStore, ObjectStore

from cluster import directory
from cluster.backend import (
    Deadlines,
    first_line,
    is_refusal,
    is_transient,
    lacks_credentials,
    open_backend,
    s3_settings,
)
from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.errors import NotFound, StorageError, shown
from cluster.location import Location
from cluster.retry import retried

__all__ = ["Deadlines", "Location", "Store", "arrow_filesystem", "memory_store", "open_store"]

DEADLINES = Deadlines()
_CHUNK_BYTES = 8 * 1024 * 1024
_PIECES_AT_ONCE = 4
_ONE_REQUEST_BYTES = 40 * 1024 * 1024
"""Up to this size an object is written in one request, which leaves nothing behind when it fails."""
_PART_RETRIES = 4
"""By the client, of each part of a larger one; then all of it is written again."""

T = TypeVar("T")


class _Contended(OSError):
    """A key that can't be created although nothing is there: S3's 409 while another request writes it."""


class Store:
    """A prefix of an object store. Safe to use from several threads.

    Every method raises `StorageError` when the store refuses or can't be reached within the
    deadlines; readers raise `NotFound` for a key that isn't there.
    """

    def __init__(
        self,
        backend: ObjectStore,
        uri: str,
        deadlines: Deadlines = DEADLINES,
        *,
        for_parts: ObjectStore | None = None,
        clock: Clock = SYSTEM_CLOCK,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._backend = backend
        self._for_parts = for_parts or backend
        self._deadlines = deadlines
        self._clock = clock
        self._uniform = uniform
        self._root = Path(str(backend.prefix)) if isinstance(backend, LocalStore) else None
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

        def first() -> tuple[int, str | None, bytes]:
            whole = obstore.get(self._backend, key)
            size = int(whole.meta["size"])
            return size, whole.meta["e_tag"], bytes(whole.bytes()) if size <= _CHUNK_BYTES else b""

        def piece(start: int) -> bytes:
            end = min(start + _CHUNK_BYTES, size)
            options: Any = {"range": (start, end)} | ({"if_match": etag} if etag else {})
            return self._retried(lambda: bytes(obstore.get(self._backend, key, options=options).bytes()))

        try:
            size, etag, data = self._retried(first)
            if size <= _CHUNK_BYTES:
                yield data
            else:
                yield from _ahead(piece, range(0, size, _CHUNK_BYTES))
        except (FileNotFoundError, BaseError, OSError) as error:
            raise self._translated("reading", key, error) from None

    def size_bytes(self, key: str) -> int | None:
        """The object's size, or None where there is no such object."""
        try:
            return int(self._retried(lambda: obstore.head(self._backend, key))["size"])
        except FileNotFoundError:
            return None
        except (BaseError, OSError) as error:
            raise self._translated("looking up", key, error) from None

    def put(self, key: str, data: bytes | memoryview | Path) -> None:
        """Write an object whole, replacing what was there.

        Up to 40 MiB in memory go in one request; more, and files, in concurrent parts. A directory takes a
        `memoryview` of aligned pages past the page cache, where it can.
        """
        in_one = not isinstance(data, Path) and len(data) <= _ONE_REQUEST_BYTES
        backend = self._backend if in_one else self._for_parts
        try:
            if self._root and isinstance(data, memoryview) and directory.put_direct(self._root, key, data):
                directory.sync_folders(self._root, key)
                return
            self._retried(lambda: obstore.put(backend, key, data, use_multipart=False if in_one else None))
            self._sync(key)
        except (BaseError, OSError) as error:
            raise self._translated("writing", key, error) from None

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Create an object; False where the key is taken by other bytes.

        A write whose answer was lost is repeated, and then refused, for the key is taken. So a
        refusal is checked against what is there: our own bytes (the caller puts a nonce in them)
        mean that we won.
        """

        def create() -> bool:
            try:
                obstore.put(self._backend, key, data, mode="create", use_multipart=False)
                return True
            except (AlreadyExistsError, PreconditionError):
                try:
                    return bytes(obstore.get(self._backend, key).bytes()) == data
                except FileNotFoundError:
                    raise _Contended("taken, but nothing is there") from None

        try:
            created = self._retried(create)
            self._sync(key)
            return created
        except (BaseError, OSError) as error:
            raise self._translated("creating", key, error) from None

    def keys(self, prefix: str) -> list[str]:
        """Every key below a folder, sorted. For clean-up and copying, never to guess a latest."""
        try:
            where = prefix.rstrip("/") + "/" if prefix else None
            pages = self._retried(lambda: list(obstore.list(self._backend, where)))
        except (BaseError, OSError) as error:
            raise self._translated("listing", prefix, error) from None
        return sorted(meta["path"] for page in pages for meta in page)

    def folders(self, prefix: str) -> list[str]:
        """Names of the folders directly below a folder, sorted."""
        try:
            where = prefix.rstrip("/") + "/" if prefix else None
            found = self._retried(lambda: obstore.list_with_delimiter(self._backend, where))
        except (BaseError, OSError) as error:
            raise self._translated("listing", prefix, error) from None
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found["common_prefixes"])

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; those that aren't there are passed over."""
        for key in keys:
            try:
                self._retried(partial(obstore.delete, self._backend, key))
            except FileNotFoundError:
                continue
            except (BaseError, OSError) as error:
                raise self._translated("deleting", key, error) from None

    def _retried(self, call: Callable[[], T]) -> T:
        return retried(
            call,
            transient=lambda error: is_transient(error) or isinstance(error, _Contended),
            retry_s=self._deadlines.retry_s,
            clock=self._clock,
            uniform=self._uniform,
        )

    def _sync(self, key: str) -> None:
        if self._root:
            directory.sync(self._root, key)

    def _translated(self, doing: str, key: str, error: Exception) -> Exception:
        if isinstance(error, FileNotFoundError) and doing == "reading":
            return NotFound("no such object", got=shown(key), allowed=f"a key in {self.uri}")
        if is_refusal(error):
            fix = "check the credentials and their rights"
        elif lacks_credentials(error) and self.uri.startswith("s3:"):  # without any, it asks EC2's metadata
            fix = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile in ~/.aws/credentials"
        else:
            fix = "check the endpoint, the network and the space left, then try again"
        return StorageError(
            f"{doing} '{key}' in {self.uri} failed",
            got=shown(first_line(error)),
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
    return Store(
        open_backend(where, deadlines),
        where.uri,
        deadlines,
        for_parts=open_backend(where, deadlines, retries=_PART_RETRIES),
    )


def memory_store() -> Store:
    """A store in this process's memory, for tests and simulations."""
    return Store(MemoryStore(), "memory://")


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
    s3 = s3_settings(where)
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
