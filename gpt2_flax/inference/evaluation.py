"""How well a model predicts a split: the evaluation, and its figures."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from gpt2_flax.data.packing import Batch, Rows
from gpt2_flax.model.gpt2 import GPT2
from gpt2_flax.model.loss import LossSums
from gpt2_flax.parallel.device_batches import device_batch, prefetch


@dataclass(frozen=True)
class Evaluation:
    """Sums over predicted tokens, and figures from the sums; evaluations of several splits add up.

    Attributes:
        nats: The sum of the losses: minus the logarithm of the probability of each token.
        correct: The number of tokens that the model gave the highest probability.
        tokens: The number of predicted tokens.
        characters: The characters of the text that the tokens stand for; None when the dataset does not know.
    """

    nats: float = 0.0
    correct: float = 0.0
    tokens: int = 0
    characters: float | None = 0.0

    def __add__(self, other: "Evaluation") -> "Evaluation":
        characters = None
        if self.characters is not None and other.characters is not None:
            characters = self.characters + other.characters
        return Evaluation(self.nats + other.nats, self.correct + other.correct, self.tokens + other.tokens, characters)

    def __str__(self) -> str:
        bits = "-" if self.bits_per_character is None else f"{self.bits_per_character:.4f}"
        return (
            f"loss {self.loss:.4f}  perplexity {self.perplexity:.2f}  bits/character {bits}  "
            f"accuracy {self.accuracy:.1%}"
        )

    def figures(self) -> dict[str, float | None]:
        """Return the figures and the counts by their names, as JSON can hold them."""
        names = ("loss", "perplexity", "bits_per_character", "accuracy", "tokens", "characters")
        return {name: getattr(self, name) for name in names}

    @property
    def loss(self) -> float:
        """Mean nats a token."""
        return self.nats / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(min(self.loss, 700.0))

    @property
    def accuracy(self) -> float:
        """The share of correct tokens."""
        return self.correct / max(1, self.tokens)

    @property
    def bits_per_character(self) -> float | None:
        """All bits, for the ends of documents too, divided by the characters; comparable between vocabularies.

        None when the number of characters is not known, or 0.
        """
        return self.nats / math.log(2) / self.characters if self.characters else None


def evaluate(
    model: GPT2,
    rows: Rows,
    mesh: Mesh,
    n_rows: int,
    n_batches: int = 0,
    done: Callable[[int], None] = lambda positions: None,
) -> Evaluation:
    """Evaluate rows of a split in the order of the stream.

    Args:
        model: parameters on the devices of `mesh`.
        rows: rows of the split.
        mesh: devices to evaluate on.
        n_rows: rows of a batch.
        n_batches: batches to read; 0 reads the whole split.
        done: called with the number of positions after each batch.
    """
    sums = []
    for batch_sums in sums_of_batches(model, rows, mesh, n_rows, n_batches):
        sums.append(batch_sums)
        done(n_rows * rows.layout.seq_length)
    return evaluation_of(rows, sums)


def sums_of_batches(model: GPT2, rows: Rows, mesh: Mesh, n_rows: int, n_batches: int) -> Iterator[LossSums]:
    """Yield the sums of each batch, as numpy scalars; arguments as `evaluate`."""
    starts = range(0, rows_to_read(rows, n_rows, n_batches), n_rows)
    make = partial(device_batch, mesh, n_rows, lambda first, last: rows.batch(np.arange(first, last)))
    with contextlib.closing(prefetch(make, starts)) as batches:
        for batch in batches:
            yield jax.device_get(_sums(model, batch))


def evaluation_of(rows: Rows, sums: list[LossSums]) -> Evaluation:
    """Return the evaluation of the batches of `rows` that have these sums."""
    totals = [0.0, 0.0, 0.0]  # float64 on the host: float32 sums of millions of tokens drift
    for batch_sums in sums:
        totals = [total + float(more) for total, more in zip(totals, batch_sums, strict=True)]
    nats, correct, targets = totals
    characters = rows.split.n_characters
    if characters is not None:  # of some batches: as many as their tokens stand for on average
        characters *= targets / max(1, rows.split.n_tokens - rows.split.n_documents)
    return Evaluation(nats, correct, int(targets), characters)


def rows_to_read(rows: Rows, n_rows: int, n_batches: int) -> int:
    """Return how many rows an evaluation reads, padding of the last batch included; arguments as `evaluate`."""
    needed = -(-rows.n_rows // n_rows)
    return n_rows * min(needed, n_batches or needed)


@jax.jit
def _sums(model: GPT2, batch: Batch) -> LossSums:
    return model.loss(batch)
