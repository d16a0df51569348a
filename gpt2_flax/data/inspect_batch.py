"""What a model saw at a step of its training, for people: which documents made up each row, decoded."""

import bisect
from collections.abc import Iterator

import numpy as np

from gpt2_flax.config import Config
from gpt2_flax.data.batches import deal
from gpt2_flax.data.dataset import TokenSplit
from gpt2_flax.data.inspect import decoded
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.data.packing import IGNORE, RowLayout
from gpt2_flax.errors import ExitCode, UserError, printable
from gpt2_flax.tokenizers.tokenizer import Tokenizer

BEGIN, END = "⟨begin⟩", "⟨end⟩"


def batch_lines(config: Config, mixture: Mixture, step: int, samples: int) -> Iterator[str]:
    """Yields what step `step`, from 1 as in the log, trains on: the first `samples` rows of its batch.

    It is so of a run that had `data.global_batch_size` rows a step from its beginning.
    Raises `UserError`: USAGE when the run has no such step, DATA when a dataset is damaged.
    """
    data, total = config.data, config.training.total_steps
    if not 1 <= step <= total:
        raise UserError(ExitCode.USAGE, f"there is no step {step}", config.output, f"its steps are 1 to {total}")
    tokenizer = mixture.tokenizer()
    batches = mixture.batches(RowLayout(data.seq_length, data.packing), config.training.seed)
    first, last = (step - 1) * data.global_batch_size, step * data.global_batch_size
    yield (
        f"step {step:,} of {total:,}: samples {first:,} to {last - 1:,}, "
        f"{data.global_batch_size:,} rows of {data.seq_length:,} tokens, packing {data.packing}"
    )
    if config.model.attend_across_documents:
        yield "attention and positions run through whole rows, across documents"
    shown = range(first, min(last, first + samples))
    datasets_B, rows_B = batches.locate(first, last)
    _, numbers_B = deal(np.arange(first, last), mixture.shares)
    places = zip(shown, datasets_B.tolist(), rows_B.tolist(), numbers_B.tolist(), strict=False)
    for sample, dataset, row, number in places:
        rows, folder = batches.rows[dataset], list(mixture.datasets)[dataset]
        tokens_T, targets_T, segments_T, _ = (rows_BT[0] for rows_BT in batches.batch(sample, sample + 1))
        trained_T = targets_T != IGNORE
        yield ""
        place = f"{folder} row {row:,} of {rows.n_rows:,} in epoch {number // rows.n_rows + 1:,}"
        yield f"sample {sample:,}: {place}, {trained_T.sum():,} targets, {(segments_T == 0).sum():,} padding"
        for segment, start in enumerate(rows.starts(row).tolist(), 1):
            inside_T = segments_T == segment
            yield f"  {_place(rows.split, start, int(inside_T.sum()))}, {trained_T[inside_T].sum():,} targets"
            yield f"    {_with_ends(tokens_T[inside_T], tokenizer)}"
    mixture.check_unchanged()


def _place(split: TokenSplit, start: int, length: int) -> str:
    """Which document a part of the stream is of, and how much of it."""
    document = bisect.bisect_right(range(split.n_documents), start, key=lambda number: split.bounds(number)[0]) - 1
    begin, end = split.bounds(document)
    part = f"tokens {start - begin:,} to {start - begin + length - 1:,} of {end - begin:,}"
    return f"document {document:,} of {split.n_documents:,}, {part}"


def _with_ends(ids_T: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of the ids, with signs for where a document begins and ends."""
    signs = {tokenizer.eos_id: END, tokenizer.bos_id: BEGIN}
    places = np.flatnonzero(np.isin(ids_T, list(signs)))
    parts = np.split(ids_T, np.unique(np.concatenate((places, places + 1))))
    return "".join(signs.get(part[0], "") or printable(decoded(part, tokenizer)) for part in parts if len(part))
