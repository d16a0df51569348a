"""The command `gpt2-flax evaluate`: how well a model predicts a dataset or a corpus."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_flax.checkpoint.source import Source
from gpt2_flax.checkpoint.weights import model_from_weights
from gpt2_flax.config.schema import Packing
from gpt2_flax.data.batches import rows_of
from gpt2_flax.data.dataset import TokenSplit
from gpt2_flax.data.dataset_info import MARKER, sum_if_known
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.data.packing import RowLayout
from gpt2_flax.data.prepare import prepare_text
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.folders import scratch_folder, write_whole
from gpt2_flax.inference.evaluation import Evaluation, evaluate, rows_to_read
from gpt2_flax.inference.per_document import document_characters, document_lines, evaluate_documents
from gpt2_flax.model.gpt2 import GPT2
from gpt2_flax.parallel.device_batches import row_shards
from gpt2_flax.parallel.mesh import make_mesh
from gpt2_flax.progress import progress_bar
from gpt2_flax.text.documents import CorpusOptions
from gpt2_flax.tokenizers.tokenizer import Tokenizer

Split = Literal["train", "validation"]


def evaluate_source(
    source: Source,
    data: str | None,
    seq_length: int | None,
    n_rows: int,
    n_batches: int,
    options: CorpusOptions,
    split_name: Split | None = None,
    per_document: Path | None = None,
) -> Evaluation:
    """Evaluate a model on all devices.

    Args:
        source: the model.
        data: a dataset folder, a corpus, or None for the datasets of the model's run.
        seq_length: positions of a row; None: as in the run, or the longest that the model can see.
        n_rows: rows of a batch; rounded up to a multiple of the row shards.
        n_batches: batches to read of each dataset; 0 reads all.
        options: how to read a corpus.
        split_name: the split of a dataset, by default "validation".
        per_document: file to write, with a line of JSON for each document.

    Raises:
        UserError: USAGE when there is no data or `split_name` is given with a corpus; CANT_CREATE when `per_document`
            exists; CONFIG when tokenizers differ or `seq_length` is too long.
    """
    datasets = {data: 1.0} if data is not None else source.config.data.datasets if source.config else None
    if datasets is None:
        raise UserError(ExitCode.USAGE, "no data", source.origin, "add --data DATASET or --data FILE.txt")
    if per_document is not None and n_batches:
        raise UserError(ExitCode.USAGE, "--per-document reads everything", "--batches", "leave one of them out")
    if per_document is not None and per_document.exists():
        raise UserError(ExitCode.CANT_CREATE, "output exists", per_document, "choose another name, or remove it")
    seq_length = seq_length or (source.config.data.seq_length if source.config else source.model.n_positions)
    if seq_length > source.model.n_positions:
        what = f"--seq-length {seq_length} is above the model's n_positions {source.model.n_positions}"
        raise UserError(ExitCode.CONFIG, what, source.origin, "lower it")
    corpus = data if data is not None and not (Path(data) / MARKER).is_file() else None
    mesh = make_mesh()
    n_rows = -(-n_rows // row_shards(mesh)) * row_shards(mesh)
    packing = source.config.data.packing if source.config else "stream"
    with scratch_folder() as folder, jax.set_mesh(mesh):
        tokenizer = source.tokenizer()
        mixture, characters_M = None, None
        if corpus is not None:
            if split_name is not None:
                raise UserError(ExitCode.USAGE, "--split is for datasets", corpus, "leave it out, or prepare the text")
            splits = {corpus: prepare_text([corpus], tokenizer, folder, options)}
            if per_document is not None and corpus != "-":  # a pipe cannot be read twice
                characters_M = document_characters(corpus, options, tokenizer, splits[corpus])
        else:
            mixture = Mixture(datasets)
            splits = _splits(mixture, source, split_name or "validation", tokenizer)
            mixture.verify("first-use")
        model = jax.device_put(model_from_weights(source.model, source.weights), NamedSharding(mesh, P()))
        if per_document is not None:
            lines, total = _each_document(model, splits, seq_length, packing, mesh, n_rows, characters_M)
            _check_data(mixture)
            write_whole(per_document, "".join(f"{line}\n" for line in lines).encode())
            return total
        layout = RowLayout(seq_length, packing, source.model.attend_across_documents)
        rows_of_splits = [rows_of(split, layout) for split in splits.values()]
        total = seq_length * sum(rows_to_read(rows, n_rows, n_batches) for rows in rows_of_splits)
        with progress_bar("evaluating", total, "tokens") as advance:
            evaluations = [evaluate(model, rows, mesh, n_rows, n_batches, advance) for rows in rows_of_splits]
        _check_data(mixture)
    return sum(evaluations, Evaluation())


def _splits(mixture: Mixture, source: Source, split_name: Split, tokenizer: Tokenizer) -> dict[str, TokenSplit]:
    """Return the split of each dataset that has one, by folder; raise `UserError` (DATA) when no dataset has one."""
    if mixture.tokenizer_fingerprint != tokenizer.fingerprint:
        what = f"the dataset was prepared with another tokenizer than that of {source.origin}"
        raise UserError(ExitCode.CONFIG, what, mixture.name, "prepare it with the model's, or give a text file")
    splits = {name: getattr(dataset, split_name) for name, dataset in mixture.datasets.items()}
    filled = {name: split for name, split in splits.items() if split.n_documents}
    if not filled:
        raise UserError(ExitCode.DATA, f"no {split_name} split", mixture.name, "add --data FILE or --split")
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
    """Return a line of JSON for each document of each split, and the sum of all evaluations."""
    lines, total = [], Evaluation()
    with progress_bar("evaluating", sum(split.n_tokens for split in splits.values()), "tokens") as advance:
        for name, split in splits.items():
            documents = evaluate_documents(model, split, seq_length, packing, mesh, n_rows, characters_M, advance)
            lines += document_lines(name, documents)
            total = sum(documents, total)
    if total.characters is None:
        total = replace(total, characters=sum_if_known(split.n_characters for split in splits.values()))
    return lines, total


def _check_data(mixture: Mixture | None) -> None:
    """Raise `UserError` (DATA) when the data is damaged, or changed during the evaluation."""
    if mixture is not None:
        mixture.wait_until_verified(None)
        mixture.check_unchanged()
