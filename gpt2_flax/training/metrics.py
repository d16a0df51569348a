"""Numbers of a run: lines on the screen, metrics.jsonl, TensorBoard events; and texts by which to judge it."""

import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from io import FileIO
from pathlib import Path
from typing import Any

import jax

from gpt2_flax.checkpoint.run_folder import SAVED, RunFolder
from gpt2_flax.checkpoint.step_meta import VALIDATION_LOSS
from gpt2_flax.config import Config
from gpt2_flax.data.packing import Batch
from gpt2_flax.errors import ExitCode, UserError, io_error, naming_file, printable
from gpt2_flax.inference.evaluate import Evaluation
from gpt2_flax.parallel.devices import peak_memory
from gpt2_flax.progress import duration, si
from gpt2_flax.training.step import StepMetrics
from gpt2_flax.training.tensorboard import TensorBoard
from gpt2_flax.training.throughput import Throughput


class MetricsLog(AbstractContextManager):
    """Writes on one process of a run; the others are given `run=None` and stay silent.

    A step that is repeated after a restart is written again: the last line of a step counts. What a full disk refuses
    is kept and written later; leaving the context raises `UserError` (IO) if it still cannot be written.
    """

    def __init__(self, run: RunFolder | None):
        self._run = run
        if run:
            self._records, self._texts = (_Lines(path, self.say) for path in (run.metrics, run.samples))
            self._events = TensorBoard(run.tensorboard, self.say)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._run:
            self._events.close()
            for lines in (self._records, self._texts):
                with contextlib.suppress(*((UserError,) if error else ())):  # what failed first is what the user reads
                    lines.close()

    def write(self, step: int, values: dict[str, float], line: str) -> None:
        """Adds the values of a step, with names such as `train/loss`, and prints `line`."""
        if not self._run:
            return
        record = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        self._add_record(step, record)
        self._events.add_scalars(step, {name: value for name, value in values.items() if math.isfinite(value)})
        self.say(line)

    def write_texts(self, step: int, texts: Sequence[str]) -> None:
        """Adds texts of the model at a step, one a line, to samples.txt and to TensorBoard."""
        if not self._run or not texts:
            return
        lines = [printable(text) for text in texts]
        self._texts.add(step, "".join(f"step {step:>7}  {line}\n" for line in lines))
        self._events.add_text(step, "samples", "\n\n".join(lines))

    def committed(self, step: int | None) -> None:
        """Notes that the checkpoint of `step` was committed, so that its loss would be known; None: there is none."""
        if self._run and step is not None:
            self._add_record(step, {SAVED: step})

    def say(self, line: str) -> None:
        """Prints a line, on the process that prints."""
        if self._run:
            with naming_file("standard output"):
                print(line, flush=True)

    def _add_record(self, step: int, values: Mapping[str, Any]) -> None:
        record = {"step": step, "time": round(time.time(), 3), **values}
        self._records.add(step, json.dumps(record, allow_nan=False) + "\n")


class _Lines:
    """A file of lines to add to, behind the end of a line that a kill may have cut short; made with the first line."""

    def __init__(self, path: Path, say: Callable[[str], None]):
        self._path, self._say = path, say
        self._file: FileIO | None = None
        self._waiting, self._step = b"", 0  # what a full disk has refused so far, and from which step on

    def add(self, step: int, lines: str) -> None:
        refused, self._step = bool(self._waiting), self._step if self._waiting else step
        self._waiting += lines.encode()
        try:
            self.flush()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            if not refused:
                self._say(
                    f"warning: {error.strerror}: {self._path} at step {step}; the run continues, and writes it later"
                )

    def close(self) -> None:
        try:
            self.flush()
        except OSError as error:
            raise io_error(error, error.filename) from error
        finally:
            if self._file:
                self._file.close()

    def flush(self) -> None:
        with naming_file(f"{self._path} at step {self._step}"):
            if self._waiting and not self._file:
                self._file = open(self._path, "ab+", buffering=0)  # noqa: SIM115 - `close` closes it
                if self._file.tell():
                    self._file.seek(-1, os.SEEK_END)
                    self._waiting = (b"" if self._file.read() == b"\n" else b"\n") + self._waiting
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]


class StepReport:
    """Reads the numbers of a step one step late, so that the devices never wait for the host."""

    def __init__(self, config: Config, log: MetricsLog, throughput: Throughput, first_step: int, first_sample: int):
        self._config, self._log, self._throughput = config, log, throughput
        self._pending: tuple[int, StepMetrics] | None = None
        self._first_step, self._first_sample, self._first_time = first_step, first_sample, time.perf_counter()
        self._busy_steps, self._busy_seconds = 0, 0.0  # of all intervals written
        self.figures: dict[str, float] = {}
        """Of the last step that was read: its loss, and the validation loss if it was evaluated."""
        self.skipped = 0
        """Of the whole run, up to the last step that was read."""
        self.skipped_in_a_row = 0
        """Among the last steps that were read, up to the very last."""
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
        """Waits for the step last dispatched. Raises `UserError` (DIVERGED) after too many skipped steps in a row."""
        if self._pending is None:
            return
        (step, on_device), self._pending = self._pending, None
        metrics = StepMetrics(*map(float, jax.device_get(on_device)))
        self.figures = {"train/loss": metrics.loss}
        self._real += metrics.real
        if step == self._first_step + 1:
            took = duration(time.perf_counter() - self._first_time)
            self._log.say(f"first step took {took}, compilation included")
        self._count_skipped(step, metrics)
        if step % self._config.training.log_every == 0 or step == self._config.training.total_steps:
            self._write(step, metrics)
        if step == self._first_step + 1:  # its time says nothing about the others
            self._busy_steps, self._busy_seconds = 0, 0.0
            self._start_interval(step)

    def evaluated(self, step: int, evaluations: Mapping[str, Evaluation], texts: Sequence[str] = ()) -> None:
        """Writes what all datasets give together and, of several, the loss of each; the time counts for no step.

        Of none there are only the texts.
        """
        if evaluations:
            self._write_evaluations(step, evaluations)
        self._log.write_texts(step, texts)
        self._start_interval(step)
        if step == self._first_step:
            self._first_time = self._line_time

    def _write_evaluations(self, step: int, evaluations: Mapping[str, Evaluation]) -> None:
        whole = sum(evaluations.values(), Evaluation())
        values = {
            VALIDATION_LOSS: whole.loss,
            "validation/perplexity": whole.perplexity,
            "validation/accuracy": whole.accuracy,
        }
        if whole.bits_per_character is not None:
            values["validation/bits_per_character"] = whole.bits_per_character
        if len(evaluations) > 1:
            values |= {f"validation/loss/{folder}": part.loss for folder, part in evaluations.items()}
        self.figures = self.figures | {VALIDATION_LOSS: whole.loss}
        self._log.write(step, values, f"step {step:>7}  validation {whole}")

    def _count_skipped(self, step: int, metrics: StepMetrics) -> None:
        self.skipped = int(metrics.skipped)
        losses = {"loss": metrics.loss, "gradient norm": metrics.grad_norm}
        bad = next((f"{name} {value:g}" for name, value in losses.items() if not math.isfinite(value)), None)
        if bad is None:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        last = self._samples(step) - 1
        first = last + 1 - self._config.data.global_batch_size
        line = f"warning: step {step} skipped: {bad}; samples {first}..{last}"
        self._log.write(step, {"train/skipped_steps": metrics.skipped}, line)
        if self.skipped_in_a_row >= self._config.training.max_skipped_steps:
            what = f"{bad} at step {step}, skipped steps in a row: {self.skipped_in_a_row}"
            fix = "lower optimizer.learning_rate or raise optimizer.warmup; the newest checkpoint is from before"
            raise UserError(ExitCode.DIVERGED, what, self._config.output, fix)

    def _write(self, step: int, metrics: StepMetrics) -> None:
        total = self._config.training.total_steps
        steps, seconds = step - self._line_step, time.perf_counter() - self._line_time
        self._busy_steps, self._busy_seconds = self._busy_steps + steps, self._busy_seconds + seconds
        tokens_per_second = steps * self._throughput.positions / seconds
        utilization = self._throughput.utilization(tokens_per_second)
        remaining = (total - step) * self._busy_seconds / self._busy_steps
        speeds = {
            "train/tokens_per_second": tokens_per_second,
            "train/real_tokens_per_second": tokens_per_second * self._real / steps,
            "train/mfu": utilization,
            "train/data_wait_s": self._waited / steps,
            "train/device_memory_peak_bytes": peak_memory(jax.local_devices()),
        }
        values = self._model_values(metrics) | speeds | self._positions_in_data(step)
        line = (
            f"step {step:>7}/{total}  loss {metrics.loss:.4f}  lr {metrics.learning_rate:.2e}  "
            f"grad {metrics.grad_norm:.2f}  {si(tokens_per_second)} tokens/s  "
            f"{'' if utilization is None else f'MFU {utilization:.1%}  '}ETA {duration(remaining)}"
        )
        self._log.write(step, {name: value for name, value in values.items() if value is not None}, line)
        self._start_interval(step)

    def _model_values(self, metrics: StepMetrics) -> dict[str, float | None]:
        characters = self._throughput.characters_per_target
        return {
            "train/loss": metrics.loss,
            "train/perplexity": math.exp(min(metrics.loss, 700.0)),
            "train/bits_per_character": metrics.loss / math.log(2) / characters if characters else None,
            "train/accuracy": metrics.accuracy,
            "train/grad_norm": metrics.grad_norm,
            "train/learning_rate": metrics.learning_rate,
            "train/target_share": metrics.targets,
            "train/skipped_steps": metrics.skipped,
        }

    def _positions_in_data(self, step: int) -> dict[str, float]:
        samples, sizes = self._samples(step), self._throughput.samples_per_epoch
        several = len(sizes) > 1
        epochs = {f"train/epoch/{name}" if several else "train/epoch": samples / size for name, size in sizes.items()}
        return {"train/samples": samples, **epochs}

    def _samples(self, step: int) -> int:
        return self._first_sample + (step - self._first_step) * self._config.data.global_batch_size

    def _start_interval(self, step: int) -> None:
        self._line_step, self._line_time, self._waited, self._real = step, time.perf_counter(), 0.0, 0.0
