"""Decisions of a run about its numbers: which validation loss is the best, and when to stop."""

import math
from typing import NamedTuple

from gpt2_flax.config.schema import Config
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.training.metrics import FinishedStep
from gpt2_flax.training.metrics_log import MetricsLog


class Best(NamedTuple):
    """The lowest validation loss so far, its step, and the number of evaluations since."""

    loss: float | None = None
    step: int = 0
    since: int = 0

    def after(self, step: int, loss: float) -> "Best":
        """Return the best after an evaluation at `step`; a loss that is not finite is never the best."""
        if math.isfinite(loss) and (self.loss is None or loss < self.loss):
            return Best(loss, step)
        return self._replace(since=self.since + 1)

    def ends(self, patience: int) -> bool:
        """Return whether the last `patience` evaluations found no new best; a `patience` of 0 never ends."""
        return 0 < patience <= self.since


class SkippedSteps:
    """Counts the steps that changed nothing because their loss or gradient was not finite."""

    def __init__(self, config: Config, log: MetricsLog):
        self._config, self._log = config, log
        self.in_a_row = 0
        """Skipped steps up to the last step that was checked."""
        self.total = 0
        """Skipped steps of the whole run."""

    @property
    def sound(self) -> bool:
        """Whether the last step was not skipped, so that its state may displace older checkpoints."""
        return not self.in_a_row

    def check(self, finished: FinishedStep) -> None:
        """Warn of a skipped step; raise `UserError` (DIVERGED) after `training.max_skipped_steps` in a row."""
        step, samples_seen, metrics = finished
        self.total = int(metrics.skipped)
        figures = {"loss": metrics.loss, "gradient norm": metrics.grad_norm}
        bad = next((f"{name} {value:g}" for name, value in figures.items() if not math.isfinite(value)), None)
        if bad is None:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        samples = f"samples {samples_seen - self._config.data.global_batch_size}..{samples_seen - 1}"
        line = f"warning: step {step} skipped: {bad}; {samples}"
        self._log.write(step, {"train/skipped_steps": metrics.skipped}, line)
        if self.in_a_row >= self._config.training.max_skipped_steps:
            what = f"{bad} at step {step}, skipped steps in a row: {self.in_a_row}"
            fix = "lower optimizer.learning_rate or raise optimizer.warmup; the newest checkpoint is from before"
            raise UserError(ExitCode.DIVERGED, what, self._config.output, fix)
