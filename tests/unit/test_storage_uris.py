"""Storage URIs: what is taken, what is refused, and that no secret is ever shown."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from hypothesis import given
from hypothesis import strategies as st
from obstore.store import MemoryStore

from cluster.errors import BadInput, NotFound, StorageError
from cluster.storage import Location, Store, memory_store, open_store


@pytest.fixture(params=["memory", "directory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return memory_store() if request.param == "memory" else open_store(str(tmp_path / "store"))


@pytest.mark.parametrize(
    ("uri", "canonical"),
    [
        ("/data/x/", "file:///data/x"),
        ("file:///data/x", "file:///data/x"),
        ("file://localhost/data/x", "file:///data/x"),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("s3://bucket/a?region=eu-1&endpoint=http://h:1", "s3://bucket/a?region=eu-1&endpoint=http://h:1"),
        ("gs://bucket/a", "gs://bucket/a"),
        ("az://box/a", "az://box/a"),
    ],
)
def test_uris_have_one_canonical_form(uri: str, canonical: str) -> None:
    assert Location.parse(uri).uri == canonical
    assert Location.parse(canonical) == Location.parse(uri)


def test_a_path_is_a_folder_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Location.parse("store").uri == f"file://{tmp_path}/store"
    assert Location.parse("with space#and?query").prefix.endswith("/with space#and?query")


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIAKEY:hunter2@bucket/x",
        "s3://hunter2@bucket",
        "https://user:hunter2@host/x",
        "s3://bucket/x?secret=hunter2",
        "s3://bucket/x?endpoint=http://a:hunter2@host",
        "s3://bucket#hunter2",
        "gs://bucket?access_token=hunter2",
        "az://box?sig=hunter2",
        "ftp://host/x?password=hunter2",
        "s3://bucket/../x?secret=hunter2",
        "s3:///x?token=hunter2",
        "file://host/x?token=hunter2",
    ],
)
def test_a_uri_with_a_secret_is_refused_and_not_shown(uri: str) -> None:
    with pytest.raises(BadInput) as caught:
        open_store(uri)
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in repr(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize(
    "uri",
    [
        "http://169.254.169.254/latest/meta-data",
        "s3://",
        "s3://bucket/a/../b",
        "s3://bucket/a/%2e%2e/b",
        "file://169.254.169.254/x",
        "s3://x#@y",
        "s3://[::1",
        "gopher://x",
        "s3://bucket/a\0b",
        "s3://bucket/a\r\nb",
        "a\0b",
        "",
    ],
)
def test_what_is_not_a_store_is_refused(uri: str) -> None:
    with pytest.raises(BadInput):
        open_store(uri)


@given(st.text(max_size=60), st.sampled_from(["", "s3://", "file://", "gs://", "az://", "s3://b/"]))
def test_any_text_is_a_store_or_refused(text: str, scheme: str) -> None:
    try:
        location = Location.parse(scheme + text)
    except BadInput:
        return
    assert ".." not in location.prefix.split("/")
    assert Location.parse(location.uri).uri == location.uri


def test_of_sixteen_racing_creators_one_wins(store: Store) -> None:
    for round_ in range(20):
        together = Barrier(16)

        def create(writer: int, together: Barrier = together, key: str = f"race/{round_}") -> bool:
            together.wait(10)
            return store.put_if_absent(key, b"writer %d" % writer)

        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(create, range(16)))
        assert won.count(True) == 1
        assert store.get(f"race/{round_}") == b"writer %d" % won.index(True)


def test_keys_and_folders_are_listed_sorted(store: Store) -> None:
    for key in ("runs/b/x", "runs/a/y/z", "runs/a/x", "runsx/c"):
        store.put(key, b"1")
    assert store.keys("runs") == ["runs/a/x", "runs/a/y/z", "runs/b/x"]
    assert store.folders("runs") == ["a", "b"]
    assert store.folders("nothing") == store.keys("nothing") == []
    store.delete(["runs/b/x", "runs/never"])
    assert store.keys("runs") == ["runs/a/x", "runs/a/y/z"]


def test_what_is_not_there_is_not_found(store: Store) -> None:
    for read in (store.get, lambda key: list(store.chunks(key))):
        with pytest.raises(NotFound):
            read("never/was")
    assert store.size_bytes("never/was") is None


def test_a_directory_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="can't be used"):
        open_store(str(tmp_path / "file" / "below"))


@pytest.mark.parametrize(
    ("uri", "said", "fix"),
    [
        (
            "s3://b/x",
            "Generic S3 error: sending to http://169.254.169.254/latest/api/token",
            "AWS_ACCESS_KEY_ID",
        ),
        ("s3://b/x", "Generic S3 error: the credential provider failed", "AWS_ACCESS_KEY_ID"),
        ("s3://b/x", "Generic S3 error: timed out", "the network"),
        ("gs://b/x", "Generic GCS error: http://169.254.169.254/ timed out", "the network"),
    ],
)
def test_missing_keys_are_told_from_a_store_out_of_reach(uri: str, said: str, fix: str) -> None:
    error = Store(MemoryStore(), uri)._translated("reading", "k", OSError(said))
    assert fix in str(error)
