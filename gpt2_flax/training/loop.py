"""A training run, or several stages, from start or resume to the last step."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from gpt2_flax.checkpoint.run_folder import RunFolder, with_absolute_paths
from gpt2_flax.checkpoint.step_meta import VALIDATION_LOSS
from gpt2_flax.checkpoint.store import CheckpointStore
from gpt2_flax.config import Config
from gpt2_flax.data.inspect import dataset_tokenizer
from gpt2_flax.data.loader import Loader
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.errors import ExitCode, UserError, io_error
from gpt2_flax.inference.evaluate import evaluate
from gpt2_flax.inference.evaluation import Evaluation
from gpt2_flax.memory import out_of_memory
from gpt2_flax.model.gpt2 import GPT2
from gpt2_flax.parallel.auto_mesh import choose_mesh
from gpt2_flax.parallel.device_batches import device_batch, prefetch, row_shards
from gpt2_flax.parallel.mesh import make_mesh
from gpt2_flax.processes.phases import Kind
from gpt2_flax.processes.watchdog import Watchdog
from gpt2_flax.training.agreement import agree_on_start, check_shared
from gpt2_flax.training.best import Best
from gpt2_flax.training.choices import choices
from gpt2_flax.training.metrics import MetricsLog, StepReport
from gpt2_flax.training.profiler import Profiler
from gpt2_flax.training.samples import Samples, check_prompts
from gpt2_flax.training.signals import SLOW_DISK, StopRequest
from gpt2_flax.training.start import (
    Start,
    check_fits,
    check_rows,
    check_same_run,
    start_or_resume,
    with_vocab_size,
)
from gpt2_flax.training.step import TrainState, all_finite, make_train_step, state_layout
from gpt2_flax.training.throughput import throughput


class _Stage(NamedTuple):
    """A stage that was checked."""

    config: Config
    mixture: Mixture
    mesh: Mesh
    chosen: Mapping[str, str]
    """What was chosen for the model and its devices, and why, by name."""


def train(
    *stages: Config,
    allow_change: Sequence[str] = (),
    profile_steps: int = 0,
    devices: Sequence[jax.Device] | None = None,
    watchdog: Watchdog | None = None,
    deadline: float = math.inf,
) -> None:
    """Trains each stage until its `training.total_steps`, from the newest checkpoint of its run folder if there is one.

    All are checked before the first begins, and those that have all their steps are passed over. A trace of
    `profile_steps` steps of each goes to the `tensorboard` folder of its run. Several processes bring a `watchdog`.
    By `deadline`, in seconds of `time.monotonic`, it has stopped and saved.
    Raises `UserError`; with TRY_AGAIN when it was asked to stop and has saved.
    """
    watchdog = watchdog or Watchdog()
    names = [f"stage {number} of {len(stages)}: " if len(stages) > 1 else "" for number in range(1, len(stages) + 1)]
    mixtures, checked = [], []
    for name, config in zip(names, stages, strict=True):
        with _naming(name):
            mixtures.append(Mixture(config.data.datasets))
    agree_on_start(stages, mixtures, allow_change, deadline < math.inf, watchdog)
    for name, config, mixture in zip(names, stages, mixtures, strict=True):
        with _naming(name):
            checked.append(_check(config, mixture, [stage.config for stage in checked], devices))
    with contextlib.ExitStack() as stack:
        for name, stage in zip(names, checked, strict=True):
            with _naming(name):
                run = RunFolder(stage.config.output)
                if watchdog.number == 0:
                    stack.enter_context(run.removed_if_refused())
                    run.create()
                check_shared(run, watchdog)
                check_same_run(stage.config, run, allow_change)
        stop = stack.enter_context(StopRequest(watchdog, deadline))
        for number, name in enumerate(names, 1):
            with _naming(name):
                _train(checked[number - 1], stop, watchdog, allow_change, name, profile_steps)
                if number < len(stages) and stop("start", "step"):
                    output, fix = stages[number - 1].output, "run the same command to go on"
                    raise UserError(ExitCode.TRY_AGAIN, "stopped at its end, saved", output, fix)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(error.exit_code, name + error.what, error.where, error.fix) from error


@contextlib.contextmanager
def _naming_checkpoint(run: RunFolder) -> Iterator[None]:
    """Adds to what a disk has ended where the run resumes."""
    try:
        yield
    except (OSError, UserError) as error:
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            error = io_error(error, error.filename or run.path)
        if not isinstance(error, UserError) or error.exit_code != ExitCode.IO:
            raise
        step = run.last_checkpoint()
        resumes = "it starts from its beginning" if step is None else f"it resumes from step {step}"
        raise UserError(error.exit_code, error.what, error.where, f"{error.fix}: {resumes}") from error


@contextlib.contextmanager
def _naming_savings(config: Config, mesh: Mesh) -> Iterator[None]:
    """Turns an error of memory that is too small into `UserError` with the cheapest changes that help."""
    try:
        yield
    except Exception as error:
        rows, parts, changes = config.data.global_batch_size, config.training.accumulation_steps, []
        if config.model.remat != "full":
            changes.append("model.remat=full")
        if rows % (2 * parts * row_shards(mesh)) == 0:
            changes.append(f"training.accumulation_steps={2 * parts}")
        if mesh.shape["fsdp"] * mesh.shape["tensor"] < mesh.size:
            changes.append(f"mesh.fsdp={mesh.size // mesh.shape['tensor']}")
        changes.append(f"data.global_batch_size below {rows}")
        fix = f"add these, one after another until it fits: {', '.join(changes)}"
        failure = out_of_memory(error, config.output, fix)
        if failure is None:
            raise
        raise failure from error


def _check(config: Config, mixture: Mixture, before: Sequence[Config], devices: Sequence[jax.Device] | None) -> _Stage:
    """What can be known of a stage without training those before it, or its run folder."""
    config = with_vocab_size(config, mixture)
    sizes, why = choose_mesh(config, devices or jax.devices())
    mesh = make_mesh(sizes, devices)
    chosen = choices(config, mesh)
    if mesh.size > 1:
        chosen = {"mesh": f"{' x '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}: {why}"} | chosen
    check_rows(config, mesh)
    check_prompts(config, mixture)
    for stage in before:
        if stage.output == config.init_from:
            check_fits(config, stage.model)
    for dataset in mixture.datasets.values():
        dataset_tokenizer(dataset)
    mixture.verify(config.data.verify)
    return _Stage(config, mixture, mesh, chosen)


def _train(
    stage: _Stage, stop: StopRequest, watchdog: Watchdog, allow_change: Sequence[str], name: str, profile_steps: int
) -> None:
    config, mixture, mesh = stage.config, stage.mixture, stage.mesh
    run, leads, total = RunFolder(config.output), jax.process_index() == 0, config.training.total_steps
    with contextlib.ExitStack() as stack:
        if leads:
            stack.enter_context(run.lock())
        log = stack.enter_context(MetricsLog(run if leads else None))
        kept = (config.training.keep_checkpoints, config.training.keep_best, config.training.keep_every)
        store = stack.enter_context(CheckpointStore(run.checkpoints, *kept, lambda line: log.say(name + line)))
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(watchdog.running(config.output))
        stack.enter_context(_naming_savings(config, mesh))

        def say(line: str) -> None:
            log.say(name + line)

        start = start_or_resume(config, mesh, store, mixture, allow_change, say, watchdog)
        if leads:
            run.check_tokenizer(mixture.tokenizer_folder, say)
            run.write_config(config, mixture.tokenizer_folder)
        if start.state is None and start.best.ends(config.training.patience):
            say(f"{config.output} has ended: {_no_better(config, start.best)}")
        elif start.state is None:
            more = "" if name else "; to go on add training.total_steps=N --allow-change training.total_steps"
            say(f"{config.output} has all its {total} steps{more}")
        else:
            for what, choice in stage.chosen.items():
                say(f"{what} {choice}")
            profiler = stack.enter_context(Profiler(profile_steps, run.tensorboard, int(start.state.step), say))
            with _naming_checkpoint(run):
                _run(stage, store, log, profiler, stop, watchdog, start)


def _run(
    stage: _Stage,
    store: CheckpointStore,
    log: MetricsLog,
    profiler: Profiler,
    stop: StopRequest,
    watchdog: Watchdog,
    start: Start,
) -> None:
    config, mixture, mesh = stage.config, stage.mixture, stage.mesh
    training, n_rows = config.training, config.data.global_batch_size
    state, best, samples_seen = start.state, start.best, start.samples_seen
    total, first_step, first_sample = training.total_steps, int(state.step), samples_seen
    packing, across = config.data.packing, config.model.attend_across_documents
    loader = mixture.loader(config.data.seq_length, training.seed, packing, across)
    held_out = {
        folder: Loader(dataset.validation, config.data.seq_length, 0, packing, across)
        for folder, dataset in mixture.datasets.items()
        if dataset.validation.n_documents
    }
    if without := ", ".join(folder for folder in mixture.datasets if folder not in held_out):
        log.say(f"no validation split, so no validation loss: {without}")
    train_step = make_train_step(config, state_layout(config, mesh), mesh)
    hardware = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    meta = {"model": config.model.model_dump(), "config": with_absolute_paths(config).model_dump()}
    meta |= {"hardware": hardware, **mixture.fingerprints()}
    report = StepReport(config, log, throughput(config, mesh, mixture, loader), first_step, first_sample)
    stop.first_save = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / jax.process_count() / SLOW_DISK
    samples, save_due = Samples(config, mixture.tokenizer_folder), False

    def make(step):
        start = first_sample + (step - first_step) * n_rows
        return device_batch(mesh, n_rows, lambda first, last: loader.batch(start + first, start + last))

    def evaluate_at(step: int, stop: StopRequest | None) -> bool:
        """Returns whether the evaluation has come to its end."""
        nonlocal best
        with watchdog.phases.during("evaluation", step):
            evaluations = _evaluate(state.model, held_out, mesh, config, watchdog, stop)
            mixture.check_unchanged()
            if evaluations is not None:
                report.evaluated(step, evaluations, samples.texts(state.model))
                if evaluations:
                    best = best.after(step, report.figures[VALIDATION_LOSS])
        return evaluations is not None

    if not start.evaluated and not evaluate_at(first_step, stop):
        raise _stopped(first_step, config)
    if best.ends(training.patience):
        log.say(f"stopped at step {first_step}: {_no_better(config, best)}")
        return
    with contextlib.closing(prefetch(make, range(first_step, total))) as batches:
        for step in range(first_step + 1, total + 1):
            batch = report.next_batch(batches)
            state, metrics = train_step(state, batch)
            report.dispatched(step, metrics)
            profiler.after(step, metrics)
            watchdog.phases.step(step)
            store.poll()
            samples_seen += n_rows
            ended = step == total
            evaluation_due = step % training.evaluate_every == 0 or ended
            save_due |= step % training.save_every == 0
            ahead: list[Kind] = ["evaluation"] * (evaluation_due or step + 1 == total) + ["save"] * save_due
            stopping, evaluated = stop("step", *ahead), not evaluation_due
            if evaluation_due and (not stopping or ended):
                report.catch_up()
                evaluated = evaluate_at(step, None if ended else stop)
                stopping = stopping or not evaluated
                ended |= best.ends(training.patience)
            last = ended or stopping
            if save_due or last:
                report.catch_up()
                # Steps may be skipped for the state's sake: as long as they are, older states are not given up for it.
                if last or not report.skipped_in_a_row:
                    so_far = {"step": step, "samples_seen": samples_seen, "skipped": report.skipped}
                    figures = {name: value for name, value in report.figures.items() if math.isfinite(value)}
                    so_far |= {"metrics": figures, "best": best._asdict(), "evaluated": evaluated}
                    with watchdog.phases.during("save", step):
                        mixture.wait_until_verified(patience=0 if stopping else 10)
                        mixture.check_unchanged()
                        _save(store, log, state, meta | so_far, config.output)
                        if last or stop.measures_save:
                            log.committed(store.seal(must=last))  # now, before anybody reads that it is saved
                    save_due = False
            if ended:
                if step < total:
                    log.say(f"stopped at step {step}, saved: {_no_better(config, best)}")
                return
            if stopping:
                raise _stopped(step, config)


def _stopped(step: int, config: Config) -> UserError:
    return UserError(
        ExitCode.TRY_AGAIN, f"stopped at step {step}, saved", config.output, "run the same command to go on"
    )


def _no_better(config: Config, best: Best) -> str:
    found = f"the best is {best.loss:.4f} at step {best.step}" if best.loss is not None else "none was finite"
    return f"no lower validation loss in {config.training.patience} evaluations, {found}"


def _evaluate(
    model: GPT2,
    held_out: Mapping[str, Loader],
    mesh: Mesh,
    config: Config,
    watchdog: Watchdog,
    stop: StopRequest | None,
) -> dict[str, Evaluation] | None:
    """Returns the figures of each split, None when `stop` has said so before the end."""
    n_rows, n_batches = config.data.global_batch_size, config.training.evaluation_batches

    def after_batch(_: int) -> None:
        watchdog.phases.progress()
        if stop is not None and stop():
            raise _Stopped

    try:
        return {
            folder: evaluate(model, split, mesh, n_rows, n_batches, after_batch) for folder, split in held_out.items()
        }
    except _Stopped:
        return None


class _Stopped(Exception):
    pass


def _save(store: CheckpointStore, log: MetricsLog, state: TrainState, meta: dict[str, Any], output: str) -> None:
    step = meta["step"]
    if not jax.device_get(all_finite(state)):
        fix = "lower optimizer.learning_rate or raise optimizer.warmup; the newest checkpoint is from before"
        raise UserError(ExitCode.DIVERGED, f"parameters are not finite after step {step}", output, fix)
    log.committed(store.seal())
    store.save(step, state.model, state.opt_state, meta)
