"""How well a model predicts each document of a split.

Dimension key: B rows, T sequence, C chunks of columns, N columns of a chunk, D n_embd, V vocabulary, M documents.
"""

import json
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gpt2_flax.config.schema import Packing
from gpt2_flax.data.batches import rows_of
from gpt2_flax.data.dataset import TokenSplit
from gpt2_flax.data.packing import IGNORE, Batch, RowLayout, Rows, across_documents
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.folders import utf8_name
from gpt2_flax.inference.evaluation import Evaluation
from gpt2_flax.model.gpt2 import GPT2
from gpt2_flax.model.loss import chunk_tokens, logits
from gpt2_flax.parallel.device_batches import device_batch, prefetch, row_shards
from gpt2_flax.text.corpus import corpus_units
from gpt2_flax.text.documents import CorpusOptions
from gpt2_flax.tokenizers.tokenizer import Tokenizer


def evaluate_documents(
    model: GPT2,
    split: TokenSplit,
    seq_length: int,
    packing: Packing,
    mesh: Mesh,
    n_rows: int,
    characters_M: np.ndarray | None,
    done: Callable[[int], None] = lambda tokens: None,
) -> list[Evaluation]:
    """Evaluate each document of a split, in order; the sum of all evaluations is the evaluation of the split.

    For a single process. Documents lie in rows as `packing` says; a document that is longer than a row is predicted in
    several segments. `characters_M` is None when not known; `done` gets the predicted tokens of each batch.
    """
    rows = rows_of(split, RowLayout(seq_length, packing))
    lengths_M = np.concatenate([np.zeros(0, np.int64), *split.document_lengths()])
    starts_M = np.cumsum(lengths_M) - lengths_M
    nats_M, correct_M, targets_M = np.zeros((3, len(lengths_M)))

    def make(start: int) -> tuple[np.ndarray, Batch]:
        batch = rows.batch(np.arange(start, start + n_rows))
        documents_BT = _documents(rows, start, batch, starts_M)
        seen = across_documents(batch) if model.cfg.attend_across_documents else batch
        placed = device_batch(mesh, n_rows, lambda first, last: Batch(*(array_BT[first:last] for array_BT in seen)))
        return documents_BT, placed

    for documents_BT, batch in prefetch(make, range(0, rows.n_rows, n_rows)):
        nats_BT, correct_BT = map(np.asarray, each_target(model, batch, -(-n_rows // row_shards(mesh))))
        counted_BT = documents_BT >= 0
        documents = documents_BT[counted_BT]
        np.add.at(nats_M, documents, nats_BT[counted_BT].astype(np.float64))
        np.add.at(correct_M, documents, correct_BT[counted_BT])
        np.add.at(targets_M, documents, 1)
        done(len(documents))
    return [
        Evaluation(
            float(nats), float(correct), int(targets), None if characters_M is None else int(characters_M[number])
        )
        for number, (nats, correct, targets) in enumerate(zip(nats_M, correct_M, targets_M, strict=True))
    ]


def document_lines(name: str, documents: list[Evaluation]) -> Iterator[str]:
    """Yield a line of JSON for each document; a figure that cannot be computed is null."""
    for index, found in enumerate(documents):
        yield json.dumps(
            {
                "data": utf8_name(name),
                "index": index,
                "tokens": found.tokens,
                "characters": found.characters,
                "loss": found.loss if found.tokens else None,
                "perplexity": found.perplexity if found.tokens else None,
                "bits_per_character": found.bits_per_character,
            },
            ensure_ascii=False,
        )


def document_characters(source: str, options: CorpusOptions, tokenizer: Tokenizer, split: TokenSplit) -> np.ndarray:
    """Return the characters of each document of the corpus that `split` was prepared from, int64 (M,).

    Raises:
        UserError: DATA, when the corpus has changed since.
    """
    counts, continues = [], False
    for unit in corpus_units([source], options):
        for batch in unit.batches(lambda problem: None):
            tokens_B = tokenizer.encode_batch(batch.texts).lengths_B
            for place, text in enumerate(batch.texts):
                if place == 0 and continues:
                    counts[-1] += len(text)
                elif tokens_B[place] or (batch.unfinished and place == len(batch.texts) - 1):
                    counts.append(len(text))  # a text of control characters alone is no document
            continues = batch.unfinished
    if (len(counts), sum(counts)) != (split.n_documents, split.n_characters):
        raise UserError(ExitCode.DATA, "the text changed while it was read", source, "run the same command again")
    return np.array(counts, np.int64)


def _documents(rows: Rows, first: int, batch: Batch, starts_M: np.ndarray) -> np.ndarray:
    """Return the number of each target's document, int64 (B, T), -1 where there is no target."""
    documents_BT = np.full(batch.targets_BT.shape, -1)
    for row in range(min(len(documents_BT), rows.n_rows - first)):
        counted_T = batch.targets_BT[row] != IGNORE
        documents_of_segments = np.searchsorted(starts_M, rows.starts(first + row), "right") - 1
        documents_BT[row, counted_T] = documents_of_segments[batch.segments_BT[row, counted_T] - 1]
    return documents_BT


@jax.jit(static_argnames="rows_a_device")
def each_target(model: GPT2, batch: Batch, rows_a_device: int) -> tuple[jax.Array, jax.Array]:
    """Return float32 nats_BT and whether each target was the most likely token; arbitrary where it is IGNORE."""
    tokens_BT, targets_BT, segments_BT, positions_BT = map(jnp.asarray, batch)
    x_BTD = model.hidden(tokens_BT, segments_BT, positions_BT)
    n_rows, length = targets_BT.shape
    columns = max(1, chunk_tokens() // rows_a_device)

    def chunked(array_BT: jax.Array) -> jax.Array:
        missing = -length % columns
        padded_BT = jnp.pad(array_BT, ((0, 0), (0, missing)) + ((0, 0),) * (array_BT.ndim - 2))
        return jnp.moveaxis(padded_BT.reshape(n_rows, -1, columns, *array_BT.shape[2:]), 1, 0)

    def whole(array_CBN: jax.Array) -> jax.Array:
        return jnp.moveaxis(array_CBN, 0, 1).reshape(n_rows, -1)[:, :length]

    def chunk(x_and_labels):
        x_BND, labels_BN = x_and_labels
        logits_BNV = logits(x_BND, model.head_VD, model.cfg.vocab_size)
        label_logits_BN = jnp.take_along_axis(logits_BNV, labels_BN[..., None], -1)[..., 0]
        return jax.nn.logsumexp(logits_BNV, -1) - label_logits_BN, label_logits_BN >= logits_BNV.max(-1)

    nats_CBN, correct_CBN = jax.lax.map(chunk, (chunked(x_BTD), chunked(jnp.maximum(targets_BT, 0))))
    return whole(nats_CBN), whole(correct_CBN)
