"""A trial: a candidate version beside the one that an alias points at, and the rules it is judged by.

A *canary* answers a share of the requests, larger with each step. A *shadow* is given copies of requests
and its answers are only compared. Both stand in the registry's log, so every replica of every service
that follows the alias takes part, and who began, advanced or abandoned a trial is on record.

What the words of the rules mean is decided in `serving.rollout.judge`; this is only their form.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cluster.config import Frozen

Percent = Annotated[float, Field(gt=0, le=100)]
DEFAULT_STEPS = (1.0, 10.0, 50.0)


class Rules(Frozen):
    """When a candidate goes a step further, and when it is abandoned."""

    hold_s: float = Field(60.0, ge=0, le=30 * 86_400)
    """Each step lasts this long at least."""
    least_requests: int = Field(200, ge=1, le=10**9)
    """Requests that the candidate must have been given in a step."""
    error_margin: float = Field(0.01, ge=0, le=1)
    """How much larger than the other version's its share of failed requests may be."""
    latency_ratio: float = Field(1.25, ge=1, le=1000)
    """How many times the other version's 95th percentile of time in the model its own may be, for batches of
    the same size."""
    score_margin: float = Field(0.02, ge=0)
    """How much lower its mean score may be, where labels come back."""
    disagreement: float | None = Field(None, ge=0, le=1)
    """A shadow's share of answers that may differ; None: differences are only counted."""
    then: Literal["promote", "wait"] = "promote"
    """After the last step: point the alias at it, or leave that to a person."""


class Trial(Frozen):
    """A candidate that is being tried."""

    version: int
    mode: Literal["canary", "shadow"]
    steps: tuple[Percent, ...] = Field(DEFAULT_STEPS, min_length=1, max_length=20)
    """Percent of requests that go to the candidate; a shadow's is the share of requests copied."""
    step: int = Field(0, ge=0)
    rules: Rules = Rules()
    began: int
    """The log entry that began it; it names the trial."""
    stepped: int
    """The log entry that began this step."""

    @model_validator(mode="after")
    def _check(self) -> Trial:
        if self.step >= len(self.steps):
            raise ValueError(f"a step below {len(self.steps)}, not {self.step}")
        if any(later <= earlier for earlier, later in zip(self.steps, self.steps[1:], strict=False)):
            raise ValueError(f"each step larger than the one before, not {list(self.steps)}")
        return self

    @property
    def percent(self) -> float:
        """Percent of requests in this step."""
        return self.steps[self.step]

    @property
    def is_last_step(self) -> bool:
        """Whether no larger share follows."""
        return self.step == len(self.steps) - 1
