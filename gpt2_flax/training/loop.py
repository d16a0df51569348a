"""A training run, or several stages, from start or resume to the last step."""

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import partial

import jax

from gpt2_flax.checkpoint.step_meta import VALIDATION_LOSS
from gpt2_flax.checkpoint.store import CheckpointStore
from gpt2_flax.config.schema import Config
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.data.packing import row_layout
from gpt2_flax.errors import ExitCode, Stopped
from gpt2_flax.parallel.device_batches import device_batch, prefetch
from gpt2_flax.parallel.devices import Device
from gpt2_flax.processes.phases import Kind
from gpt2_flax.processes.watchdog import Watchdog
from gpt2_flax.training.agreement import agree_on_start, check_shared
from gpt2_flax.training.failures import naming_checkpoint, naming_savings, naming_stage
from gpt2_flax.training.metrics import OneStepLate, StepReport
from gpt2_flax.training.metrics_log import MetricsLog
from gpt2_flax.training.open_stage import Stage, check_same_run, open_stage
from gpt2_flax.training.policy import Best, SkippedSteps
from gpt2_flax.training.profiler import Profiler
from gpt2_flax.training.saving import Saver
from gpt2_flax.training.screen import Screen, open_screen
from gpt2_flax.training.signals import SLOW_DISK, StopRequest
from gpt2_flax.training.start import Progress, start_or_resume
from gpt2_flax.training.step import TrainState, make_growth, make_train_step, state_layout
from gpt2_flax.training.throughput import throughput
from gpt2_flax.training.validation import Validation


def train(
    *stages: Config,
    allow_change: Sequence[str] = (),
    profile_steps: int = 0,
    devices: Sequence[Device] | None = None,
    watchdog: Watchdog | None = None,
    deadline: float = math.inf,
    quiet: bool = False,
    on_step: Callable[[dict[str, float]], object] | None = None,
) -> None:
    """Train each stage to its `training.total_steps`, from the newest checkpoint of its run folder if there is one.

    All stages are checked before the first stage begins. A stage that has all its steps is skipped.

    Args:
        stages: configs in the order of training.
        allow_change: keys of the config that may differ from the run that is resumed.
        profile_steps: steps of each stage to trace; the trace goes to the `tensorboard` folder of the run.
        devices: devices to train on, by default all.
        watchdog: of several processes, the connection to the others.
        deadline: seconds of `time.monotonic` by which the run has stopped and saved.
        quiet: print nothing but warnings.
        on_step: called by process 0 with the record of each step.

    Raises:
        Stopped: TRY_AGAIN when the run was asked to stop and has saved.
        UserError: with codes as the sentence says.
    """
    watchdog = watchdog or Watchdog()
    names = [f"stage {number} of {len(stages)}: " if len(stages) > 1 else "" for number in range(1, len(stages) + 1)]
    mixtures: list[Mixture] = []
    opened: list[Stage] = []
    with contextlib.ExitStack() as stack:
        screen = stack.enter_context(open_screen(quiet, live=not watchdog.token))
        for name, config in zip(names, stages, strict=True):
            with naming_stage(name):
                mixtures.append(Mixture(config.data.datasets))
        agree_on_start(stages, mixtures, allow_change, deadline < math.inf, watchdog)
        for name, config, mixture in zip(names, stages, mixtures, strict=True):
            with naming_stage(name):
                opened.append(open_stage(config, mixture, [stage.config for stage in opened], devices))
        for name, stage in zip(names, opened, strict=True):
            with naming_stage(name):
                if watchdog.number == 0:
                    stack.enter_context(stage.run.removed_if_refused())
                    stage.run.create()
                check_shared(stage.run, watchdog)
                check_same_run(stage.config, stage.run, allow_change)
        stop, trained = stack.enter_context(StopRequest(watchdog, deadline)), False
        for name, stage in zip(names, opened, strict=True):
            with naming_stage(name):
                trained = _train_stage(stage, stop, watchdog, allow_change, name, profile_steps, screen, on_step)
                if stage is not opened[-1] and stop("start", "step"):
                    raise _stopped("its end", stage.config)
        if trained and watchdog.number == 0:
            from gpt2_flax.training.overview import next_command  # here, as in `run_steps`

            screen.say(next_command(opened[-1]))


def _train_stage(
    stage: Stage,
    stop: StopRequest,
    watchdog: Watchdog,
    allow_change: Sequence[str],
    name: str,
    profile_steps: int,
    screen: Screen,
    on_step: Callable[[dict[str, float]], object] | None,
) -> bool:
    """Train a stage; return whether it had a step to train."""
    config, training, run, leads = stage.config, stage.config.training, stage.run, jax.process_index() == 0
    trained = False
    with contextlib.ExitStack() as stack:
        if leads:
            stack.enter_context(run.lock())
        log = stack.enter_context(MetricsLog(run if leads else None, screen, on_step))
        screen.begin(name)

        def say(line: str) -> None:
            log.say(name + line)

        kept = (training.keep_checkpoints, training.keep_best, training.keep_every)
        store = stack.enter_context(CheckpointStore(run.checkpoints, *kept, say))
        stack.enter_context(jax.set_mesh(stage.mesh))
        stack.enter_context(watchdog.running(config.output))
        stack.enter_context(naming_savings(config, stage.mesh))
        with screen.doing("restoring the newest checkpoint" if store.steps() else "making the model"):
            progress, state = start_or_resume(stage, store, allow_change, say, watchdog)
        if leads:
            run.check_tokenizer(stage.mixture.tokenizer_folder, say)
            run.write_config(config, stage.mixture.tokenizer_folder)
        if state is not None:
            if leads:
                from gpt2_flax.training.loggers import open_loggers  # here, as in `run_steps`

                log.loggers = open_loggers(config, run, say)
            profiler = stack.enter_context(Profiler(profile_steps, run.tensorboard, progress.step, say))
            with naming_checkpoint(run):
                run_steps(stage, progress, state, store, log, profiler, stop, watchdog)
            trained = True
        elif progress.best.ends(training.patience):
            say(f"{config.output} has ended: {_no_better(config, progress.best)}")
        else:
            more = "" if name else "; to go on add training.total_steps=N --allow-change training.total_steps"
            say(f"{config.output} has all its {training.total_steps} steps{more}")
    if leads:  # here, because all metrics are on the disk now; also for a run that was killed in its report
        from gpt2_flax.report.page import report_at_end  # here, because only the end of a run needs it

        report_at_end(run, screen.say)
    return trained


def run_steps(
    stage: Stage,
    progress: Progress,
    state: TrainState,
    store: CheckpointStore,
    log: MetricsLog,
    profiler: Profiler,
    stop: StopRequest,
    watchdog: Watchdog,
) -> None:
    """Train from `progress` and `state` to the last step of a stage, and save.

    Raises:
        Stopped: TRY_AGAIN when `stop` asked to stop.
        UserError: DIVERGED when the numbers are not finite, DATA when a dataset is
            damaged, IO when a save that must succeed fails.
    """
    from gpt2_flax.training.overview import header, summary  # here, because one can read the loop without it

    config, mixture, mesh, phases = stage.config, stage.mixture, stage.mesh, watchdog.phases
    training, n_rows, total = config.training, config.data.global_batch_size, config.training.total_steps
    batches = mixture.batches(row_layout(config), training.seed, config.data.prompt_separator)
    validation = Validation(config, mixture, mesh, phases)
    if validation.without:
        log.say(f"no validation split, so no validation loss: {', '.join(validation.without)}")
    layout = state_layout(config, mesh)
    train_step = make_train_step(config, layout, mesh, progress.grown)
    speeds = throughput(config, mesh, mixture, batches)
    for line in header(stage, state, progress.step, speeds):
        log.say(line)
    report = StepReport(config, log, speeds, progress.step)
    skips, saver = SkippedSteps(config, log), Saver(stage, store, log, phases, stop)
    finished = OneStepLate(skips.check, report.finished)
    stop.first_save = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / jax.process_count() / SLOW_DISK

    def evaluate(stop: StopRequest | None) -> Progress:
        evaluations = validation.run(progress.step, state.model, report, stop)
        if not evaluations:
            return progress._replace(evaluated=evaluations is not None)
        return progress._replace(
            evaluated=True, best=progress.best.after(progress.step, report.figures[VALIDATION_LOSS])
        )

    if not progress.evaluated:
        progress = evaluate(stop)
        if not progress.evaluated:
            raise _stopped(f"step {progress.step}", config)
    if progress.best.ends(training.patience):
        log.say(f"stopped at step {progress.step}: {_no_better(config, progress.best)}")
        return
    first_sample, save_due = progress.samples_seen, False
    starts = range(first_sample, first_sample + (total - progress.step) * n_rows, n_rows)
    with contextlib.closing(prefetch(partial(device_batch, mesh, n_rows, batches.batch), starts)) as on_devices:
        for step in range(progress.step + 1, total + 1):
            if not progress.grown and step > config.growth_steps:
                finished.catch_up()
                phases.start()  # a program is compiled
                report.recompiling(step - 1)
                size = f"{config.model.n_layer} layers, {config.data.seq_length:,} tokens a row"
                log.say(f"step {step - 1:>7}  model grows to {size}")
                state, train_step = make_growth(config, layout)(state), make_train_step(config, layout, mesh)
                progress = progress._replace(grown=True)
            state, metrics = train_step(state, report.next_batch(on_devices))
            evaluation_due = step % training.evaluate_every == 0 or step == total
            progress = progress._replace(
                step=step, samples_seen=progress.samples_seen + n_rows, evaluated=not evaluation_due
            )
            finished.dispatched(step, progress.samples_seen, metrics)
            profiler.after(step, metrics)
            phases.step(step)
            store.poll()
            save_due |= step % training.save_every == 0
            ahead: list[Kind] = ["step"]
            if evaluation_due or step + 1 == total:
                ahead.append("evaluation")
            if save_due:
                ahead.append("save")
            stopping, ended = stop(*ahead), step == total
            if evaluation_due and (ended or not stopping):
                finished.catch_up()
                progress = evaluate(None if ended else stop)
                stopping = stopping or not progress.evaluated
                ended |= progress.best.ends(training.patience)
            last = ended or stopping
            if save_due or last:
                finished.catch_up()
                # While steps are being skipped the state is suspect: it must not displace older checkpoints.
                if last or skips.sound:
                    saver.save(state, progress, skips.total, report.figures, last, stopping)
                    save_due = False
            if ended:
                if step < total:
                    log.say(f"stopped at step {step}, saved: {_no_better(config, progress.best)}")
                for line in summary(stage, report, progress):
                    log.say(line)
                return
            if stopping:
                raise _stopped(f"step {step}", config)


def _stopped(where: str, config: Config) -> Stopped:
    return Stopped(ExitCode.TRY_AGAIN, f"stopped at {where}, saved", config.output, "run the same command to go on")


def _no_better(config: Config, best: Best) -> str:
    found = f"the best is {best.loss:.4f} at step {best.step}" if best.loss is not None else "none was finite"
    return f"no lower validation loss in {config.training.patience} evaluations, {found}"
