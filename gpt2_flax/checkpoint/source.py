"""What a user may name where a model is wanted: a run, a checkpoint of one, a `transformers` folder, a file of others.

The files are checkpoints of UER-py, TencentPretrain and nanoGPT.
"""

import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_flax.checkpoint.huggingface import read_folder
from gpt2_flax.checkpoint.nanogpt import from_nanogpt, open_nanogpt
from gpt2_flax.checkpoint.run_folder import RunFolder, check_model
from gpt2_flax.checkpoint.step_meta import VALIDATION_LOSS, Damaged
from gpt2_flax.checkpoint.store import CheckpointStore
from gpt2_flax.checkpoint.tensor_files import check_finite
from gpt2_flax.checkpoint.uer import read_uer
from gpt2_flax.checkpoint.weights import Weights, abstract_model, model_from_weights, weights_of
from gpt2_flax.config import Config, ModelConfig, parse_config, parse_model
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.folders import new_folder
from gpt2_flax.parallel.mesh import make_mesh
from gpt2_flax.tokenizers.special_tokens import FROM_FILES, Ends
from gpt2_flax.tokenizers.tokenizer import Tokenizer, load_tokenizer

IMPORTED = "checkpoints/0/_CHECKPOINT_METADATA"  # in a run that `save_as_run` made


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
    ends: Ends = FROM_FILES
    kind: Literal["run", "transformers", "uer", "nanogpt"] = "run"
    tokenizer_fingerprint: str | None = None
    """Which the tokenizer must have."""

    def tokenizer(self) -> Tokenizer:
        """Read the tokenizer; raises `UserError` as `load_tokenizer`, and DATA when it has another fingerprint."""
        tokenizer = load_tokenizer(self.tokenizer_folder, ends=self.ends)
        if self.tokenizer_fingerprint not in (None, tokenizer.fingerprint):
            what = f"tokenizer is damaged or not the one of {self.origin} (its fingerprint differs)"
            fix = "copy the folder tokenizer of the run's dataset there"
            raise UserError(ExitCode.DATA, what, self.tokenizer_folder, fix)
        return tokenizer


def load_source(
    path: Path,
    step: int | None = None,
    tokenizer: Path | None = None,
    uer_config: Path | None = None,
    ends: Ends = FROM_FILES,
    best: bool = False,
) -> Source:
    """Reads the model at `path`; of a run the newest whole checkpoint, `step`, or the `best` by validation loss.

    `tokenizer` stands in for the one beside the model; a UER-py `.bin` and a nanoGPT `ckpt.pt` have none, so it must be
    given. `uer_config` is as in `read_uer`, `ends` as in `load_tokenizer`.
    Raises `UserError`: NO_INPUT when there is nothing of the kind, DATA or IO when it is damaged or its numbers are not
    finite, USAGE for a `step`, `best` or `uer_config` of what has none, or a missing `tokenizer`.
    """
    check_model(path)
    is_checkpoint = path.parent.name == "checkpoints" and path.name.isdecimal()
    is_file, is_folder = path.is_file(), (path / "config.json").is_file()
    if step is not None and best:
        raise UserError(ExitCode.USAGE, "--step and --best name a checkpoint each", path, "give one of them")
    if (step is not None or best) and (is_checkpoint or is_folder or is_file):
        option = "--best" if best else "--step"
        raise UserError(ExitCode.USAGE, f"{option} is for a run folder", path, f"leave {option} out, or name the run")
    if is_file:
        return _file_source(path, tokenizer, uer_config, ends)
    if uer_config is not None:
        raise _no_uer_config(path)
    if is_folder:
        model, weights = read_folder(path)
        return Source(f"transformers folder {path}", model, weights, tokenizer or path, ends=ends, kind="transformers")
    run = RunFolder(path.parent.parent if is_checkpoint else path)
    source = _run_source(run, int(path.name) if is_checkpoint else step, best)
    if tokenizer is not None:
        source = dataclasses.replace(source, tokenizer_folder=tokenizer, tokenizer_fingerprint=None)
    return dataclasses.replace(source, ends=ends)


def save_as_run(source: Source, output: Path, overwrite: bool = False) -> None:
    """Writes `source` as a run that has only a checkpoint 0: weights and tokenizer, no optimizer.

    Raises `UserError`: CANT_CREATE when `output` may not be written, DATA when the tokenizer does not fit the model.
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


def _file_source(path: Path, tokenizer: Path | None, uer_config: Path | None, ends: Ends) -> Source:
    checkpoint = open_nanogpt(path)
    program, vocabulary = ("UER-py", "vocab.txt") if checkpoint is None else ("nanoGPT", "FOLDER")
    if tokenizer is None:
        fix = f"import it first: gpt2-flax import {path} OUTPUT --tokenizer {vocabulary}"
        if checkpoint is not None:
            fix += " (a meta.pkl is never read: see docs/from_nanogpt.md)"
        raise UserError(ExitCode.USAGE, f"a file of {program} has no vocabulary", path, fix)
    if checkpoint is None:
        model, weights = read_uer(path, uer_config)
        return Source(f"UER-py file {path}", model, weights, tokenizer, ends=ends, kind="uer")
    if uer_config is not None:
        raise _no_uer_config(path)
    model, weights = from_nanogpt(checkpoint, path)
    return Source(f"nanoGPT checkpoint {path}", model, weights, tokenizer, ends=ends, kind="nanogpt")


def _no_uer_config(path: Path) -> UserError:
    fix = "leave it out: the model brings its config"
    return UserError(ExitCode.USAGE, "--uer-config is for a .bin file of UER-py", path, fix)


def _run_source(run: RunFolder, step: int | None, best: bool) -> Source:
    with CheckpointStore(run.checkpoints, tell=_warn) as store:
        if step is None and not best:
            found = store.newest(lambda step: _read(store, step))
        else:
            step = _chosen(store, step)
            try:
                found = step, _read(store, step)
            except Damaged as error:
                what = f"checkpoint {step} is damaged ({error})"
                raise UserError(ExitCode.IO, what, store.folder, "use another step") from error
    if found is None:
        raise UserError(ExitCode.NO_INPUT, "no checkpoint yet", run.checkpoints, "wait for the first save of the run")
    step, (meta, model, weights) = found
    config = parse_config(meta["config"], f"{run.checkpoints / str(step)}") if "config" in meta else run.read_config()
    return Source(
        f"{run.path} at step {step}",
        model,
        weights,
        run.tokenizer,
        config,
        step,
        meta["metrics"] if "metrics" in meta else run.metrics_at(step),
        meta.get("hardware"),
        tokenizer_fingerprint=meta.get("tokenizer_fingerprint"),
    )


def _read(store: CheckpointStore, step: int) -> tuple[dict[str, Any], ModelConfig, Weights]:
    """Returns what a checkpoint says of itself, and its model. Raises `Damaged`, and `UserError` as `load_source`."""
    meta, place = store.meta(step), store.folder / str(step)
    fix = "another version of gpt2_flax wrote it: export it with that one, then import it here"
    model = parse_model(meta["model"], place, fix)
    model = model.model_copy(update={"attention": "auto"})  # what trained it need not be what it is used on
    mesh = make_mesh(devices=jax.local_devices()[:1])
    with jax.set_mesh(mesh):  # `init_from` is read where another mesh is set
        layout = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, P())),
            abstract_model(model),
        )
        weights = weights_of(store.restore(step, model=layout)["model"])
    for name, array in weights.items():
        check_finite(name, array, place)
    return meta, model, weights


def _chosen(store: CheckpointStore, step: int | None) -> int:
    """Return `step`; if it is None, the step with the lowest validation loss."""
    steps = store.steps()
    if step is not None and step not in steps:
        there = f"there are {', '.join(map(str, steps))}" if steps else "there are none"
        raise UserError(ExitCode.NO_INPUT, f"no checkpoint {step}", store.folder, there)
    if step is not None:
        return step
    losses = {}
    for one in steps:
        try:
            losses[one] = store.meta(one).get("metrics", {}).get(VALIDATION_LOSS, math.inf)
        except Damaged as error:
            _warn(f"warning: checkpoint {one} is damaged ({error})")
    best = min(losses, key=lambda one: (losses[one], one), default=None)
    if best is None or losses[best] == math.inf:
        fix = "leave --best out; a checkpoint has one if its step is a multiple of training.evaluate_every"
        raise UserError(ExitCode.NO_INPUT, "no checkpoint has a validation loss", store.folder, fix)
    return best


def _warn(warning: str) -> None:
    print(warning, file=sys.stderr)
