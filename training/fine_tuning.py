"""Beginning with an earlier version's weights, some of them frozen."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch

from cluster.errors import BadInput, shown
from cluster.storage import Store
from training.checkpoints.checkpoint import inherit
from training.origin import made_of
from training.recipe import Origin


def take_weights(model: torch.nn.Module, origin: Origin, store: Store) -> None:
    """Overwrite a fresh model with a version's weights, but for what the recipe leaves out.

    Raises:
        BadInput: a tensor that isn't left out is not in the version, or of another shape there; or a pattern
            that fits nothing.
        TandemError: as `training.origin.made_of` and the store say.
    """
    _check_patterns("leave_out", origin.leave_out, list(model.state_dict()))
    run, manifest = made_of(origin, store)
    inherit(model, run.checkpoints(), manifest, lambda name: _fits(name, origin.leave_out))


def freeze(model: torch.nn.Module, patterns: Sequence[str]) -> None:
    """Have no gradient computed for parameters of these names; before an optimizer is made.

    Raises:
        BadInput: a pattern that fits no parameter, or nothing is left to be trained.
    """
    parameters = dict(model.named_parameters())
    _check_patterns("freeze", patterns, list(parameters))
    for name, parameter in parameters.items():
        if _fits(name, patterns):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise BadInput(
            "every parameter is frozen",
            got=", ".join(patterns),
            allowed="at least one that is trained",
            fix="take a pattern out of initialize_from.freeze",
        )


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_patterns(setting: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise BadInput(
                f"a pattern in initialize_from.{setting} fits nothing in the model",
                got=shown(pattern),
                allowed=", ".join(names[:20]) + (", …" if len(names) > 20 else ""),
                fix="correct it, or take it out",
            )
