"""Begins, advances and ends trials: entries of a model's log, on top of what `cluster.registry` does.

Whoever judges a trial may be late: another has moved the alias or ended the trial meanwhile. So advancing,
promoting and abandoning name the trial they mean, and are refused where another stands in the log by now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import ValidationError

from cluster.errors import BadInput, Conflict, NotFound, shown
from cluster.names import ModelRef
from cluster.registry import Change, Entry, Registry, Target
from cluster.trial import DEFAULT_STEPS, Rules, Trial


def begin(
    registry: Registry,
    model: str,
    alias: str,
    version: int,
    *,
    mode: Literal["canary", "shadow"],
    steps: Sequence[float] = DEFAULT_STEPS,
    rules: Rules | None = None,
    why: str,
) -> Entry:
    """Try `version` beside the one that `alias` points at; a trial that was on is replaced.

    Raises:
        NotFound: no such model, alias or version.
        BadInput: the alias points at that version already, or the steps aren't a rising row of percents.
    """

    def make(number: int, newest: Entry | None) -> Change:
        newest, target = _standing(registry, model, alias, newest)
        if target.version == version:
            raise BadInput(
                f"'{model}@{alias}' points at version {version} already",
                allowed=f"another of the versions 1 to {newest.versions}",
                fix=f"list them: tandem models show {model}",
            )
        candidate = registry.version(newest, ModelRef(model, str(version)))
        try:
            trial = Trial(
                version=version,
                mode=mode,
                steps=tuple(map(float, steps)),
                rules=rules or Rules(),
                began=number,
                stepped=number,
            )
        except ValidationError as error:
            first = error.errors()[0]
            raise BadInput(
                "the steps can't be used",
                got=shown(list(steps)),
                allowed=f"percents above 0 and up to 100, each larger than the last ({first['msg']})",
            ) from None
        aliases = {**newest.aliases, alias: target.model_copy(update={"trial": trial})}
        return Change(mode, candidate, newest.versions, aliases, alias)

    return registry.append(model, why, make)


def advance(registry: Registry, model: str, alias: str, trial: Trial, *, why: str) -> Entry:
    """Take a trial to its next step.

    Raises:
        Conflict: it is over, or in another step than `trial` by now.
    """

    def make(number: int, newest: Entry | None) -> Change:
        newest, target = _standing(registry, model, alias, newest)
        _same(model, alias, target, trial)
        stepped = trial.model_copy(update={"step": trial.step + 1, "stepped": number})
        aliases = {**newest.aliases, alias: target.model_copy(update={"trial": stepped})}
        candidate = registry.version(newest, ModelRef(model, str(trial.version)))
        return Change("advance", candidate, newest.versions, aliases, alias)

    if trial.is_last_step:
        raise BadInput("the trial is in its last step", fix="promote the candidate")
    return registry.append(model, why, make)


def abandon(registry: Registry, model: str, alias: str, trial: Trial | None = None, *, why: str) -> Entry:
    """End a trial; the alias stays where it points.

    Args:
        trial: the one that is meant; None for whichever is on.

    Raises:
        BadInput: none is on.
        Conflict: another than `trial` is on by now.
    """

    def make(number: int, newest: Entry | None) -> Change:
        newest, target = _standing(registry, model, alias, newest)
        if trial is not None:
            _same_trial(model, alias, target, trial)
        elif target.trial is None:
            raise BadInput(
                f"no version is tried beside '{model}@{alias}'",
                fix=f"begin: tandem models canary {model} VERSION --alias {alias}",
            )
        aliases = {**newest.aliases, alias: target.model_copy(update={"trial": None})}
        stable = registry.version(newest, ModelRef(model, alias))
        return Change("abandon", stable, newest.versions, aliases, alias)

    return registry.append(model, why, make)


def promote(registry: Registry, model: str, alias: str, trial: Trial, *, why: str) -> Entry:
    """Point the alias at a trial's candidate, if that very step is still on.

    Raises:
        Conflict: it is over, or in another step by now.
    """

    def make(number: int, newest: Entry | None) -> Change:
        newest, target = _standing(registry, model, alias, newest)
        _same(model, alias, target, trial)
        candidate = registry.version(newest, ModelRef(model, str(trial.version)))
        moved = Target(version=trial.version, entry=number, before=target.entry)
        return Change("promote", candidate, newest.versions, {**newest.aliases, alias: moved}, alias)

    return registry.append(model, why, make)


def parse_steps(text: str) -> tuple[float, ...]:
    """Percents from `1,10,50`.

    Raises:
        BadInput: they can't be read.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise BadInput(
            "the steps can't be read",
            got=shown(text),
            allowed="percents such as 1,10,50",
        ) from None


def parse_rules(rules: Mapping[str, object]) -> Rules:
    """Rules from the command line.

    Raises:
        BadInput: a value is out of bounds.
    """
    try:
        return Rules.model_validate(rules)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(
            f"rule '{first['loc'][0]}' can't be that", got=shown(first["input"]), allowed=str(first["msg"])
        ) from None


def _standing(registry: Registry, model: str, alias: str, newest: Entry | None) -> tuple[Entry, Target]:
    if newest is None:
        registry.history(model)  # raises: it knows how to say that there is no such model
        raise NotFound(f"no model '{model}'")
    return newest, registry.target(newest, alias)


def _same(model: str, alias: str, target: Target, trial: Trial) -> None:
    _same_trial(model, alias, target, trial)
    assert target.trial is not None
    if target.trial.stepped != trial.stepped:
        raise Conflict(
            f"the trial of version {trial.version} beside '{model}@{alias}' is in another step by now",
            got=f"step {trial.step}",
            allowed=f"step {target.trial.step}",
        )


def _same_trial(model: str, alias: str, target: Target, trial: Trial) -> None:
    if target.trial is None or target.trial.began != trial.began:
        raise Conflict(f"the trial of version {trial.version} beside '{model}@{alias}' is over")
