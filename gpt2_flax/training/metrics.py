"""The numbers of a run's steps and evaluations, as lines and records of the log."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax

from gpt2_flax.checkpoint.step_meta import VALIDATION_LOSS
from gpt2_flax.config.schema import ResolvedConfig
from gpt2_flax.data.packing import Batch
from gpt2_flax.inference.evaluation import Evaluation
from gpt2_flax.model.flops import flops_of_steps
from gpt2_flax.parallel.devices import peak_memory
from gpt2_flax.progress import duration, si
from gpt2_flax.training.metrics_log import MetricsLog
from gpt2_flax.training.step import StepMetrics
from gpt2_flax.training.throughput import Throughput


class FinishedStep(NamedTuple):
    """A step whose numbers have arrived on the host."""

    step: int
    samples_seen: int
    """Samples of the run up to this step."""
    metrics: StepMetrics[float]


class OneStepLate:
    """Reads the numbers of each step after the next step was dispatched, so that the devices never wait for the host.

    Each reader receives every `FinishedStep` in order.
    """

    def __init__(self, *readers: Callable[[FinishedStep], None]):
        self._readers = readers
        self._pending: tuple[int, int, StepMetrics[jax.Array]] | None = None

    def dispatched(self, step: int, samples_seen: int, metrics: StepMetrics[jax.Array]) -> None:
        """Read the step before, and remember this step, whose `metrics` are still on the devices."""
        self.catch_up()
        self._pending = (step, samples_seen, metrics)

    def catch_up(self) -> None:
        """Wait for the last dispatched step, and read it."""
        if self._pending is not None:
            (step, samples_seen, metrics), self._pending = self._pending, None
            finished = FinishedStep(step, samples_seen, StepMetrics(*map(float, jax.device_get(metrics))))
            for read in self._readers:
                read(finished)


class StepReport:
    """Writes the numbers of steps and evaluations to the log."""

    def __init__(self, config: ResolvedConfig, log: MetricsLog, throughput: Throughput, first_step: int):
        self._config, self._log, self._throughput = config, log, throughput
        self.screen = log.screen
        self.begun = first_step, time.perf_counter()
        """The last step before this start, and the time of the start, in seconds of `perf_counter`."""
        self._busy_flops, self._busy_seconds = 0, 0.0  # in all intervals written
        self.figures: dict[str, float] = {}
        """The loss of the last finished step, and the validation loss if the step was evaluated."""
        self._start_interval(first_step)
        self.recompiling(first_step)

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """Return the next batch, and count the time that it took."""
        before = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - before
        return batch

    def finished(self, finished: FinishedStep) -> None:
        """Write a line and a record of the step when they are due, and always a line of the first step."""
        step, samples_seen, metrics = finished
        self.figures = {"train/loss": metrics.loss}
        if self._log.on_step is not None:
            values = self._model_values(metrics) | self._epochs(samples_seen)
            self._log.on_step({"step": step} | {name: value for name, value in values.items() if value is not None})
        self._real += metrics.real
        self.screen.stepped(step, metrics.loss)
        first, remark = step == self._first_step + 1, None
        if first:
            remark = f"this step took {duration(time.perf_counter() - self._first_time)}, compilation included"
        if step % self._config.training.log_every == 0 or step == self._config.training.total_steps:
            self._write(finished, remark)
        elif first:
            self._log.say(self._line(finished, remark))
        if first:  # its time says nothing about later steps
            self._busy_flops, self._busy_seconds = 0, 0.0
            self._start_interval(step)

    def recompiling(self, step: int) -> None:
        """Note that the step after `step` is compiled, so that its time counts for no figure."""
        self._first_step, self._first_time = step, time.perf_counter()
        self.screen.compiling(step, self._config, self._throughput)

    def evaluated(self, step: int, evaluations: Mapping[str, Evaluation], texts: Sequence[str] = ()) -> None:
        """Write the sum of the evaluations, the loss of each of several datasets, and generated texts.

        The time of an evaluation counts for no step.
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
            values |= {f"validation/loss/{folder}": found.loss for folder, found in evaluations.items()}
        self.figures = self.figures | {VALIDATION_LOSS: whole.loss}
        self._log.write(step, values, f"step {step:>7}  validation {whole}")

    def _write(self, finished: FinishedStep, remark: str | None) -> None:
        step, samples_seen, metrics = finished
        total = self._config.training.total_steps
        steps, seconds = step - self._line_step, time.perf_counter() - self._line_time
        flops, peak = flops_of_steps(self._config, self._line_step, step), self._throughput.peak_flops
        self._busy_flops, self._busy_seconds = self._busy_flops + flops, self._busy_seconds + seconds
        tokens_per_second = steps * self._throughput.positions / seconds
        utilization = flops / seconds / peak if peak else None
        remaining = flops_of_steps(self._config, step, total) * self._busy_seconds / self._busy_flops
        speeds = {
            "train/tokens_per_second": tokens_per_second,
            "train/real_tokens_per_second": tokens_per_second * self._real / steps,
            "train/mfu": utilization,
            "train/data_wait_s": self._waited / steps,
            "train/device_memory_peak_bytes": (memory := peak_memory(jax.local_devices())),
        }
        self.screen.memory = memory
        values = self._model_values(metrics) | speeds | self._epochs(samples_seen)
        mfu = "" if utilization is None else f"MFU {utilization:.1%}  "
        line = self._line(finished, remark or f"{si(tokens_per_second)} tokens/s  {mfu}ETA {duration(remaining)}")
        self._log.write(step, {name: value for name, value in values.items() if value is not None}, line)
        self._start_interval(step)

    def _line(self, finished: FinishedStep, speed: str | None) -> str:
        metrics, total = finished.metrics, self._config.training.total_steps
        figures = f"loss {metrics.loss:.4f}  lr {metrics.learning_rate:.2e}  grad {metrics.grad_norm:.2f}"
        return f"step {finished.step:>7}/{total}  {figures}  {speed}"

    def _model_values(self, metrics: StepMetrics[float]) -> dict[str, float | None]:
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

    def _epochs(self, samples_seen: int) -> dict[str, float]:
        sizes = self._throughput.samples_per_epoch
        names = {folder: f"train/epoch/{folder}" if len(sizes) > 1 else "train/epoch" for folder in sizes}
        return {"train/samples": samples_seen} | {names[folder]: samples_seen / size for folder, size in sizes.items()}

    def _start_interval(self, step: int) -> None:
        self._line_step, self._line_time, self._waited, self._real = step, time.perf_counter(), 0.0, 0.0
