"""The state from which a stage begins or resumes."""

import contextlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.checkpoint.store import CheckpointStore
from gpt2_flax.config.parse import parse_config
from gpt2_flax.config.schema import Config
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.folders import model_place
from gpt2_flax.processes.watchdog import Watchdog
from gpt2_flax.progress import si
from gpt2_flax.training.agreement import agree_on_weights
from gpt2_flax.training.failures import naming_stage
from gpt2_flax.training.open_stage import Stage, check_fits, check_same_config
from gpt2_flax.training.policy import Best
from gpt2_flax.training.step import TrainState, initial_state, state_layout

if TYPE_CHECKING:
    from gpt2_flax.checkpoint.source import Source


class Progress(NamedTuple):
    """How far a run is: what the host knows beside the arrays of `TrainState`."""

    step: int = 0
    samples_seen: int = 0
    best: Best = Best()
    evaluated: bool = True
    """False when the evaluation that is due at `step` must still run."""
    grown: bool = True
    """False before the growth of a model, see `training.growth`."""


def start_or_resume(
    stage: Stage, store: CheckpointStore, allow_change: Sequence[str], say: Callable[[str], None], watchdog: Watchdog
) -> tuple[Progress, TrainState | None]:
    """Return where a stage starts: its newest whole checkpoint, else the weights of `init_from`, else random weights.

    The state is None when the stage has no step left.

    Args:
        stage: the stage, on its mesh.
        store: checkpoints of the run.
        allow_change: keys that may differ from the config of the run.
        say: prints a line.
        watchdog: compares the processes of the run.

    Raises:
        UserError: CONFIG when the checkpoint or `init_from` has another model, config or data, or differs between
            processes; IO when the disk is too full or the run has lost its checkpoints; and as `load_source`.
    """
    config, run = stage.config, stage.run
    layout = state_layout(config, stage.mesh)
    watchdog.agree({f"the checkpoints in {store.folder}": " ".join(map(str, store.steps())) or "none"})

    def read(step: int) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        meta = store.meta(step)
        if run.valid_config() is None and "config" in meta:
            check_same_config(parse_config(meta["config"], f"checkpoint {step}"), config, run, allow_change)
        if "data.dataset" not in allow_change:
            _check_datasets(meta, stage.mixture)
        return meta, store.restore(step, model=layout.model, opt_state=layout.opt_state)

    found = store.newest(read)
    if found is None:
        if (lost := run.lost_checkpoint()) is not None:
            fix = "bring the folder back, or choose another output to start anew"
            raise UserError(ExitCode.IO, f"the run has lost its checkpoints, the last was {lost}", store.folder, fix)
        _check_disk(config, layout, store)
        return Progress(grown=not config.growth_steps), _initial_state(stage, layout, say, watchdog)
    step, (meta, restored) = found
    best = Best(**meta["best"]) if "best" in meta else Best()
    progress = Progress(step, meta["samples_seen"], best, meta.get("evaluated", True), meta.get("grown", True))
    if step >= config.training.total_steps or best.ends(config.training.patience):
        return progress, None
    _check_disk(config, layout, store)
    say(f"resumed from step {step} of {config.output}{_repeated(run, step)}")
    count, skipped = (jax.device_put(jnp.int32(n), layout.step.sharding) for n in (step, meta.get("skipped", 0)))
    return progress, TrainState(restored["model"], restored["opt_state"], count, skipped)


def _initial_state(stage: Stage, layout: TrainState, say: Callable[[str], None], watchdog: Watchdog) -> TrainState:
    config = stage.config
    if config.init_from is None:
        say(f"starting from scratch with seed {config.training.seed}")
        return initial_state(config, layout)
    from gpt2_flax.checkpoint.source import load_source  # readers of all formats: most runs need none

    with naming_stage("init_from: "):
        source = load_source(model_place(config.init_from, guess=False))
    check_fits(config, source.model)
    agree_on_weights(source.weights, watchdog)
    _warn_of_tokenizer(source, stage.mixture, say)
    loaded = f"{len(source.weights)} parameter arrays, {sum(map(np.size, source.weights.values())):,} parameters"
    say(f"starting from {source.origin}: {loaded}; fresh optimizer and schedule")
    return initial_state(config, layout, source.weights)


def _check_disk(config: Config, layout: TrainState, store: CheckpointStore) -> None:
    # Refuse now what would fill the disk hours later. During a save no older checkpoint is deleted yet.
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((layout.model, layout.opt_state)))
    keep = config.training.keep_checkpoints + config.training.keep_best
    needed = size * (keep + 1 - min(keep, len(store.steps())))
    free = shutil.disk_usage(store.folder).free
    if free < needed:
        what = f"{si(free)}B free on the disk but checkpoints need {si(needed)}B, {si(size)}B each"
        fix = "free some space, choose another output, or lower training.keep_checkpoints or training.keep_best"
        raise UserError(ExitCode.IO, what, config.output, fix)


def _repeated(run: RunFolder, step: int) -> str:
    logged = run.last_step()
    again = 0 if logged is None else logged - step
    return f" ({again} step{'s' * (again > 1)} repeated)" if again > 0 else ""


def _check_datasets(meta: Mapping[str, Any], mixture: Mixture) -> None:
    differences = {
        "tokenizer_fingerprint": "the dataset was prepared with another tokenizer than the run's",
        "tokens_fingerprint": "the dataset holds other training tokens, or shares of them, than the run's",
    }
    for name, what in differences.items():
        if meta.get(name) != mixture.fingerprints()[name]:
            fix = "give the same dataset, choose another output, or add --allow-change data.dataset"
            raise UserError(ExitCode.CONFIG, what, mixture.name, fix)


def _warn_of_tokenizer(source: "Source", mixture: Mixture, say: Callable[[str], None]) -> None:
    # Not an error: another kind of file may give the same ids, and some folders hold only weights.
    with contextlib.suppress(UserError):
        if source.tokenizer().fingerprint != mixture.tokenizer_fingerprint:
            say(f"warning: {mixture.name} was not prepared with the tokenizer of {source.origin}: ids may differ")
