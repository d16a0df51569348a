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
from gpt2_flax.data.dataset_info import MARKER
from gpt2_flax.data.loader import Loader
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.data.packing import Batch
from gpt2_flax.data.prepare import prepare_text
from gpt2_flax.data.token_dataset import TokenSplit
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.model.gpt2 import GPT2
from gpt2_flax.model.loss import LossSums
from gpt2_flax.parallel.feed import device_batch, prefetch, row_shards
from gpt2_flax.parallel.mesh import make_mesh
from gpt2_flax.progress import progress_bar
from gpt2_flax.text.documents import CorpusOptions
from gpt2_flax.text.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Evaluation:
    """Sums over `tokens` predicted tokens, and figures from them; those of several splits add up."""

    nats: float = 0.0
    correct: float = 0.0
    """Tokens whose most likely prediction was right."""
    tokens: int = 0
    characters: float | None = 0.0
    """Those of the text that the tokens stand for, None when the dataset does not know."""

    def __add__(self, other: "Evaluation") -> "Evaluation":
        known = self.characters is not None and other.characters is not None
        characters = self.characters + other.characters if known else None
        return Evaluation(self.nats + other.nats, self.correct + other.correct, self.tokens + other.tokens, characters)

    def __str__(self) -> str:
        bits = "-" if self.bits_per_character is None else f"{self.bits_per_character:.4f}"
        return (
            f"loss {self.loss:.4f}  perplexity {self.perplexity:.2f}  bits/character {bits}  "
            f"accuracy {self.accuracy:.1%}"
        )

    @property
    def loss(self) -> float:
        """Mean nats a token."""
        return self.nats / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def accuracy(self) -> float:
        return self.correct / max(1, self.tokens)

    @property
    def bits_per_character(self) -> float | None:
        """Comparable between vocabularies: all bits spent, end of document included, over the characters of the text.

        None when these are not known, or none.
        """
        return self.nats / math.log(2) / self.characters if self.characters else None


def evaluate(
    model: GPT2,
    loader: Loader,
    mesh: Mesh,
    n_rows: int,
    n_batches: int = 0,
    done: Callable[[int], None] = lambda tokens: None,
) -> Evaluation:
    """Evaluates the loader's split in stream order, `n_rows` rows at a time.

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
    split, characters = loader.split, loader.split.n_characters
    if characters is not None:  # of a part of the split as many as its tokens stand for on average
        characters *= targets / max(1, split.n_tokens - split.n_documents)
    return Evaluation(nats, correct, int(targets), characters)


def evaluate_source(
    source: Source, data: str | None, seq_length: int | None, n_rows: int, n_batches: int, options: CorpusOptions
) -> Evaluation:
    """Evaluates a model on all devices: on `data`, a dataset or a corpus, else on the datasets of its run.

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
        splits = _splits(source, data, Path(folder), options)
        model = jax.device_put(model_from_weights(source.model, source.weights), NamedSharding(mesh, P()))
        packing = source.config.data.packing if source.config else "stream"
        across = source.model.attend_across_documents
        loaders = [Loader(split, seq_length, 0, packing, across) for split in splits]
        total = sum(_rows_to_read(loader, n_rows, n_batches) for loader in loaders) * seq_length
        with progress_bar("evaluating", total, "tokens") as advance:
            parts = [evaluate(model, loader, mesh, n_rows, n_batches, advance) for loader in loaders]
    return sum(parts, Evaluation())


def _rows_to_read(loader: Loader, n_rows: int, n_batches: int) -> int:
    needed = -(-loader.n_rows // n_rows)
    return n_rows * min(needed, n_batches or needed)


def _splits(source: Source, data: str | None, folder: Path, options: CorpusOptions) -> list[TokenSplit]:
    tokenizer = load_tokenizer(source.tokenizer_folder)
    if data is not None and not (Path(data) / MARKER).is_file():
        return [prepare_text([data], tokenizer, folder, options)]
    mixture = Mixture(source.config.data.datasets if data is None else {data: 1.0})
    if mixture.tokenizer_fingerprint != tokenizer.fingerprint:
        what = f"the dataset was prepared with another tokenizer than that of {source.origin}"
        raise UserError(ExitCode.CONFIG, what, mixture.name, "prepare it with the model's, or give a text file")
    return [dataset.validation for dataset in mixture.datasets.values()]


@jax.jit
def _sums(model: GPT2, batch: Batch) -> LossSums:
    return model.loss(batch)
