"""Numbers of a run: lines on the screen, metrics.jsonl, TensorBoard events."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from tensorboardX import SummaryWriter

from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.config import Config
from gpt2_flax.data.packing import Batch
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.inference.evaluate import Evaluation
from gpt2_flax.progress import duration, si
from gpt2_flax.training.step import StepMetrics


class MetricsLog(AbstractContextManager):
    """Writes on one process of a run; the others are given `run=None` and stay silent.

    A step that is repeated after a restart is written again: the last line of a step counts.
    """

    def __init__(self, run: RunFolder | None):
        self._file = open(run.metrics, "a", encoding="utf-8") if run else None  # noqa: SIM115 (closed in __exit__)
        self._events = SummaryWriter(str(run.tensorboard)) if run else None

    def __exit__(self, *exception: object) -> None:
        if self._file:
            self._file.close()
            self._events.close()

    def write(self, step: int, values: dict[str, float], line: str) -> None:
        """Adds the values of a step, with names such as `train/loss`, and prints `line`."""
        if not self._file:
            return
        record: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        record |= {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self.say(line)

    def say(self, line: str) -> None:
        """Prints a line, on the process that prints."""
        if self._file:
            print(line, flush=True)


class StepReport:
    """Reads the numbers of a step one step late, so that the devices never wait for the host."""

    def __init__(self, config: Config, log: MetricsLog, first_step: int):
        self._config, self._log = config, log
        self._pending: tuple[int, StepMetrics] | None = None
        self._first_step, self._first_time = first_step, time.perf_counter()
        self._busy_steps, self._busy_seconds = 0, 0.0  # of all intervals written
        self._start_interval(first_step)

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """Takes the next batch and notes how long that took."""
        before = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - before
        return batch

    def dispatched(self, step: int, metrics: StepMetrics) -> None:
        """Takes the numbers of the step just begun, after those of the one before."""
        self.catch_up()
        self._pending = (step, metrics)

    def catch_up(self) -> None:
        """Waits for the step last dispatched. Raises `UserError` (DIVERGED) when its loss was not finite."""
        if self._pending is None:
            return
        (step, on_device), self._pending = self._pending, None
        metrics = StepMetrics(*map(float, on_device))
        if not (math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm)):
            what = f"loss {metrics.loss:g}, gradient norm {metrics.grad_norm:g} at step {step}"
            fix = "lower optimizer.learning_rate or raise optimizer.warmup; the newest checkpoint is from before"
            raise UserError(ExitCode.DIVERGED, what, self._config.output, fix)
        if step == self._first_step + 1:
            took = duration(time.perf_counter() - self._first_time)
            self._log.say(f"first step took {took}, compilation included")
        if step % self._config.training.log_every == 0 or step == self._config.training.total_steps:
            self._write(step, metrics)
        if step == self._first_step + 1:  # its time says nothing about the others
            self._busy_steps, self._busy_seconds = 0, 0.0
            self._start_interval(step)

    def evaluated(self, step: int, evaluations: Mapping[str, Evaluation]) -> None:
        """Writes what all datasets give together and, of several, the loss of each; the time counts for no step."""
        whole = sum(evaluations.values(), Evaluation())
        values = {
            "validation/loss": whole.loss,
            "validation/perplexity": whole.perplexity,
            "validation/accuracy": whole.accuracy,
        }
        if whole.bits_per_character is not None:
            values["validation/bits_per_character"] = whole.bits_per_character
        if len(evaluations) > 1:
            values |= {f"validation/loss/{folder}": part.loss for folder, part in evaluations.items()}
        self._log.write(step, values, f"step {step:>7}  validation {whole}")
        self._start_interval(step)

    def _write(self, step: int, metrics: StepMetrics) -> None:
        data, total = self._config.data, self._config.training.total_steps
        steps, seconds = step - self._line_step, time.perf_counter() - self._line_time
        self._busy_steps, self._busy_seconds = self._busy_steps + steps, self._busy_seconds + seconds
        tokens_per_second = steps * data.global_batch_size * data.seq_length / seconds
        remaining = (total - step) * self._busy_seconds / self._busy_steps
        values = {
            "train/loss": metrics.loss,
            "train/accuracy": metrics.accuracy,
            "train/grad_norm": metrics.grad_norm,
            "train/learning_rate": metrics.learning_rate,
            "train/tokens_per_second": tokens_per_second,
            "train/data_wait_s": self._waited / steps,
        }
        line = (
            f"step {step:>7}/{total}  loss {metrics.loss:.4f}  lr {metrics.learning_rate:.2e}  "
            f"grad {metrics.grad_norm:.2f}  {si(tokens_per_second)} tokens/s  ETA {duration(remaining)}"
        )
        self._log.write(step, values, line)
        self._start_interval(step)

    def _start_interval(self, step: int) -> None:
        self._line_step, self._line_time, self._waited = step, time.perf_counter(), 0.0
