"""How well a model predicts text that it was not trained on."""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_flax.checkpoint.source import Source
from gpt2_flax.checkpoint.weights import model_from_weights
from gpt2_flax.config import MeshConfig
from gpt2_flax.data.loader import Loader
from gpt2_flax.data.packing import Batch
from gpt2_flax.data.prepare import prepare_text
from gpt2_flax.data.token_dataset import TokenDataset, TokenSplit
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.model.gpt2 import GPT2
from gpt2_flax.model.loss import LossSums, cross_entropy
from gpt2_flax.parallel.feed import device_batch, prefetch, row_shards
from gpt2_flax.parallel.mesh import make_mesh
from gpt2_flax.progress import progress_bar
from gpt2_flax.text.corpus import PACKAGE, Separator
from gpt2_flax.text.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Evaluation:
    """Figures over `tokens` predicted tokens."""

    loss: float
    """Mean nats a token."""
    accuracy: float
    """Share of tokens whose most likely prediction was right."""
    bits_per_character: float
    """Comparable between vocabularies: all bits spent, end of document included, over the characters of the text."""
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def evaluate(
    model: GPT2,
    loader: Loader,
    mesh: Mesh,
    n_rows: int,
    n_batches: int = 0,
    done: Callable[[int], None] = lambda tokens: None,
) -> Evaluation:
    """Returns figures over the loader's split in stream order, `n_rows` windows at a time.

    `n_batches` 0 reads the whole split; `done` is told of the positions of each finished batch.
    """
    starts = range(0, _rows_to_read(loader, n_rows, n_batches), n_rows)

    def make(start):
        return device_batch(mesh, n_rows, lambda first, last: loader.in_order(start + first, start + last))

    totals = [0.0, 0.0, 0.0]  # float64 on the host: float32 sums of millions of tokens drift
    for batch in prefetch(make, starts):
        sums = _sums(model, batch)
        totals = [total + float(part) for total, part in zip(totals, sums, strict=True)]
        done(n_rows * loader.seq_length)
    nats, correct, targets = totals
    tokens_per_character = (loader.split.n_tokens - loader.split.n_documents) / max(1, loader.split.n_characters)
    loss = nats / max(1.0, targets)
    return Evaluation(loss, correct / max(1.0, targets), loss * tokens_per_character / math.log(2), int(targets))


def evaluate_source(
    source: Source, data: str | None, seq_length: int | None, n_rows: int, n_batches: int, separator: Separator
) -> Evaluation:
    """Evaluates a model on all devices: on `data`, a dataset or a text file, else on the dataset of its run.

    Raises `UserError`: USAGE when there is no data to take, CONFIG when tokenizers differ or `seq_length` is too long.
    """
    if data is None and source.config is None:
        raise UserError(ExitCode.USAGE, "no data", source.origin, "add --data DATASET or --data FILE.txt")
    seq_length = seq_length or (source.config.data.seq_length if source.config else source.model.n_positions)
    if seq_length > source.model.n_positions:
        what = f"--seq-length {seq_length} is above the model's n_positions {source.model.n_positions}"
        raise UserError(ExitCode.CONFIG, what, source.origin, "lower it")
    mesh = make_mesh(MeshConfig())
    n_rows = -(-n_rows // row_shards(mesh)) * row_shards(mesh)
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        split = _split(source, data or source.config.data.dataset, Path(folder), separator)
        model = jax.device_put(model_from_weights(source.model, source.weights), NamedSharding(mesh, P()))
        loader = Loader(split, seq_length, seed=0)
        total = _rows_to_read(loader, n_rows, n_batches) * seq_length
        with progress_bar("evaluating", total, "tokens") as advance:
            return evaluate(model, loader, mesh, n_rows, n_batches, advance)


def _rows_to_read(loader: Loader, n_rows: int, n_batches: int) -> int:
    needed = -(-loader.n_windows // n_rows)
    return n_rows * min(needed, n_batches or needed)


def _split(source: Source, data: str, folder: Path, separator: Separator) -> TokenSplit:
    tokenizer = load_tokenizer(source.tokenizer_folder)
    if Path(data).is_file() or data.startswith(PACKAGE):
        return prepare_text([data], tokenizer, folder, separator)
    dataset = TokenDataset(data)
    if dataset.info.tokenizer_fingerprint != tokenizer.fingerprint:
        what = f"the dataset was prepared with another tokenizer than that of {source.origin}"
        raise UserError(ExitCode.CONFIG, what, data, "prepare it with the model's, or give a text file")
    return dataset.validation


@jax.jit
def _sums(model: GPT2, batch: Batch) -> LossSums:
    x_BTD = model.hidden(batch.tokens_BT, batch.segments_BT, batch.positions_BT)
    return cross_entropy(x_BTD, model.wte.embedding[...], batch.targets_BT, model.cfg.vocab_size)
