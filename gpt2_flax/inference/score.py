"""Logits of ids, and how well a model predicts texts in memory.

Programs are compiled for a few sizes only, as in `decode`.
Dimension key: B rows, T sequence, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gpt2_flax.checkpoint.weights import model_logits
from gpt2_flax.data.packing import IGNORE, Batch
from gpt2_flax.errors import ExitCode, UserError, quote
from gpt2_flax.inference.decode import compiled_size
from gpt2_flax.inference.evaluation import Evaluation
from gpt2_flax.inference.per_document import each_target
from gpt2_flax.model.gpt2 import GPT2

_MOST_ROWS = 16  # of a batch


def evaluate_texts(model: GPT2, documents: Sequence[Sequence[int]], characters: Sequence[int]) -> list[Evaluation]:
    """Evaluate documents of ids, each by itself.

    A document that is longer than the model can see is predicted in several segments.

    Args:
        model: parameters on one device.
        documents: the ids of each document, with its special ids.
        characters: the number of characters of each document.
    """
    longest = model.cfg.n_positions
    windows = [
        (number, ids[start : start + longest + 1])
        for number, ids in enumerate(documents)
        for start in range(0, len(ids) - 1, longest)
    ]
    windows.sort(key=lambda window: len(window[1]))  # rows of a batch are padded to the longest of them
    nats, correct = np.zeros((2, len(documents)))
    for first in range(0, len(windows), _MOST_ROWS):
        part = windows[first : first + _MOST_ROWS]
        length = min(compiled_size(len(part[-1][1]) - 1, 16), longest)
        batch = Batch(*(np.zeros((compiled_size(len(part), 1), length), np.int32) for _ in Batch._fields))
        batch.targets_BT[:] = IGNORE
        batch.positions_BT[:] = np.arange(length)
        for row, (_, ids) in enumerate(part):
            batch.tokens_BT[row, : len(ids) - 1], batch.targets_BT[row, : len(ids) - 1] = ids[:-1], ids[1:]
            batch.segments_BT[row, : len(ids) - 1] = 1
        with jax.default_matmul_precision("highest"):
            nats_BT, correct_BT = map(np.asarray, each_target(model, batch, len(batch.tokens_BT)))
        for row, (number, ids) in enumerate(part):
            nats[number] += nats_BT[row, : len(ids) - 1].sum(dtype=np.float64)
            correct[number] += correct_BT[row, : len(ids) - 1].sum()
    tokens = [len(ids) - 1 for ids in documents]
    return [Evaluation(*figures) for figures in zip(nats.tolist(), correct.tolist(), tokens, characters, strict=True)]


def logits_of_ids(model: GPT2, ids: Any) -> np.ndarray:
    """Return the float32 logits (T, V) of ids (T,), or (B, T, V) of rows of ids (B, T).

    Raises:
        UserError: DATA for ids of another shape or type, too many in a row, or outside the vocabulary.
    """
    try:
        array = np.asarray(ids)
    except ValueError:  # rows of different lengths
        array = np.zeros(0)
    if array.ndim not in (1, 2) or array.dtype.kind not in "iu" or not array.size:
        raise UserError(ExitCode.DATA, "not ids", quote(ids), "give integers of shape (T,) or (B, T)")
    n_positions, vocab_size, n_columns = model.cfg.n_positions, model.cfg.vocab_size, array.shape[-1]
    if n_columns > n_positions:
        what = f"{n_columns} ids in a row, and the model has {n_positions} positions"
        raise UserError(ExitCode.DATA, what, "ids", f"give at most {n_positions}")
    if array.min() < 0 or array.max() >= vocab_size:
        wrong = int(array.min() if array.min() < 0 else array.max())
        raise UserError(ExitCode.DATA, f"id {wrong} is outside the vocabulary", "ids", f"give 0 to {vocab_size - 1}")
    tokens_BT = np.atleast_2d(array)
    shape = compiled_size(len(tokens_BT), 1), min(compiled_size(n_columns, 16), n_positions)
    padded_BT = np.zeros(shape, np.int32)  # behind the ids, where none of them sees it
    padded_BT[: len(tokens_BT), :n_columns] = tokens_BT
    logits_BTV = model_logits(model, padded_BT)[: len(tokens_BT), :n_columns]
    return logits_BTV[0] if array.ndim == 1 else logits_BTV
