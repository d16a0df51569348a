"""How a run starts: what must hold before, and where its first state comes from."""

import contextlib
import operator
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.checkpoint.store import CheckpointStore
from gpt2_flax.config import Config, ModelConfig, config_keys, parse_config
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.parallel.device_batches import row_shards
from gpt2_flax.processes.watchdog import Watchdog
from gpt2_flax.progress import si
from gpt2_flax.training.agreement import agree_on_weights
from gpt2_flax.training.best import Best
from gpt2_flax.training.step import TrainState, initial_state, state_layout

# What may differ between the parts of a run without being asked for: it changes speed and reports, not the numbers.
FREE_TO_CHANGE = (
    "output",
    "init_from",
    "data.dataset",  # places; what lies there, and its shares, are compared by fingerprint
    "data.verify",
    "model.attention",
    "model.layers",
    "model.remat",
    "training.accumulation_steps",
    "training.deterministic",
    "training.log_every",
    "training.evaluate_every",
    "training.evaluation_batches",
    "training.save_every",
    "training.keep_checkpoints",
    "training.keep_best",
    "training.keep_every",
    "training.patience",
    "training.max_skipped_steps",
    "training.prompts",
    "training.sample_tokens",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
)


class Start(NamedTuple):
    """The state from which a run begins or resumes."""

    state: TrainState | None
    """None: the run has ended."""
    samples_seen: int = 0
    best: Best = Best()
    evaluated: bool = True
    """Whether the evaluation that was due at this step has been done."""


def start_or_resume(
    config: Config,
    mesh: Mesh,
    store: CheckpointStore,
    mixture: Mixture,
    allow_change: Sequence[str],
    say: Callable[[str], None],
    watchdog: Watchdog,
) -> Start:
    """Return where to start: from 1 the newest whole checkpoint of the run, 2 `init_from`, 3 random weights.

    Raises `UserError`: CONFIG when the checkpoint or `init_from` is of another model, config or data or not the same in
    all processes, IO when the disk is too full or the run has lost its checkpoints, and as `load_source`.
    """
    layout = state_layout(config, mesh)
    run = RunFolder(config.output)
    watchdog.agree({f"the checkpoints in {store.folder}": " ".join(map(str, store.steps())) or "none"})

    def read(step: int) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        meta = store.meta(step)
        if not run.has_config() and "config" in meta:
            _check_same(parse_config(meta["config"], f"checkpoint {step}"), config, run, allow_change)
        if "data.dataset" not in allow_change:
            _check_datasets(meta, mixture)
        return meta, store.restore(step, model=layout.model, opt_state=layout.opt_state)

    found = store.newest(read)
    if found is None:
        if (lost := run.lost_checkpoint()) is not None:
            fix = "bring the folder back, or choose another output to start anew"
            raise UserError(ExitCode.IO, f"the run has lost its checkpoints, the last was {lost}", store.folder, fix)
        _check_disk(config, layout, store)
        return Start(_initial_state(config, layout, mixture, say, watchdog))
    step, (meta, restored) = found
    best = Best(**meta["best"]) if "best" in meta else Best()
    if step >= config.training.total_steps or best.ends(config.training.patience):
        return Start(None, meta["samples_seen"], best)
    _check_disk(config, layout, store)
    say(f"resumed from step {step} of {config.output}{_repeated(config, step)}")
    count, skipped = (jax.device_put(jnp.int32(n), layout.step.sharding) for n in (step, meta.get("skipped", 0)))
    state = TrainState(restored["model"], restored["opt_state"], count, skipped)
    return Start(state, meta["samples_seen"], best, meta.get("evaluated", True))


def _initial_state(
    config: Config, layout: TrainState, mixture: Mixture, say: Callable[[str], None], watchdog: Watchdog
) -> TrainState:
    if config.init_from is None:
        say(f"starting from scratch with seed {config.training.seed}")
        return initial_state(config, layout)
    from gpt2_flax.checkpoint.source import load_source  # here: most starts need none of the readers

    try:
        source = load_source(Path(config.init_from))
    except UserError as error:
        raise UserError(error.exit_code, f"init_from: {error.what}", error.where, error.fix) from None
    check_fits(config, source.model)
    agree_on_weights(source.weights, watchdog)
    # A warning, not an error: the same ids may come from another kind of file, and some folders hold weights alone.
    with contextlib.suppress(UserError):
        if source.tokenizer().fingerprint != mixture.tokenizer_fingerprint:
            say(f"warning: {mixture.name} was not prepared with the tokenizer of {source.origin}: ids may differ")
    loaded = f"{len(source.weights)} parameter arrays, {sum(map(np.size, source.weights.values())):,} parameters"
    say(f"starting from {source.origin}: {loaded}; fresh optimizer and schedule")
    return initial_state(config, layout, source.weights)


def with_vocab_size(config: Config, mixture: Mixture) -> Config:
    has, wants = mixture.vocab_size, config.model.vocab_size
    if wants not in (None, has):
        what = f"model.vocab_size is {wants} but the dataset's vocabulary has {has} tokens"
        fix = "prepare the dataset with the model's tokenizer, or leave model.vocab_size out"
        raise UserError(ExitCode.CONFIG, what, mixture.name, fix)
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": has})})


def check_rows(config: Config, mesh: Mesh) -> None:
    shards, parts, n_rows = row_shards(mesh), config.training.accumulation_steps, config.data.global_batch_size
    if n_rows % (shards * parts):
        near = [count for count in (n_rows // (shards * parts), n_rows // (shards * parts) + 1) if count]
        what = f"data.global_batch_size {n_rows} cannot be shared by {shards} devices (mesh data x fsdp)"
        if parts > 1:
            what += f" in {parts} accumulation steps"
        fix = "take " + " or ".join(str(count * shards * parts) for count in near)
        raise UserError(ExitCode.CONFIG, what, "config", fix)


def check_fits(config: Config, model: ModelConfig) -> None:
    """Raises `UserError` (CONFIG) when a run of `config` cannot start from weights of `model`."""
    sizes = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
    for name in (*sizes, "layer_norm_epsilon", "tie_word_embeddings"):
        old, new = getattr(model, name), getattr(config.model, name)
        if old != new:
            old, new = (str(value).lower() for value in (old, new))  # as TOML has them
            what = f"model.{name} is {new} but {old} in init_from"
            raise UserError(ExitCode.CONFIG, what, config.init_from, f"set model.{name} = {old}")


def check_same_run(config: Config, run: RunFolder, allow_change: Sequence[str]) -> None:
    """Raise `UserError`: USAGE for an unknown key in `allow_change`, CONFIG when another key has changed."""
    for key in allow_change:
        if key not in config_keys():
            raise UserError(ExitCode.USAGE, f"unknown key {key}", "--allow-change", "give a key of the config")
    if run.last_checkpoint() is not None and run.has_config():
        _check_same(run.read_config(), config, run, allow_change)


def _check_same(before: Config, config: Config, run: RunFolder, allow_change: Sequence[str]) -> None:
    for key in config_keys():
        old, new = map(operator.attrgetter(key), (before, config))
        if old != new and key not in FREE_TO_CHANGE and key not in allow_change:
            what = f"{key} is {new} but the run has {old}"
            fix = f"change it back, choose another output, or add --allow-change {key}"
            raise UserError(ExitCode.CONFIG, what, run.path, fix)


def _check_disk(config: Config, layout: TrainState, store: CheckpointStore) -> None:
    # What would fill the disk hours from now is refused now. While one checkpoint is written no other is deleted yet.
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((layout.model, layout.opt_state)))
    keep = config.training.keep_checkpoints + config.training.keep_best
    needed = size * (keep + 1 - min(keep, len(store.steps())))
    free = shutil.disk_usage(store.folder).free
    if free < needed:
        what = f"{si(free)}B free on the disk but checkpoints need {si(needed)}B, {si(size)}B each"
        fix = "free some space, choose another output, or lower training.keep_checkpoints or training.keep_best"
        raise UserError(ExitCode.IO, what, config.output, fix)


def _repeated(config: Config, step: int) -> str:
    logged = RunFolder(config.output).last_step()
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
