"""The registry: entries are never lost, aliases follow promote and rollback, tampering is seen."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster.artifacts import Artifacts
from cluster.errors import BadInput, BadName, Damaged, NotFound
from cluster.names import ModelRef
from cluster.registry import Registry
from cluster.storage import Store, memory_store, open_store


@pytest.fixture(params=["memory", "directory"])
def store(request: pytest.FixtureRequest, tmp_path) -> Store:
    return memory_store() if request.param == "memory" else open_store(str(tmp_path))


def register(registry: Registry, model: str = "digits") -> int:
    version = registry.register(
        model, manifest_key="k", manifest=b"{}", run="r", metrics={"accuracy": 0.9}, why="test"
    )
    return version.version


def test_versions_are_numbered_and_found_by_alias_and_number(store: Store) -> None:
    registry = Registry(store)
    assert [register(registry) for _ in range(5)] == [1, 2, 3, 4, 5]
    registry.promote("digits", "live", 2, why="first")
    registry.promote("digits", "live", 4, why="second")
    registry.promote("digits", "canary", 5, why="third")
    assert registry.resolve(ModelRef.parse("digits")).version == 4
    assert registry.resolve(ModelRef.parse("digits@canary")).version == 5
    assert [registry.resolve(ModelRef("digits", str(n))).version for n in range(1, 6)] == [1, 2, 3, 4, 5]
    assert registry.models() == ["digits"]


def test_rollback_goes_further_back_each_time_and_then_refuses(store: Store) -> None:
    registry = Registry(store)
    for n in range(1, 4):
        register(registry)
        registry.promote("digits", "live", n, why="up")
    assert registry.rollback("digits", "live", why="bad").version.version == 2
    assert registry.rollback("digits", "live", why="bad").version.version == 1
    with pytest.raises(BadInput, match="no earlier version"):
        registry.rollback("digits", "live", why="bad")
    registry.promote("digits", "live", 3, why="mended")
    assert registry.rollback("digits", "live", why="again").version.version == 1


def test_racing_promoters_lose_no_entry(store: Store) -> None:
    registry = Registry(store)
    register(registry)
    with ThreadPoolExecutor(16) as pool:
        entries = list(
            pool.map(lambda n: Registry(store).promote("digits", f"a{n}", 1, why=str(n)), range(16))
        )
    assert sorted(entry.number for entry in entries) == list(range(2, 18))
    newest = registry.newest("digits")
    assert newest is not None
    assert set(newest.aliases) == {f"a{n}" for n in range(16)}


def test_newest_after_a_known_entry(store: Store) -> None:
    registry = Registry(store)
    assert registry.newest("digits") is None
    register(registry)
    newest = registry.newest("digits")
    assert newest is not None
    assert registry.newest("digits", newest.number) is None
    register(registry)
    assert registry.newest("digits", newest.number).number == 2


def test_unknown_things_say_what_there_is(store: Store) -> None:
    registry = Registry(store)
    with pytest.raises(NotFound, match="no model 'digits'"):
        registry.resolve(ModelRef.parse("digits@live"))
    register(registry)
    with pytest.raises(NotFound, match="no alias 'live'"):
        registry.resolve(ModelRef.parse("digits@live"))
    with pytest.raises(NotFound, match="no version 7"):
        registry.promote("digits", "live", 7, why="")
    with pytest.raises(BadInput, match="can't be a number"):
        registry.promote("digits", "7", 1, why="")


@pytest.mark.parametrize(
    "name", ["../x", "A", "", "a/b", "a%2e", "a#b", "ü", "a\r\nb", "a\0", "x" * 64, "a..b", "-a"]
)
def test_names_outside_the_pattern_are_refused(store: Store, name: str) -> None:
    with pytest.raises(BadName):
        Registry(store).resolve(ModelRef(name, "live"))
    with pytest.raises(BadName):
        ModelRef.parse(name + "@live")


def test_a_changed_servable_is_refused(store: Store) -> None:
    from cluster.signature import Signature, Tensor

    signature = Signature(
        task="t",
        inputs=(Tensor(name="x", dtype="FP32", shape=(-1, 4)),),
        outputs=(Tensor(name="y", dtype="FP32", shape=(-1,)),),
    )
    artifacts = Artifacts(store, "runs/r/servables", "servable")
    artifacts.commit(1, {"signature.json": signature.model_dump_json().encode()}, {})
    key = "runs/r/servables/00000001/manifest.json"
    version = Registry(store).register(
        "m", manifest_key=key, manifest=store.get(key), run="r", metrics={}, why=""
    )
    assert Registry(store).servable(version)[1] == signature
    store.put(key, store.get(key) + b" ")
    with pytest.raises(Damaged, match="was changed"):
        Registry(store).servable(version)


def test_promoting_what_is_promoted_leaves_the_way_back(store: Store) -> None:
    registry = Registry(store)
    for n in (1, 2):
        register(registry)
        registry.promote("digits", "live", n, why="up")
    registry.promote("digits", "live", 2, why="said twice")
    assert registry.rollback("digits", "live", why="bad").version.version == 1


def test_a_run_is_registered_once_however_many_finish_it(store: Store) -> None:
    def finish(_: int) -> int:
        version = Registry(store).register(
            "digits", manifest_key="k", manifest=b"{}", run="the-run", metrics={}, why="", once=True
        )
        return version.version

    register(Registry(store))
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(finish, range(8))) == {2}
    newest = Registry(store).newest("digits")
    assert newest is not None
    assert newest.versions == 2
