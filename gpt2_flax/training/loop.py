"""A training run from start or resume to its last step."""

import contextlib
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.checkpoint.store import CheckpointStore
from gpt2_flax.config import Config
from gpt2_flax.data.loader import Loader
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.inference.evaluate import evaluate
from gpt2_flax.parallel.feed import device_batch, prefetch
from gpt2_flax.parallel.mesh import make_mesh
from gpt2_flax.training.metrics import MetricsLog, StepReport
from gpt2_flax.training.signals import StopRequest
from gpt2_flax.training.start import check_rows, check_same_run, start_or_resume, with_vocab_size
from gpt2_flax.training.step import TrainState, make_train_step, state_layout


def train(config: Config, allow_change: Sequence[str] = (), devices: Sequence[jax.Device] | None = None) -> None:
    """Trains until `training.total_steps`, resuming from the run folder's newest checkpoint if there is one.

    Raises `UserError`; with TRY_AGAIN when it was asked to stop and has saved.
    """
    mixture = Mixture(config.data.datasets)
    config = with_vocab_size(config, mixture)
    mesh = make_mesh(config.mesh, devices)
    check_rows(config, mesh)
    run, leads = RunFolder(config.output), jax.process_index() == 0
    if leads:
        run.create()
    with contextlib.ExitStack() as stack:
        if leads:
            stack.enter_context(run.lock())
        check_same_run(config, run, allow_change)
        log = stack.enter_context(MetricsLog(run if leads else None))
        store = stack.enter_context(CheckpointStore(run.checkpoints, config.training.keep_checkpoints))
        stack.enter_context(jax.set_mesh(mesh))
        stop = stack.enter_context(StopRequest())
        state, samples_seen = start_or_resume(config, mesh, store, mixture, allow_change, log.say)
        if leads:
            run.write_config(config, mixture.tokenizer_folder)
        _run(config, mesh, mixture, store, log, stop, state, samples_seen)


def _run(
    config: Config,
    mesh: Mesh,
    mixture: Mixture,
    store: CheckpointStore,
    log: MetricsLog,
    stop: StopRequest,
    state: TrainState,
    samples_seen: int,
) -> None:
    training, n_rows = config.training, config.data.global_batch_size
    total, first_step, first_sample = training.total_steps, int(state.step), samples_seen
    if first_step >= total:
        more = "training.total_steps=N --allow-change training.total_steps"
        log.say(f"{config.output} has all its {total} steps; to go on add {more}")
        return
    loader = mixture.loader(config.data.seq_length, training.seed)
    held_out = {
        folder: Loader(dataset.validation, config.data.seq_length, seed=0)
        for folder, dataset in mixture.datasets.items()
    }
    train_step = make_train_step(config, state_layout(config, mesh), mesh)
    meta = {"model": config.model.model_dump(), **mixture.fingerprints()}
    report = StepReport(config, log, first_step)

    def make(step):
        start = first_sample + (step - first_step) * n_rows
        return device_batch(mesh, n_rows, lambda first, last: loader.batch(start + first, start + last))

    batches = prefetch(make, range(first_step, total))
    for step in range(first_step + 1, total + 1):
        batch = report.next_batch(batches)
        state, metrics = train_step(state, batch)
        report.dispatched(step, metrics)
        samples_seen += n_rows
        stopping = stop(step)
        if (step % training.evaluate_every == 0 and not stopping) or step == total:
            report.catch_up()
            evaluations = {
                folder: evaluate(state.model, split, mesh, n_rows, training.evaluation_batches)
                for folder, split in held_out.items()
            }
            report.evaluated(step, evaluations)
        if step % training.save_every == 0 or step == total or stopping:
            report.catch_up()  # a state is only kept when its loss was finite
            store.save(step, state.model, state.opt_state, meta | {"step": step, "samples_seen": samples_seen})
        if stopping and step < total:
            batches.close()
            what = f"stopped at step {step}, saved"
            raise UserError(ExitCode.TRY_AGAIN, what, config.output, "run the same command to go on")
