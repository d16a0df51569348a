"""A training run from start or resume to its last step."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.checkpoint.source import load_source
from gpt2_flax.checkpoint.store import CheckpointStore
from gpt2_flax.config import Config, config_keys
from gpt2_flax.data.loader import Loader
from gpt2_flax.data.token_dataset import TokenDataset
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.inference.evaluate import Evaluation, evaluate
from gpt2_flax.parallel.feed import device_batch, prefetch, row_shards
from gpt2_flax.parallel.mesh import make_mesh
from gpt2_flax.progress import duration, si
from gpt2_flax.training.metrics import MetricsLog
from gpt2_flax.training.signals import StopRequest
from gpt2_flax.training.step import StepMetrics, TrainState, initial_state, make_train_step, state_layout

# What may differ between the parts of a run without being asked for: it changes speed and reports, not the numbers.
FREE_TO_CHANGE = (
    "output",
    "init_from",
    "data.dataset",  # moved; what it holds is compared by fingerprint
    "model.remat",
    "training.accumulation_steps",
    "training.log_every",
    "training.evaluate_every",
    "training.evaluation_batches",
    "training.save_every",
    "training.keep_checkpoints",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
)


def train(config: Config, allow_change: Sequence[str] = (), devices: Sequence[jax.Device] | None = None) -> None:
    """Trains until `training.total_steps`, resuming from the run folder's newest checkpoint if there is one.

    Raises `UserError`; with TRY_AGAIN when it was asked to stop and has saved.
    """
    dataset = TokenDataset(config.data.dataset)
    config = _with_vocab_size(config, dataset)
    mesh = make_mesh(config.mesh, devices)
    _check_rows(config, mesh)
    run, leads = RunFolder(config.output), jax.process_index() == 0
    if leads:
        run.create()
    with contextlib.ExitStack() as stack:
        if leads:
            stack.enter_context(run.lock())
        log = stack.enter_context(MetricsLog(run if leads else None))
        _check_same_run(config, run, dataset, allow_change)
        store = stack.enter_context(CheckpointStore(run.checkpoints, config.training.keep_checkpoints))
        stack.enter_context(jax.set_mesh(mesh))
        stop = stack.enter_context(StopRequest())
        state, samples_seen = _start(config, mesh, store, dataset, log.say)
        if leads:
            run.write_config(config, dataset.tokenizer_folder)
        _run(config, mesh, dataset, store, log, stop, state, samples_seen)


def _run(
    config: Config,
    mesh: Mesh,
    dataset: TokenDataset,
    store: CheckpointStore,
    log: MetricsLog,
    stop: StopRequest,
    state: TrainState,
    samples_seen: int,
) -> None:
    training, n_rows = config.training, config.data.global_batch_size
    total, first_step, first_sample = training.total_steps, int(state.step), samples_seen
    if first_step >= total:
        log.say(f"{config.output} has all its {total} steps; raise training.total_steps to go on")
        return
    loader = Loader(dataset.train, config.data.seq_length, training.seed)
    held_out = Loader(dataset.validation, config.data.seq_length, training.seed)
    train_step = make_train_step(config, state_layout(config, mesh), mesh)
    meta = {"model": config.model.model_dump(), "tokenizer_fingerprint": dataset.info.tokenizer_fingerprint}
    report = _Report(config, log, first_step)

    def make(step):
        start = first_sample + (step - first_step) * n_rows
        return device_batch(mesh, n_rows, lambda first, last: loader.batch(start + first, start + last))

    batches = prefetch(make, range(first_step, total))
    for step in range(first_step + 1, total + 1):
        batch = report.waiting_for(batches)
        state, metrics = train_step(state, batch)
        report.dispatched(step, metrics)
        samples_seen += n_rows
        stopping = stop(step)
        if step % training.evaluate_every == 0 or step == total:
            report.catch_up()
            report.evaluated(step, evaluate(state.model, held_out, mesh, n_rows, training.evaluation_batches))
        if step % training.save_every == 0 or step == total or stopping:
            report.catch_up()  # a state is only kept when its loss was finite
            store.save(step, state.model, state.opt_state, meta | {"step": step, "samples_seen": samples_seen})
        if stopping and step < total:
            batches.close()
            raise UserError(ExitCode.TRY_AGAIN, f"stopped at step {step}, saved", config.output, "run it again to go on")


class _Report:
    """Reads the numbers of a step one step late, so that the devices never wait for the host."""

    def __init__(self, config: Config, log: MetricsLog, first_step: int):
        self._config, self._log = config, log
        self._pending: tuple[int, StepMetrics] | None = None
        self._line_step, self._line_time, self._waited = first_step, time.perf_counter(), 0.0
        self._began = (first_step, time.perf_counter())

    def waiting_for(self, batches: Any) -> Any:
        before = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - before
        return batch

    def dispatched(self, step: int, metrics: StepMetrics) -> None:
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
        if step == self._began[0] + 1:
            now = time.perf_counter()
            self._log.say(f"first step after {duration(now - self._began[1])}, compilation included")
            self._began, self._line_time = (step, now), now
        if step % self._config.training.log_every == 0 or step == self._config.training.total_steps:
            self._write(step, metrics)

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        values = {
            "validation/loss": evaluation.loss,
            "validation/perplexity": evaluation.perplexity,
            "validation/bits_per_character": evaluation.bits_per_character,
            "validation/accuracy": evaluation.accuracy,
        }
        line = (
            f"step {step:>7}  validation loss {evaluation.loss:.4f}  perplexity {evaluation.perplexity:.2f}  "
            f"bits/character {evaluation.bits_per_character:.4f}  accuracy {evaluation.accuracy:.1%}"
        )
        self._log.write(step, values, line)
        self._line_step, self._line_time, self._waited = step, time.perf_counter(), 0.0

    def _write(self, step: int, metrics: StepMetrics) -> None:
        now, data, total = time.perf_counter(), self._config.data, self._config.training.total_steps
        steps = max(1, step - self._line_step)
        tokens_per_second = steps * data.global_batch_size * data.seq_length / max(1e-9, now - self._line_time)
        per_step = (now - self._began[1]) / max(1, step - self._began[0])
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
            f"grad {metrics.grad_norm:.2f}  {si(tokens_per_second)}tokens/s  ETA {duration((total - step) * per_step)}"
        )
        self._log.write(step, values, line)
        self._line_step, self._line_time, self._waited = step, now, 0.0


def _start(
    config: Config, mesh: Mesh, store: CheckpointStore, dataset: TokenDataset, say: Callable[[str], None]
) -> tuple[TrainState, int]:
    """1 the run's own newest checkpoint, 2 `init_from`, 3 scratch. Returns the state and the samples it has seen."""
    layout = state_layout(config, mesh)
    step = store.newest_whole(say)
    if step is not None:
        meta = store.meta(step)
        _check_tokenizer(meta["tokenizer_fingerprint"], dataset)
        restored = store.restore(step, model=layout.model, opt_state=layout.opt_state)
        say(f"resumed from step {step} of {config.output}")
        count = jax.device_put(jax.numpy.int32(step), layout.step.sharding)
        return TrainState(restored["model"], restored["opt_state"], count), meta["samples_seen"]
    if config.init_from is None:
        say(f"starting from scratch with seed {config.training.seed}")
        return initial_state(config, layout), 0
    source = load_source(Path(config.init_from))
    _check_fits(config, source.model)
    say(f"starting from {source.origin}: {len(source.weights)} parameter arrays, fresh optimizer")
    return initial_state(config, layout, source.weights), 0


def _with_vocab_size(config: Config, dataset: TokenDataset) -> Config:
    has, wants = dataset.info.vocab_size, config.model.vocab_size
    if wants not in (None, has):
        what = f"model.vocab_size is {wants} but the dataset's vocabulary has {has} tokens"
        fix = "prepare the dataset with the model's tokenizer, or leave model.vocab_size out"
        raise UserError(ExitCode.CONFIG, what, dataset.folder, fix)
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": has})})


def _check_rows(config: Config, mesh: Mesh) -> None:
    shards, parts, n_rows = row_shards(mesh), config.training.accumulation_steps, config.data.global_batch_size
    if n_rows % (shards * parts):
        near = [count for count in (n_rows // (shards * parts), n_rows // (shards * parts) + 1) if count]
        what = f"data.global_batch_size {n_rows} cannot be shared by {shards} devices (mesh data x fsdp)"
        if parts > 1:
            what += f" in {parts} accumulation steps"
        fix = "take " + " or ".join(str(count * shards * parts) for count in near)
        raise UserError(ExitCode.CONFIG, what, "config", fix)


def _check_same_run(config: Config, run: RunFolder, dataset: TokenDataset, allow_change: Sequence[str]) -> None:
    keys = config_keys()
    for key in allow_change:
        if key not in keys:
            raise UserError(ExitCode.USAGE, f"unknown key {key}", "--allow-change", "give a key of the config")
    before = run.read_config()
    if before is None or not run.checkpoints.is_dir() or not any(run.checkpoints.iterdir()):
        return
    for key in keys:
        old, new = _value(before, key), _value(config, key)
        if old != new and key not in FREE_TO_CHANGE and key not in allow_change:
            what = f"{key} is {new} but the run has {old}"
            fix = f"change it back, choose another output, or add --allow-change {key}"
            raise UserError(ExitCode.CONFIG, what, run.path, fix)


def _check_tokenizer(fingerprint: str, dataset: TokenDataset) -> None:
    if fingerprint != dataset.info.tokenizer_fingerprint:
        what = "the dataset was prepared with another tokenizer than the run's"
        raise UserError(ExitCode.CONFIG, what, dataset.folder, "give the dataset that the run was started with")


def _check_fits(config: Config, model: Any) -> None:
    for name in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd", "layer_norm_epsilon"):
        old, new = getattr(model, name), getattr(config.model, name)
        if old != new:
            what = f"model.{name} is {new} but {old} in init_from"
            raise UserError(ExitCode.CONFIG, what, config.init_from, f"set model.{name} = {old}")


def _value(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value
