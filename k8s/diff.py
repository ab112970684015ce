"""A promotion to review: per object what the plan makes of it, then a unified diff without noise.

Left out as noise: the order of objects and of keys, what the API server adds, nulls. Kept: the order of
lists, since the operator's hash sees it. What is YAML or JSON inside a string (`serveConfigV2`, a ConfigMap's
files) is compared as what it says. Values of Secrets are hidden. An object whose name ends in a hash of its
content is compared with its predecessor.

The patch is for eyes: to go back, apply the old manifests, or revert the commit that changed them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from k8s.changes import Change, Manifest, object_name
from k8s.plan import Plan, applied
from k8s.plan import plan as planned

_HASHED_NAME = re.compile(r"(?P<base>[A-Za-z]+/.+)-[0-9a-f]{8,10}")
_HIDDEN, _HIDDEN_CHANGED = "(hidden)", "(hidden, and changed)"
_CONTEXT_LINES = 3


class ObjectDiff(NamedTuple):
    """One object that differs."""

    object: str
    """`KIND/NAME`, the new name where it was renamed."""
    verdict: str
    """What applying it does, and the fields to blame."""
    patch: tuple[str, ...]
    """Lines of a unified diff."""


class Diff(NamedTuple):
    """What differs between two sets of manifests."""

    objects: tuple[ObjectDiff, ...]
    plan: Plan


def diff(old: Sequence[Manifest], new: Sequence[Manifest]) -> Diff:
    """Compare what runs with what is to be applied.

    Args:
        old: objects as they were applied last.
        new: objects that are to be applied.
    """
    before = {object_name(one): one for one in old}
    after = {object_name(one): one for one in new}
    found = planned(old, new)
    renamed = _renamed(before, after)
    objects = []
    for name in sorted({*before, *after}):
        if name in renamed.values():
            continue  # told with its successor
        one, other = before.get(renamed.get(name, name)), after.get(name)
        patch = tuple(_patch(one, other, renamed.get(name, name), name))
        if patch:
            objects.append(ObjectDiff(name, _verdict(found.changes, name), patch))
    return Diff(tuple(objects), found)


def _renamed(before: Mapping[str, Manifest], after: Mapping[str, Manifest]) -> dict[str, str]:
    """New names to old ones, where only the hash at the end differs and there is one of each."""

    def bases(names: Mapping[str, Manifest], others: Mapping[str, Manifest]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in names:
            if name not in others and (match := _HASHED_NAME.fullmatch(name)):
                found.setdefault(match["base"], []).append(name)
        return found

    gone, come = bases(before, after), bases(after, before)
    return {
        names[0]: gone[base][0] for base, names in come.items() if len(names) == len(gone.get(base, ())) == 1
    }


def _patch(old: Manifest | None, new: Manifest | None, old_name: str, new_name: str) -> Iterator[str]:
    one, other = _shown(old), _shown(new)
    if one is not None and other is not None:
        _mark_hidden(old, new, other)
    lines = difflib.unified_diff(
        _lines(one),
        _lines(other),
        f"a/{old_name}" if old is not None else "/dev/null",
        f"b/{new_name}" if new is not None else "/dev/null",
        n=_CONTEXT_LINES,
        lineterm="",
    )
    yield from lines


def _lines(tree: Any) -> list[str]:
    if tree is None:
        return []
    text = yaml.safe_dump(tree, sort_keys=True, allow_unicode=True, width=10_000)
    return text.splitlines()


def _shown(manifest: Manifest | None) -> dict[str, Any] | None:
    """An object as it is compared: what an author writes, readable, without secrets."""
    if manifest is None:
        return None
    tree: dict[str, Any] = _readable(applied(manifest))
    for field in ("data", "stringData"):
        if manifest.get("kind") == "Secret" and isinstance(tree.get(field), dict):
            tree[field] = dict.fromkeys(tree[field], _HIDDEN)
    return tree


def _mark_hidden(old: Manifest | None, new: Manifest | None, shown: dict[str, Any]) -> None:
    """Say of which keys of a Secret the values differ, without showing either."""
    assert old is not None
    assert new is not None
    if new.get("kind") != "Secret":
        return
    for field in ("data", "stringData"):
        before, after = old.get(field) or {}, new.get(field) or {}
        for key in shown.get(field) or {}:
            if key in before and before[key] != after.get(key):
                shown[field][key] = _HIDDEN_CHANGED


def _readable(value: Any) -> Any:
    """The same tree without nulls, and with documents inside strings opened."""
    if isinstance(value, Mapping):
        return {str(key): _readable(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_readable(one) for one in value]
    if isinstance(value, str) and "\n" in value:
        return _opened(value)
    return value


def _opened(text: str) -> Any:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    # A text of several lines that happens to be YAML of one string stays what it was.
    return _readable(found) if isinstance(found, dict | list) else text.splitlines()


def _verdict(changes: Sequence[Change], name: str) -> str:
    own = [change for change in changes if change.object == name]
    if not own:
        return "nothing: what differs means the same"
    worst = next(
        effect
        for effect in ("new cluster", "in place", "waits", "new object", "left behind")
        if any(change.effect == effect for change in own)
    )
    blamed = [change.path for change in own if change.effect == worst and change.cause and change.path]
    waits = sum(change.effect == "waits" for change in own) if worst != "waits" else 0
    text = worst + (f": {', '.join(blamed)}" if blamed else "")
    return text + (f" ({waits} more that wait)" if waits else "")


def as_text(found: Diff) -> Iterator[str]:
    """The diff for a reviewer: verdicts on top as comments, then the patch of each object."""
    if not found.objects:
        yield "# nothing changes"
        return
    for one in found.objects:
        yield f"# {one.object}: {one.verdict}"
    if "new cluster" in found.plan.effects:
        first, most = found.plan.extra_at_first, found.plan.extra_at_most
        yield (
            f"# beside what runs: {first.cpus:g} CPUs and {first.gpus:g} GPUs at first,"
            f" {most.cpus:g} and {most.gpus:g} at most"
        )
    for name, strategy in found.plan.strategies.items():
        yield f"# suits {name}: upgradeStrategy.type {strategy}"
    for line in found.plan.advice:
        yield f"# advice: {line}"
    for one in found.objects:
        yield ""
        yield from one.patch


def as_json(found: Diff) -> dict[str, Any]:
    """The diff for programs."""
    return {
        "objects": [
            {"object": one.object, "verdict": one.verdict, "patch": list(one.patch)} for one in found.objects
        ],
        "extra_at_first": found.plan.extra_at_first._asdict(),
        "extra_at_most": found.plan.extra_at_most._asdict(),
        "advice": list(found.plan.advice),
        "strategies": dict(found.plan.strategies),
    }
