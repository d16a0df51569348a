"""How well a model predicts text that it was not trained on."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_flax.checkpoint.source import Source
from gpt2_flax.checkpoint.weights import model_from_weights
from gpt2_flax.config import MeshConfig, Packing
from gpt2_flax.data.dataset import TokenSplit
from gpt2_flax.data.dataset_info import MARKER
from gpt2_flax.data.loader import Loader
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.data.packing import Batch
from gpt2_flax.data.prepare import prepare_text
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.folders import scratch_folder, write_whole
from gpt2_flax.inference.evaluation import Evaluation
from gpt2_flax.inference.per_document import document_characters, document_lines, evaluate_documents
from gpt2_flax.model.gpt2 import GPT2
from gpt2_flax.model.loss import LossSums
from gpt2_flax.parallel.device_batches import device_batch, prefetch, row_shards
from gpt2_flax.parallel.mesh import make_mesh
from gpt2_flax.progress import progress_bar
from gpt2_flax.text.documents import CorpusOptions
from gpt2_flax.tokenizers.tokenizer import Tokenizer

Split = Literal["train", "validation"]


def evaluate(
    model: GPT2,
    loader: Loader,
    mesh: Mesh,
    n_rows: int,
    n_batches: int = 0,
    done: Callable[[int], None] = lambda tokens: None,
) -> Evaluation:
    """Evaluates the loader's split in stream order, `n_rows` rows at a time.

    `n_batches` 0 reads the whole split; `done` is told of the positions of each finished batch, and may raise.
    """
    starts = range(0, _rows_to_read(loader, n_rows, n_batches), n_rows)

    def make(start):
        return device_batch(mesh, n_rows, lambda first, last: loader.in_order(start + first, start + last))

    totals = [0.0, 0.0, 0.0]  # float64 on the host: float32 sums of millions of tokens drift
    with contextlib.closing(prefetch(make, starts)) as batches:
        for batch in batches:
            sums = _sums(model, batch)
            totals = [total + float(part) for total, part in zip(totals, sums, strict=True)]
            done(n_rows * loader.seq_length)
    nats, correct, targets = totals
    split, characters = loader.split, loader.split.n_characters
    if characters is not None:  # of a part of the split as many as its tokens stand for on average
        characters *= targets / max(1, split.n_tokens - split.n_documents)
    return Evaluation(nats, correct, int(targets), characters)


def evaluate_source(
    source: Source,
    data: str | None,
    seq_length: int | None,
    n_rows: int,
    n_batches: int,
    options: CorpusOptions,
    part: Split | None = None,
    per_document: Path | None = None,
) -> Evaluation:
    """Evaluates a model on all devices: on `data`, a dataset or a corpus, else on the datasets of its run.

    part: of a dataset, by default the validation split. per_document: file to write, a line of JSON a document.
    Raises `UserError`: USAGE when there is no data to take or `part` is asked of a corpus, CANT_CREATE when the file
    exists, CONFIG when tokenizers differ or `seq_length` is too long.
    """
    if data is None and source.config is None:
        raise UserError(ExitCode.USAGE, "no data", source.origin, "add --data DATASET or --data FILE.txt")
    if per_document is not None and n_batches:
        raise UserError(ExitCode.USAGE, "--per-document reads everything", "--batches", "leave one of them out")
    if per_document is not None and per_document.exists():
        raise UserError(ExitCode.CANT_CREATE, "output exists", per_document, "choose another name, or remove it")
    seq_length = seq_length or (source.config.data.seq_length if source.config else source.model.n_positions)
    if seq_length > source.model.n_positions:
        what = f"--seq-length {seq_length} is above the model's n_positions {source.model.n_positions}"
        raise UserError(ExitCode.CONFIG, what, source.origin, "lower it")
    mesh = make_mesh(MeshConfig())
    n_rows = -(-n_rows // row_shards(mesh)) * row_shards(mesh)
    packing = source.config.data.packing if source.config else "stream"
    with scratch_folder() as folder, jax.set_mesh(mesh):
        tokenizer = source.tokenizer()
        mixture = None
        if _is_corpus(data):
            splits = {data: _prepared(data, part, tokenizer, folder, options)}
        else:
            mixture = Mixture(source.config.data.datasets if data is None else {data: 1.0})
            splits = _splits(mixture, source, part or "validation", tokenizer)
            mixture.verify("first-use")
        model = jax.device_put(model_from_weights(source.model, source.weights), NamedSharding(mesh, P()))
        if per_document is not None:
            known = _is_corpus(data) and data != "-"  # what comes by a pipe cannot be read twice
            characters_M = document_characters(data, options, tokenizer, splits[data]) if known else None
            lines, total = _each_document(model, splits, seq_length, packing, mesh, n_rows, characters_M)
            _check_data(mixture)
            write_whole(per_document, "".join(f"{line}\n" for line in lines).encode())
            return total
        across = source.model.attend_across_documents
        loaders = [Loader(split, seq_length, 0, packing, across) for split in splits.values()]
        total = sum(_rows_to_read(loader, n_rows, n_batches) for loader in loaders) * seq_length
        with progress_bar("evaluating", total, "tokens") as advance:
            parts = [evaluate(model, loader, mesh, n_rows, n_batches, advance) for loader in loaders]
        _check_data(mixture)
    return sum(parts, Evaluation())


def _rows_to_read(loader: Loader, n_rows: int, n_batches: int) -> int:
    needed = -(-loader.n_rows // n_rows)
    return n_rows * min(needed, n_batches or needed)


def _is_corpus(data: str | None) -> bool:
    return data is not None and not (Path(data) / MARKER).is_file()


def _prepared(data: str, part: Split | None, tokenizer: Tokenizer, folder: Path, options: CorpusOptions) -> TokenSplit:
    if part is not None:
        raise UserError(ExitCode.USAGE, "--split is for datasets", data, "leave it out, or prepare the text")
    return prepare_text([data], tokenizer, folder, options)


def _splits(mixture: Mixture, source: Source, part: Split, tokenizer: Tokenizer) -> dict[str, TokenSplit]:
    """Returns that split of each dataset that has it, by folder; raises `UserError` (DATA) when none has."""
    if mixture.tokenizer_fingerprint != tokenizer.fingerprint:
        what = f"the dataset was prepared with another tokenizer than that of {source.origin}"
        raise UserError(ExitCode.CONFIG, what, mixture.name, "prepare it with the model's, or give a text file")
    splits = {name: getattr(dataset, part) for name, dataset in mixture.datasets.items()}
    filled = {name: split for name, split in splits.items() if split.n_documents}
    if not filled:
        raise UserError(ExitCode.DATA, f"no {part} split", mixture.name, "add --data FILE or --split")
    return filled


def _each_document(
    model: GPT2,
    splits: dict[str, TokenSplit],
    seq_length: int,
    packing: Packing,
    mesh: Mesh,
    n_rows: int,
    characters_M: np.ndarray | None,
) -> tuple[list[str], Evaluation]:
    """Returns a line for each document of each split, and the sum of them all."""
    lines, total = [], Evaluation()
    with progress_bar("evaluating", sum(split.n_tokens for split in splits.values()), "tokens") as advance:
        for name, split in splits.items():
            documents = evaluate_documents(model, split, seq_length, packing, mesh, n_rows, characters_M, advance)
            lines += document_lines(name, documents)
            total = sum(documents, total)
    if total.characters is None and all(split.n_characters is not None for split in splits.values()):
        total = replace(total, characters=sum(split.n_characters for split in splits.values()))
    return lines, total


def _check_data(mixture: Mixture | None) -> None:
    """Raises `UserError` (DATA) when figures are of data that was damaged, or changed meanwhile."""
    if mixture is not None:
        mixture.wait_until_verified(None)
        mixture.check_unchanged()


@jax.jit
def _sums(model: GPT2, batch: Batch) -> LossSums:
    return model.loss(batch)
