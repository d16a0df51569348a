"""What a person wants to know when a stage of training begins, and when it has ended."""

import contextlib
import shlex
import time
from collections.abc import Iterator

import jax

from gpt2_flax.checkpoint.step_meta import VALIDATION_LOSS
from gpt2_flax.errors import UserError
from gpt2_flax.export.example import example_prompt
from gpt2_flax.parallel.devices import memory_bytes
from gpt2_flax.progress import duration, si
from gpt2_flax.training.metrics import StepReport
from gpt2_flax.training.open_stage import Stage
from gpt2_flax.training.start import Progress
from gpt2_flax.training.step import TrainState
from gpt2_flax.training.throughput import Throughput

_COLUMN = 16
_EXAMPLE = 100  # tokens of a document from which an example prompt is taken


def header(stage: Stage, state: TrainState, step: int, throughput: Throughput) -> Iterator[str]:
    """Yield lines about a stage that goes on from `state` after `step`."""
    config, mesh, datasets = stage.config, stage.mesh, stage.mixture.datasets
    training, n_rows = config.training, config.data.global_batch_size
    parameters, in_embeddings = config.model.parameters, config.model.embedding_parameters
    yield _line("parameters", f"{parameters:,}, {in_embeddings:,} of them in embeddings")
    device = mesh.devices.flat[0]
    memory = f", {si(size, 'B')} of memory each" if (size := memory_bytes(device)) else ""
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    yield _line("devices", f"{mesh.size} x {device.device_kind}{memory}{processes}")
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    for name, choice in ({"mesh": sizes} | dict(stage.choices)).items():
        yield _line(name, choice)
    parts = f", in {training.accumulation_steps} parts" if training.accumulation_steps > 1 else ""
    rows = f"{n_rows:,} rows of {config.data.seq_length:,}{parts}"
    yield _line("a step", f"{throughput.positions:,} tokens: {rows}")
    done = f", {step:,} of them done" if step else ""
    yield _line("steps", f"{training.total_steps:,}, {si(training.total_steps * throughput.positions, 'tokens')}{done}")
    for folder, samples in throughput.samples_per_epoch.items():
        epochs, tokens = training.total_steps * n_rows / samples, datasets[folder].train.n_tokens
        yield _line("epochs", f"{epochs:,.2f} of {tokens:,} tokens in {folder}")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((state.model, state.opt_state)))
    kept = training.keep_checkpoints + training.keep_best
    yield _line("a checkpoint", f"{si(size, 'B')}; up to {kept} kept, {si(size * kept, 'B')}")
    if step and (speed := _last_speed(stage)):
        left = (training.total_steps - step) * throughput.positions / speed
        end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + left))
        yield _line("estimated end", f"{end}, in {duration(left)}, at the speed before the stop")
    yield _line("run folder", config.output)


def summary(stage: Stage, report: StepReport, progress: Progress) -> Iterator[str]:
    """Yield lines about a stage that has ended at the step of `progress`."""
    (first_step, first_time), figures, best = report.begun, report.figures, progress.best
    step, positions = progress.step, stage.config.data.global_batch_size * stage.config.data.seq_length
    took = duration(time.perf_counter() - first_time)
    tokens = f"{step:,} steps, {si(step * positions, 'tokens')}"
    yield _line("finished", f"{tokens}{f'; the last {step - first_step:,}' if first_step else ','} in {took}")
    losses = {"training": figures["train/loss"], "validation": figures.get(VALIDATION_LOSS)}
    yield _line("loss", ", ".join(f"{what} {loss:.4f}" for what, loss in losses.items() if loss is not None))
    if best.loss is not None:
        yield _line("best step", f"{best.step:,}, validation loss {best.loss:.4f}")


def next_command(stage: Stage) -> str:
    """Return a line with a command that shows what the model of a stage has learned."""
    prompt = "TEXT"
    with contextlib.suppress(UserError, OSError):  # the run has ended well, whatever happens to its dataset now
        prompt = shlex.quote(_prompt(stage))
    return _line("next", f"gpt2-flax generate {shlex.quote(stage.config.output)} --prompt {prompt}")


def _prompt(stage: Stage) -> str:
    dataset, tokenizer = next(iter(stage.mixture.datasets.values())), stage.mixture.tokenizer()
    split = dataset.validation if dataset.validation.n_documents else dataset.train
    start, stop = split.bounds(0)
    text = tokenizer.decode(split.read(start, min(stop, start + _EXAMPLE)))
    return example_prompt(stage.config.training.prompts, [text], tokenizer, stage.config.model.n_positions)


def _last_speed(stage: Stage) -> float | None:
    speeds = [record.get("train/tokens_per_second") for record in stage.run.records(last=2**16)]
    return next((speed for speed in reversed(speeds) if isinstance(speed, float) and speed > 0), None)


def _line(name: str, value: str) -> str:
    return f"{name:<{_COLUMN}}{value}"
