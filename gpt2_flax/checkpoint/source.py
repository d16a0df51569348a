"""Load a model from any place that a user may name: a run, a checkpoint, a folder, a file of others, the hub."""

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_flax.checkpoint.hub import download
from gpt2_flax.checkpoint.huggingface import read_folder
from gpt2_flax.checkpoint.run_folder import RunFolder, check_model, run_of_checkpoint
from gpt2_flax.checkpoint.step_meta import VALIDATION_LOSS, DamagedCheckpoint
from gpt2_flax.checkpoint.store import CheckpointStore
from gpt2_flax.checkpoint.tensor_files import check_finite, read_torch
from gpt2_flax.checkpoint.weights import Weights, abstract_model, model_from_weights, weights_of
from gpt2_flax.config.model import ModelConfig
from gpt2_flax.config.parse import parse_config, parse_model
from gpt2_flax.config.schema import Config
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.folders import HubModel, new_folder
from gpt2_flax.formats.registry import FORMATS, reader, recognize
from gpt2_flax.parallel.mesh import make_mesh
from gpt2_flax.tokenizers.special_tokens import FROM_FILES, Ends
from gpt2_flax.tokenizers.tokenizer import Tokenizer, load_tokenizer

IMPORTED = "checkpoints/0/_CHECKPOINT_METADATA"  # a file of every run that `save_as_run` made


@dataclass(frozen=True)
class Source:
    """Weights in memory and what belongs to them. Facts that only a run knows are empty for other sources."""

    origin: str
    model: ModelConfig
    weights: Weights
    tokenizer_folder: Path
    config: Config | None = None
    step: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    hardware: str | None = None
    ends: Ends = FROM_FILES
    format: str | None = None
    """The name in `FORMATS` of a file of another program."""
    tokenizer_fingerprint: str | None = None
    """The fingerprint that the tokenizer must have."""
    averaged: Sequence[int] = ()
    """The steps of the checkpoints whose mean the weights are, the last of them `step`."""

    def tokenizer(self) -> Tokenizer:
        """Read the tokenizer. Raises `UserError` as `load_tokenizer`, and DATA if its fingerprint differs."""
        tokenizer = load_tokenizer(self.tokenizer_folder, ends=self.ends)
        if self.tokenizer_fingerprint not in (None, tokenizer.fingerprint):
            what = f"tokenizer is damaged or not the one of {self.origin} (its fingerprint differs)"
            fix = "copy the folder tokenizer of the run's dataset there"
            raise UserError(ExitCode.DATA, what, self.tokenizer_folder, fix)
        return tokenizer


def load_source(
    place: Path | HubModel,
    step: int | None = None,
    tokenizer: Path | None = None,
    uer_config: Path | None = None,
    ends: Ends = FROM_FILES,
    best: bool = False,
    revision: str | None = None,
    average: int = 1,
) -> Source:
    """Read the model at `place`; of a run, the newest checkpoint that is not damaged.

    Args:
        step: The checkpoint of a run to read.
        tokenizer: A tokenizer in place of the one beside the model. A file of another program has none.
        uer_config: The config.json of a UER-py `.bin`.
        ends: As in `load_tokenizer`.
        best: Read the checkpoint with the lowest validation loss.
        revision: The branch, tag or commit of a model on the hub.
        average: Take the mean of the weights of this many checkpoints of a run: the one to read and those before it.

    Raises:
        UserError: NO_INPUT if there is no model, or too few checkpoints; DATA or IO if it is damaged or holds numbers
            that are not finite; USAGE if an argument does not fit the kind of model, or `tokenizer` is missing; and as
            `hub.download`.
    """
    path, origin = _local(place, revision)
    check_model(path)
    run = run_of_checkpoint(path)
    is_file, is_folder = path.is_file(), (path / "config.json").is_file()
    if step is not None and best:
        raise UserError(ExitCode.USAGE, "--step and --best name a checkpoint each", path, "give one of them")
    if average > 1 and (is_folder or is_file):
        raise UserError(ExitCode.USAGE, "--average is for a run", path, "leave --average out, or name the run")
    if (step is not None or best) and (run is not None or is_folder or is_file):
        option = "--best" if best else "--step"
        raise UserError(ExitCode.USAGE, f"{option} is for a run folder", path, f"leave {option} out, or name the run")
    if uer_config is not None and not is_file:
        raise _no_uer_config(path)
    if is_file:
        source = _file_source(path, tokenizer, uer_config)
    elif is_folder:
        source = Source(origin, *read_folder(path), path)
    else:
        source = _run_source(RunFolder(run or path), int(path.name) if run else step, best, average)
    if tokenizer is not None:
        source = dataclasses.replace(source, tokenizer_folder=tokenizer, tokenizer_fingerprint=None)
    return dataclasses.replace(source, ends=ends)


def compare_with_original(place: Path | HubModel, source: Source) -> str | None:
    """Return how `source` differs from the file at `place`, computed like the program that wrote it.

    Returns:
        None if no other program wrote the file.
    """
    return source.format and str(reader(source.format).compare(place, source.weights, source.model))


def save_as_run(source: Source, output: Path, overwrite: bool = False) -> None:
    """Write `source` as a run that has only a checkpoint 0 with weights, and a tokenizer.

    Raises:
        UserError: CANT_CREATE if `output` may not be written; DATA if the tokenizer does not fit the model.
    """
    tokenizer = source.tokenizer()
    if tokenizer.vocab_size > source.model.vocab_size:
        what = f"tokenizer has {tokenizer.vocab_size} tokens, the model {source.model.vocab_size}"
        raise UserError(ExitCode.DATA, what, source.tokenizer_folder, "use the tokenizer that the model came with")
    with new_folder(output, IMPORTED, overwrite) as folder:
        run = RunFolder(folder)
        run.tokenizer.mkdir()
        tokenizer.save(run.tokenizer, model_max_length=source.model.n_positions)
        meta = {"model": source.model.model_dump(), "tokenizer_fingerprint": tokenizer.fingerprint, "step": 0}
        with CheckpointStore(run.checkpoints, keep=1) as store:
            store.save(0, model_from_weights(source.model, source.weights), None, meta)


def _local(place: Path | HubModel, revision: str | None) -> tuple[Path, str]:
    """Return the path of a model on this machine, after a download if needed, and words for its origin."""
    if isinstance(place, Path):
        if revision is not None:
            fix = "leave it out: this is a path of this machine"
            raise UserError(ExitCode.USAGE, "--revision is for a model on the Hugging Face hub", place, fix)
        return place, f"transformers folder {place}"
    if revision is not None and place.revision not in (None, revision):
        raise UserError(ExitCode.USAGE, f"--revision {revision} is another revision", place, "give one of them")
    folder, commit = download(place._replace(revision=revision or place.revision))
    return folder, f"{place.repo_id} at commit {commit[:12]} of the Hugging Face hub"


def _file_source(path: Path, tokenizer: Path | None, uer_config: Path | None) -> Source:
    if path.suffix == ".safetensors":
        raise UserError(ExitCode.DATA, "UER-py writes no such file", path, "give the transformers folder that it is in")
    content = read_torch(path, "it should be a .bin of UER-py or the ckpt.pt of nanoGPT; copy it again")
    name = recognize(content)
    program, vocabulary, note = FORMATS[name].program, FORMATS[name].vocabulary, FORMATS[name].note
    if tokenizer is None:
        fix = f"import it first: gpt2-flax import {path} OUTPUT --tokenizer {vocabulary}{note}"
        raise UserError(ExitCode.USAGE, f"a file of {program} has no vocabulary", path, fix)
    if uer_config is not None and name != "uer":
        raise _no_uer_config(path)
    model, weights = reader(name).read_content(content, path, uer_config)
    return Source(f"{program} file {path}", model, weights, tokenizer, format=name)


def _no_uer_config(path: Path) -> UserError:
    fix = "leave it out: the model brings its config"
    return UserError(ExitCode.USAGE, "--uer-config is for a .bin file of UER-py", path, fix)


def _run_source(run: RunFolder, step: int | None, best: bool, average: int) -> Source:
    with CheckpointStore(run.checkpoints, tell=_warn) as store:
        if step is None and not best:
            found = store.newest(lambda step: _read(store, step))
        else:
            step = _best_step(store) if step is None else step
            if step not in (steps := store.steps()):
                there = f"there are {', '.join(map(str, steps))}" if steps else "there are none"
                raise UserError(ExitCode.NO_INPUT, f"no checkpoint {step}", store.folder, there)
            found = step, _read_or_refuse(store, step)
        if found is None:
            fix = "wait for the first save of the run"
            raise UserError(ExitCode.NO_INPUT, "no checkpoint yet", run.checkpoints, fix)
        step, (meta, model, weights) = found
        averaged = _steps_to_average(store, step, average) if average > 1 else ()
        weights = _mean(store, weights, averaged[:-1], meta)
    return Source(
        f"{run.path} at step {step}" + (f", the mean of {average} checkpoints" if averaged else ""),
        model,
        weights,
        run.tokenizer,
        parse_config(meta["config"], f"{run.checkpoints / str(step)}") if "config" in meta else run.read_config(),
        step,
        {} if averaged else meta["metrics"] if "metrics" in meta else run.metrics_at(step),
        meta.get("hardware"),
        tokenizer_fingerprint=meta.get("tokenizer_fingerprint"),
        averaged=averaged,
    )


def _steps_to_average(store: CheckpointStore, last: int, count: int) -> list[int]:
    """Return the steps of the last `count` checkpoints up to the step `last`."""
    steps = [step for step in store.steps() if step <= last]
    if len(steps) < count:
        fix = f"{_at_most(len(steps))}, or train with a larger training.keep_checkpoints"
        what = f"only {len(steps)} of {count} checkpoints: {', '.join(map(str, steps))}"
        raise UserError(ExitCode.NO_INPUT, what, store.folder, fix)
    return steps[-count:]


def _mean(store: CheckpointStore, weights: Weights, others: Sequence[int], newest: Mapping[str, Any]) -> Weights:
    """Return the mean of the weights of the newest checkpoint and of the others, which are read one at a time."""
    for count, step in enumerate(reversed(others), 1):
        meta, _, more = _read_or_refuse(store, step)
        if meta.get("grown", True) != newest.get("grown", True):
            what = f"checkpoint {step} is from before the model grew"
            raise UserError(ExitCode.USAGE, what, store.folder, _at_most(count))
        weights = {name: mean + (more[name] - mean) / (count + 1) for name, mean in weights.items()}
    return weights


def _at_most(count: int) -> str:
    return f"give --average {count}" if count > 1 else "leave --average out"


def _read_or_refuse(store: CheckpointStore, step: int) -> tuple[dict[str, Any], ModelConfig, Weights]:
    """Read a checkpoint as `_read` does. Raises `UserError` (IO) if it is damaged."""
    try:
        return _read(store, step)
    except DamagedCheckpoint as error:
        what = f"checkpoint {step} is damaged ({error})"
        raise UserError(ExitCode.IO, what, store.folder, "use another step") from error


def _read(store: CheckpointStore, step: int) -> tuple[dict[str, Any], ModelConfig, Weights]:
    """Return the metadata, config and weights of a checkpoint. Raises `DamagedCheckpoint`, `UserError`."""
    meta, place = store.meta(step), store.folder / str(step)
    fix = "another version of gpt2_flax wrote it: export it with that one, then import it here"
    model = parse_model(meta["model"], place, fix)
    model = model.model_copy(update={"attention": "auto"})  # this machine may lack the kernel of the training
    mesh = make_mesh(devices=jax.local_devices()[:1])
    with jax.set_mesh(mesh):  # training has set another mesh when it reads `init_from`
        layout = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, P())),
            abstract_model(model),
        )
        weights = weights_of(store.restore(step, model=layout)["model"])
    for name, array in weights.items():
        check_finite(name, array, place)
    return meta, model, weights


def _best_step(store: CheckpointStore) -> int:
    """Return the step with the lowest validation loss."""
    losses = {}
    for step in store.steps():
        try:
            losses[step] = store.meta(step).get("metrics", {}).get(VALIDATION_LOSS, math.inf)
        except DamagedCheckpoint as error:
            _warn(f"warning: checkpoint {step} is damaged ({error})")
    best = min(losses, key=lambda step: (losses[step], step), default=None)
    if best is None or losses[best] == math.inf:
        fix = "leave --best out; a checkpoint has one if its step is a multiple of training.evaluate_every"
        raise UserError(ExitCode.NO_INPUT, "no checkpoint has a validation loss", store.folder, fix)
    return best


def _warn(warning: str) -> None:
    print(warning, file=sys.stderr)
