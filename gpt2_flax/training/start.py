"""How a run starts: what must hold before, and where its first state comes from."""

import contextlib
import operator
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.checkpoint.source import Source, load_source
from gpt2_flax.checkpoint.store import CheckpointStore
from gpt2_flax.config import Config, ModelConfig, config_keys
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.parallel.feed import row_shards
from gpt2_flax.parallel.watchdog import Watchdog
from gpt2_flax.progress import si
from gpt2_flax.training.agreement import agree_on_weights
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
    "training.max_skipped_steps",
    "training.prompts",
    "training.sample_tokens",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
)


def newest_step(
    store: CheckpointStore,
    mixture: Mixture,
    allow_change: Sequence[str],
    say: Callable[[str], None],
    agree: Callable[[Mapping[str, str]], None],
) -> int | None:
    """Returns the step that the run goes on from, None for a new one.

    Raises `UserError`: IO when there are only damaged checkpoints, CONFIG when they saw other data than `mixture`,
    and as `agree`, see `CheckpointStore.newest_whole`.
    """
    step = store.newest_whole(say, agree)
    if step is not None and "data.dataset" not in allow_change:
        _check_datasets(store.meta(step), mixture)
    return step


def start_or_resume(
    config: Config,
    mesh: Mesh,
    store: CheckpointStore,
    step: int | None,
    mixture: Mixture,
    say: Callable[[str], None],
    watchdog: Watchdog,
) -> tuple[TrainState, int]:
    """1 the run's own checkpoint `step`, 2 `init_from`, 3 scratch. Returns the state and the samples it has seen.

    Raises `UserError`: CONFIG when the checkpoint or `init_from` is of another model or not the same in all processes,
    IO when the disk is too full, and as `load_source`.
    """
    layout = state_layout(config, mesh)
    _check_disk(config, layout, store)
    if step is not None:
        meta = store.meta(step)
        restored = store.restore(step, model=layout.model, opt_state=layout.opt_state)
        say(f"resumed from step {step} of {config.output}{_repeated(config, step)}")
        count, skipped = (jax.device_put(jnp.int32(n), layout.step.sharding) for n in (step, meta.get("skipped", 0)))
        return TrainState(restored["model"], restored["opt_state"], count, skipped), meta["samples_seen"]
    if config.init_from is None:
        say(f"starting from scratch with seed {config.training.seed}")
        return initial_state(config, layout), 0
    try:
        source = load_source(Path(config.init_from))
    except UserError as error:
        raise UserError(error.exit_code, f"init_from: {error.what}", error.where, error.fix) from None
    check_fits(config, source.model)
    agree_on_weights(source.weights, watchdog)
    _warn_of_tokenizer(source, mixture, say)
    loaded = f"{len(source.weights)} parameter arrays, {sum(map(np.size, source.weights.values())):,} parameters"
    say(f"starting from {source.origin}: {loaded}; fresh optimizer and schedule")
    return initial_state(config, layout, source.weights), 0


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
    keys = config_keys()
    for key in allow_change:
        if key not in keys:
            raise UserError(ExitCode.USAGE, f"unknown key {key}", "--allow-change", "give a key of the config")
    before = run.read_config()
    if before is None or not run.checkpoints.is_dir() or not any(run.checkpoints.iterdir()):
        return
    for key in keys:
        old, new = map(operator.attrgetter(key), (before, config))
        if old != new and key not in FREE_TO_CHANGE and key not in allow_change:
            what = f"{key} is {new} but the run has {old}"
            fix = f"change it back, choose another output, or add --allow-change {key}"
            raise UserError(ExitCode.CONFIG, what, run.path, fix)


def _check_disk(config: Config, layout: TrainState, store: CheckpointStore) -> None:
    # What would fill the disk hours from now is refused now. While one checkpoint is written no other is deleted yet.
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((layout.model, layout.opt_state)))
    keep = config.training.keep_checkpoints
    needed = size * (keep + 1 - min(keep, len(store.steps())))
    free = shutil.disk_usage(store.folder).free
    if free < needed:
        what = f"{si(free)}B free on the disk but checkpoints need {si(needed)}B, {si(size)}B each"
        fix = "free some space, choose another output, or lower training.keep_checkpoints"
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


def _warn_of_tokenizer(source: Source, mixture: Mixture, say: Callable[[str], None]) -> None:
    # No error: the same ids may come from another kind of file, and some folders hold weights alone.
    with contextlib.suppress(UserError):
        if source.tokenizer().fingerprint != mixture.tokenizer_fingerprint:
            say(f"warning: {mixture.name} was not prepared with the tokenizer of {source.origin}: ids may differ")
