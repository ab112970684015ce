"""What went wrong in a run, and when it is enough. A part of `training.crew.roster`, which owns it."""

from __future__ import annotations

from cluster.errors import RunFailed, TandemError
from training.crew.roles import OUT_OF_MEMORY, Rules


class Troubles:
    """Failures since the newest checkpoint, and those that repeat themselves."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._checkpoint = 0
        self._same_step = 0
        self._last_step = -1
        self.failures = 0
        self.told: list[str] = []
        """Since training last went on."""

    def committed(self, checkpoint: int) -> None:
        """The newest checkpoint is this one: what failed before it is forgiven."""
        if checkpoint > self._checkpoint:
            self._checkpoint, self.failures, self._same_step = checkpoint, 0, 0

    def tell(self, what: str) -> None:
        """Something to tell people that isn't held against the run."""
        self.told.append(what)

    def take_told(self) -> list[str]:
        """What is to be told now that training goes on."""
        told, self.told = self.told, []
        return told

    def count(self, what: str, step: int) -> TandemError | None:
        """One failure more, after `step`; gives the error that ends the run, if this one does."""
        self.told.append(what)
        self.failures += 1
        self._same_step = self._same_step + 1 if step == self._last_step else 1
        self._last_step = step
        rules = self._rules
        fix = f"see tandem logs {rules.run}; the same command with run={rules.run} continues it"
        if OUT_OF_MEMORY in what:
            fix = "set optimization.micro_batch_size, or a smaller one, or give workers more memory; " + fix
        if self.failures > rules.max_failures:
            return RunFailed(
                f"run '{rules.run}' failed more often than its recipe allows",
                got=what,
                allowed=f"max_failures: {rules.max_failures} without a new checkpoint in between",
                fix=fix,
            )
        if self._same_step >= rules.same_step_failures:
            return RunFailed(
                f"run '{rules.run}' failed {self._same_step} times in a row after step {step}",
                got=what,
                allowed="a failure that another try gets past",
                fix=fix,
            )
        return None
