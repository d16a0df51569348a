"""What must hold before a stage of training begins; all that can be refused is refused here, before any step."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh

from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.config.model import ModelConfig
from gpt2_flax.config.parse import config_keys, config_values
from gpt2_flax.config.schema import Config, ResolvedConfig
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.parallel.auto_mesh import choose_mesh
from gpt2_flax.parallel.device_batches import row_shards
from gpt2_flax.parallel.devices import Device
from gpt2_flax.parallel.mesh import make_mesh
from gpt2_flax.training.choices import choices
from gpt2_flax.training.samples import check_prompts

# Keys that may change between the starts of a run without --allow-change: they change speed and reports, not numbers.
FREE_TO_CHANGE = (
    "output",
    "init_from",
    "data.dataset",  # folders; the tokens and their shares are compared by fingerprint
    "data.verify",
    "model.attention",
    "model.layers",
    "model.remat",
    "training.accumulation_steps",
    "training.deterministic",
    "training.log_every",
    "training.logging",
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


class Stage(NamedTuple):
    """A stage that passed all checks."""

    config: ResolvedConfig
    mixture: Mixture
    mesh: Mesh
    choices: Mapping[str, str]
    """What training chose for the model and its devices, and why, by name."""

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.config.output)


def open_stage(
    config: Config, mixture: Mixture, earlier: Sequence[ResolvedConfig], devices: Sequence[Device] | None = None
) -> Stage:
    """Check all that can be known of a stage before earlier stages are trained and before its run folder is read.

    Args:
        config: config of the stage.
        mixture: opened datasets of the stage.
        earlier: configs of the stages before.
        devices: devices to train on, by default all.

    Raises:
        UserError: CONFIG when the config does not suit the data, the devices or an earlier stage; DATA for a damaged
            dataset.
    """
    config = with_vocab_size(config, mixture)
    sizes, why = choose_mesh(config, devices or jax.devices())
    mesh = make_mesh(sizes, devices)
    chosen = choices(config, mesh)
    if mesh.size > 1:
        chosen = {"mesh": f"{' x '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}: {why}"} | chosen
    check_rows(config, mesh)
    check_prompts(config, mixture)
    for stage in earlier:
        if stage.output == config.init_from:
            check_fits(config, stage.model)
    for dataset in mixture.datasets.values():
        dataset.tokenizer()  # the run folder keeps a copy, so it must be whole
    mixture.verify(config.data.verify)
    return Stage(config, mixture, mesh, chosen)


def with_vocab_size(config: Config, mixture: Mixture) -> ResolvedConfig:
    """Return the config with the vocabulary of the datasets; raise `UserError` (CONFIG) when it asks for another."""
    has, wants = mixture.vocab_size, config.model.vocab_size
    if wants not in (None, has):
        what = f"model.vocab_size is {wants} but the dataset's vocabulary has {has} tokens"
        fix = "prepare the dataset with the model's tokenizer, or leave model.vocab_size out"
        raise UserError(ExitCode.CONFIG, what, mixture.name, fix)
    return config.with_vocab_size(has)


def check_rows(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Raise `UserError` (CONFIG) unless every microbatch splits evenly over the row shards of the mesh."""
    shards, microbatches, n_rows = row_shards(mesh), config.training.accumulation_steps, config.data.global_batch_size
    if n_rows % (shards * microbatches):
        multiple = n_rows // (shards * microbatches)
        near = [count for count in (multiple, multiple + 1) if count]
        what = f"data.global_batch_size {n_rows} cannot be shared by {shards} devices (mesh data x fsdp)"
        if microbatches > 1:
            what += f" in {microbatches} accumulation steps"
        fix = "take " + " or ".join(str(count * shards * microbatches) for count in near)
        raise UserError(ExitCode.CONFIG, what, "config", fix)


def check_fits(config: ResolvedConfig, model: ModelConfig) -> None:
    """Raise `UserError` (CONFIG) when a run of `config` cannot start from weights of `model`."""
    sizes = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
    for name in (*sizes, "layer_norm_epsilon", "tie_word_embeddings"):
        old, new = getattr(model, name), getattr(config.model, name)
        if old != new:
            old, new = (str(value).lower() for value in (old, new))  # as in TOML
            what = f"model.{name} is {new} but {old} in init_from"
            raise UserError(ExitCode.CONFIG, what, config.init_from, f"set model.{name} = {old}")


def check_same_run(config: Config, run: RunFolder, allow_change: Sequence[str]) -> None:
    """Raise `UserError`: USAGE for an unknown key in `allow_change`, CONFIG when another key has changed."""
    for key in allow_change:
        if key not in config_keys():
            raise UserError(ExitCode.USAGE, f"unknown key {key}", "--allow-change", "give a key of the config")
    if run.last_checkpoint() is not None and (before := run.valid_config()):
        check_same_config(before, config, run, allow_change)


def check_same_config(before: Config, config: Config, run: RunFolder, allow_change: Sequence[str]) -> None:
    """Raise `UserError` (CONFIG) for a key that has changed although it changes the numbers of a run."""
    for (key, old), new in zip(config_values(before).items(), config_values(config).values(), strict=True):
        if old != new and key not in FREE_TO_CHANGE and key not in allow_change:
            what = f"{key} is {new} but the run has {old}"
            fix = f"change it back, choose another output, or add --allow-change {key}"
            raise UserError(ExitCode.CONFIG, what, run.path, fix)
