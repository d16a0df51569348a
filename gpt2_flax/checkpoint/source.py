"""What a user may name where a model is wanted: a run, a checkpoint of one, a `transformers` folder, a UER-py file."""

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jax

from gpt2_flax.checkpoint.huggingface import read_folder
from gpt2_flax.checkpoint.run_folder import RunFolder, check_model
from gpt2_flax.checkpoint.store import CheckpointStore
from gpt2_flax.checkpoint.uer import read_uer
from gpt2_flax.checkpoint.weights import Weights, abstract_model, model_from_weights, weights_of
from gpt2_flax.config import Config, ModelConfig, parse_model
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.folders import new_folder
from gpt2_flax.text.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Source:
    """Weights in memory and what belongs to them; what only a run can say is empty for other sources."""

    origin: str
    model: ModelConfig
    weights: Weights
    tokenizer_folder: Path
    config: Config | None = None
    step: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    hardware: str | None = None


def load_source(
    path: Path, step: int | None = None, tokenizer: Path | None = None, uer_config: Path | None = None
) -> Source:
    """Reads the model at `path`; of a run the newest whole checkpoint, or `step`.

    `tokenizer` stands in for the one beside the model; a UER-py `.bin` has none, so it must be given, and `uer_config`
    is as in `read_uer`.
    Raises `UserError`: NO_INPUT when there is nothing of the kind, DATA or IO when it is damaged, USAGE for a `step` or
    `uer_config` of what has none, or a missing `tokenizer`.
    """
    check_model(path)
    is_checkpoint = path.parent.name == "checkpoints" and path.name.isdecimal()
    is_uer, is_folder = path.is_file(), (path / "config.json").is_file()
    if step is not None and (is_checkpoint or is_folder or is_uer):
        raise UserError(ExitCode.USAGE, "--step is for a run folder", path, "leave --step out, or name the run")
    if is_uer:
        return _uer_source(path, tokenizer, uer_config)
    if uer_config is not None:
        fix = "leave it out: the model brings its config"
        raise UserError(ExitCode.USAGE, "--uer-config is for a .bin file of UER-py", path, fix)
    if is_folder:
        model, weights = read_folder(path)
        return Source(f"transformers folder {path}", model, weights, tokenizer or path)
    run = RunFolder(path.parent.parent if is_checkpoint else path)
    source = _run_source(run, int(path.name) if is_checkpoint else step)
    return dataclasses.replace(source, tokenizer_folder=tokenizer) if tokenizer else source


def save_as_run(source: Source, output: Path, overwrite: bool = False) -> None:
    """Writes `source` as a run that has only a checkpoint 0: weights and tokenizer, no optimizer.

    Raises `UserError`: CANT_CREATE when `output` may not be written, DATA when the tokenizer does not fit the model.
    """
    tokenizer = load_tokenizer(source.tokenizer_folder)
    if tokenizer.vocab_size > source.model.vocab_size:
        what = f"tokenizer has {tokenizer.vocab_size} tokens, the model {source.model.vocab_size}"
        raise UserError(ExitCode.DATA, what, source.tokenizer_folder, "use the tokenizer that the model came with")
    with new_folder(output, "checkpoints/0/_CHECKPOINT_METADATA", overwrite) as folder:
        run = RunFolder(folder)
        run.tokenizer.mkdir()
        tokenizer.save(run.tokenizer, model_max_length=source.model.n_positions)
        meta = {"model": source.model.model_dump(), "tokenizer_fingerprint": tokenizer.fingerprint, "step": 0}
        with CheckpointStore(run.checkpoints, keep=1) as store:
            store.save(0, model_from_weights(source.model, source.weights), None, meta)


def _uer_source(path: Path, tokenizer: Path | None, uer_config: Path | None) -> Source:
    if tokenizer is None:
        fix = f"take it in first: gpt2-flax import {path} OUTPUT --tokenizer vocab.txt"
        raise UserError(ExitCode.USAGE, "a file of UER-py has no vocabulary", path, fix)
    model, weights = read_uer(path, uer_config)
    return Source(f"UER-py file {path}", model, weights, tokenizer)


def _run_source(run: RunFolder, step: int | None) -> Source:
    with CheckpointStore(run.checkpoints) as store:
        step = _choose(store, step)
        meta = store.meta(step)
        fix = "another version of gpt2_flax wrote it: export it with that one, then import it here"
        model = parse_model(meta["model"], store.folder / str(step), fix)
        model = model.model_copy(update={"attention": "auto"})  # what trained it need not be what it is used on
        on_one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        layout = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_one_device), abstract_model(model)
        )
        weights = weights_of(store.restore(step, model=layout)["model"])
    origin = f"{run.path} at step {step}"
    metrics, hardware = run.metrics_at(step), meta.get("hardware")
    return Source(origin, model, weights, run.tokenizer, run.read_config(), step, metrics, hardware)


def _choose(store: CheckpointStore, step: int | None) -> int:
    steps = store.steps()
    if not steps:
        raise UserError(ExitCode.NO_INPUT, "no checkpoint yet", store.folder, "wait for the first save of the run")
    if step is not None and step not in steps:
        saved = ", ".join(map(str, steps))
        raise UserError(ExitCode.NO_INPUT, f"no checkpoint {step}", store.folder, f"there are {saved}")
    if step is None:
        return store.newest_whole(lambda warning: print(warning, file=sys.stderr))
    if damage := store.damage(step):
        raise UserError(ExitCode.IO, f"checkpoint {step} is damaged ({damage})", store.folder, "use another step")
    return step
