"""Text for people about the content of a dataset, and about the rows that a training step gets from it.

Dimension key: B documents, N different lengths, T tokens.
"""

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gpt2_flax.config.schema import Config
from gpt2_flax.data.batches import deal
from gpt2_flax.data.dataset import TokenDataset, TokenSplit
from gpt2_flax.data.dataset_info import DatasetInfo, sum_if_known
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.data.packing import IGNORE, Batch, RowLayout, row_layout
from gpt2_flax.errors import ExitCode, UserError, printable
from gpt2_flax.tokenizers.survey import MUCH_UNKNOWN, encoding_lines
from gpt2_flax.tokenizers.tokenizer import Tokenizer

PERCENTS = (0, 1, 5, 25, 50, 75, 95, 99, 100)
SHOWN_CHARACTERS = 200
SHOWN_TOKENS = 1024  # most tokens of a document that are decoded to show its beginning
SHOWN_NAMES = 10
FEW_TOKENS = 20_000  # with fewer validation tokens, chance alone changes the loss by some hundredths
BEGIN, END = "⟨begin⟩", "⟨end⟩"

_QUANTILES = {0: "least", 50: "median", 100: "most"}
_SHORT = 2**16  # smaller lengths are counted in a table


@dataclass(frozen=True)
class RowFigures:
    """A split in rows of `length` tokens to train on."""

    length: int
    kept: float
    """The share of tokens that remain if each document is cut at `length`."""
    padded_rows: int
    """The number of rows of length + 1 tokens if no row holds two documents and the last row of each is padded."""
    padding: float
    """The share of the `length` positions of those rows that hold no token."""
    packed_rows: int
    """The number of rows if documents share rows."""


@dataclass(frozen=True)
class SplitFigures:
    """Counts of a split; for each of `PERCENTS`, that share of documents has at most `quantiles` tokens."""

    documents: int
    characters: int | None
    tokens: int
    unknown: int
    quantiles: tuple[int, ...]
    rows: tuple[RowFigures, ...]


def split_figures(split: TokenSplit, lengths: Sequence[int] = (128, 1024)) -> SplitFigures:
    """Compute exact figures in bounded memory; this reads document starts, but no tokens.

    Raises `UserError` (DATA) if document starts are damaged.
    """
    tokens_N, documents_N = _histogram(split.document_lengths())
    quantiles: tuple[int, ...] = ()
    if split.n_documents:
        up_to_N = np.cumsum(documents_N)
        ranks = [max(1, -(-int(up_to_N[-1]) * percent // 100)) for percent in PERCENTS]
        quantiles = tuple(tokens_N[np.searchsorted(up_to_N, ranks)].tolist())
    rows = tuple(_rows(tokens_N, documents_N, length) for length in lengths)
    return SplitFigures(split.n_documents, split.n_characters, split.n_tokens, split.n_unknown, quantiles, rows)


def inspection_lines(dataset: TokenDataset, samples: int = 3) -> Iterator[str]:
    """Yield a description of a dataset, with the beginnings of up to `samples` documents of each split.

    Raises `UserError` (DATA) if document starts or the tokenizer are damaged, and at the end if a file changed
    meanwhile.
    """
    info, splits, tokenizer = dataset.info, (dataset.train, dataset.validation), dataset.tokenizer()
    special = {"begin": info.bos_id, "end": info.eos_id, "unknown": info.unk_id}
    sizes = [path.stat().st_size for path in dataset.folder.rglob("*") if path.is_file()]
    more = f" and {len(info.sources) - SHOWN_NAMES:,} more" if len(info.sources) > SHOWN_NAMES else ""
    yield f"sources       {printable(', '.join(info.sources[:SHOWN_NAMES]))}{more}"
    ids = ", ".join(f"{name} {'none' if token is None else token}" for name, token in special.items())
    yield f"vocabulary    {info.vocab_size:,}; {ids}"
    yield f"ids           {info.dtype}"
    yield f"on disk       {sum(sizes):,} bytes in {len(sizes):,} files"
    if info.encodings:
        yield f"encodings     {', '.join(encoding_lines(info.encodings))}"
    yield from left_out_lines(info)
    yield ""
    columns = (_cells(split.name, split_figures(split)) for split in splits)
    for cells in zip(*columns, strict=True):
        yield f"{cells[0][0]:22}" + "".join(f"{value:>26}" for _, value in cells)
    for split in splits:
        for number in _spread(split.n_documents, samples):
            start, stop = split.bounds(number)
            text = decoded(split.read(start, min(stop, start + SHOWN_TOKENS)), tokenizer)
            shown = text[:SHOWN_CHARACTERS] + ("..." if len(text) > SHOWN_CHARACTERS else "")
            yield ""
            yield f"{split.name} document {number:,} of {split.n_documents:,}, {stop - start:,} tokens"
            yield f"  {printable(shown)}"
    dataset.check_unchanged()


def inspection_values(dataset: TokenDataset) -> dict[str, Any]:
    """Return the counts of `inspection_lines` as JSON can hold them.

    Raises `UserError` (DATA) if document starts are damaged or a file changed meanwhile.
    """
    info = dataset.info
    splits = {split.name: asdict(split_figures(split)) for split in (dataset.train, dataset.validation)}
    for figures in splits.values():
        figures["quantiles"] = dict(zip(map(str, PERCENTS), figures["quantiles"], strict=False))
    dataset.check_unchanged()
    return {
        "sources": list(info.sources),
        "vocab_size": info.vocab_size,
        "bos_id": info.bos_id,
        "eos_id": info.eos_id,
        "unk_id": info.unk_id,
        "splits": splits,
    }


def batch_lines(config: Config, mixture: Mixture, step: int, samples: int) -> Iterator[str]:
    """Yield the first `samples` rows of the batch of a training step, decoded, with the documents in them.

    Args:
        config: The config of the run, which must have had `data.global_batch_size` rows a step from its beginning.
        mixture: The datasets of the run.
        step: The number of the step, from 1 as in the log.
        samples: The number of rows to show.

    Raises:
        UserError: USAGE if the run has no such step, DATA if a dataset is damaged.
    """
    data, total = config.data, config.training.total_steps
    if not 1 <= step <= total:
        raise UserError(ExitCode.USAGE, f"there is no step {step}", config.output, f"its steps are 1 to {total}")
    tokenizer = mixture.tokenizer()
    layout, of_documents = row_layout(config), RowLayout(data.seq_length, data.packing)
    batches = mixture.batches(layout, config.training.seed, data.prompt_separator)
    plain = batches if layout == of_documents else mixture.batches(of_documents, config.training.seed)
    first, last = (step - 1) * data.global_batch_size, step * data.global_batch_size
    yield (
        f"step {step:,} of {total:,}: samples {first:,} to {last - 1:,}, "
        f"{data.global_batch_size:,} rows of {data.seq_length:,} tokens, packing {data.packing}"
    )
    if step <= config.growth_steps and config.growth.seq_length:
        yield f"before growth: the model sees each row as rows of {config.growth.seq_length:,} tokens"
    if config.model.attend_across_documents:
        yield "attention and positions run through whole rows, across documents"
    shown = range(first, min(last, first + samples))
    datasets_B, rows_B = batches.locate(first, last)
    _, numbers_B = deal(np.arange(first, last), mixture.shares)
    places = zip(shown, datasets_B.tolist(), rows_B.tolist(), numbers_B.tolist(), strict=False)
    for sample, dataset, row, number in places:
        rows, folder = plain.rows[dataset], list(mixture.datasets)[dataset]
        tokens_T, targets_T, segments_T, _ = seen = Batch(*(x_BT[0] for x_BT in batches.batch(sample, sample + 1)))
        documents_T, inserted_T = _documents(seen, Batch(*(x_BT[0] for x_BT in rows.batch(np.array([row])))))
        trained_T = targets_T != IGNORE
        yield ""
        place = f"{folder} row {row:,} of {rows.n_rows:,} in epoch {number // rows.n_rows + 1:,}"
        yield f"sample {sample:,}: {place}, {trained_T.sum():,} targets, {(segments_T == 0).sum():,} padding"
        for document, start in enumerate(rows.starts(row).tolist(), 1):
            inside_T = documents_T == document
            if not inside_T.any():  # its only token made room for an inserted one
                continue
            n_inserted = int(inserted_T[inside_T].sum())
            place = _place(rows.split, start, int(inside_T.sum()) - n_inserted)
            note = f", {END} inserted" if n_inserted else ""
            yield f"  {place}, {trained_T[inside_T].sum():,} targets{note}"
            yield f"    {_with_ends(tokens_T[inside_T], tokenizer)}"
    mixture.check_unchanged()


def decoded(ids_T: np.ndarray, tokenizer: Tokenizer) -> str:
    """Return the text of the ids, with U+FFFD for each unknown token, which `decode` may omit."""
    runs = np.split(ids_T, np.flatnonzero(ids_T == (-1 if tokenizer.unk_id is None else tokenizer.unk_id)))
    return "\ufffd".join(tokenizer.decode(run[bool(number) :].tolist()) for number, run in enumerate(runs))


def split_line(info: DatasetInfo, split: str) -> str:
    """Return the counts of a split in one line."""
    shards = info.shards[split]
    documents, tokens = sum(shard.documents for shard in shards), sum(shard.tokens for shard in shards)
    count = sum_if_known(shard.characters for shard in shards)
    characters = "" if count is None else f"{count:,} characters, "
    return f"{split}: {documents:,} documents, {characters}{tokens:,} tokens"


def summary_lines(output: object, info: DatasetInfo) -> Iterator[str]:
    """Yield the counts of the new dataset `output`, and warnings of facts that may surprise its user."""
    for split in info.shards:
        yield f"{output} {split_line(info, split)}"
    if info.unknown_share is not None:
        unknown = sum(shard.unknown for shards in info.shards.values() for shard in shards)
        warning = "warning: " if info.unknown_share > MUCH_UNKNOWN else ""
        yield f"{warning}unknown tokens: {unknown:,} ({info.unknown_share:.2%})"
    yield from left_out_lines(info)
    held = info.n_tokens("validation")
    if not held:
        yield "no validation split: training on this dataset has no validation loss"
    elif held < FEW_TOKENS:
        yield f"warning: the validation split has {held:,} tokens, below {FEW_TOKENS:,}: its figures will be noisy"


def left_out_lines(info: DatasetInfo) -> Iterator[str]:
    """Yield the counts of documents that were left out or changed, if there are any."""
    left_out, duplicates = info.left_out, info.duplicates
    if left_out.skipped or left_out.replaced:
        yield f"unreadable    {left_out.skipped:,} documents left out, {left_out.replaced:,} mended with U+FFFD"
        for example in left_out.examples[:SHOWN_NAMES]:
            yield f"              {printable(f'{example.file}:{example.line}: {example.reason}')}"
    if duplicates is not None:
        yield f"duplicates    {duplicates.documents:,} documents left out, {duplicates.characters:,} characters"


def _histogram(lengths: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the different lengths, ascending, and the number of documents of each, both int64 (N,)."""
    short, long = np.zeros(_SHORT, np.int64), [np.zeros(0, np.int64)]
    for lengths_B in lengths:
        short += np.bincount(lengths_B[lengths_B < _SHORT], minlength=_SHORT)
        long.append(lengths_B[lengths_B >= _SHORT])
    tokens_N, documents_N = np.unique(np.concatenate(long), return_counts=True)
    used = np.flatnonzero(short)
    return np.concatenate((used, tokens_N)), np.concatenate((short[used], documents_N))


def _rows(tokens_N: np.ndarray, documents_N: np.ndarray, length: int) -> RowFigures:
    full_N, rest_N = np.divmod(tokens_N, length + 1)
    rows = int(((full_N + (rest_N > 0)) * documents_N).sum())
    empty = int(((rest_N > 0) * (length - rest_N) * documents_N).sum())
    tokens = int((tokens_N * documents_N).sum())
    kept = int((np.minimum(tokens_N, length) * documents_N).sum())
    packed = -(-(tokens - 1) // length) if tokens else 0
    return RowFigures(length, kept / max(1, tokens), rows, empty / max(1, rows * length), packed)


def _spread(count: int, samples: int) -> list[int]:
    """Return up to `samples` of the numbers below `count`, evenly spaced."""
    return list(dict.fromkeys((2 * i + 1) * count // (2 * samples) for i in range(samples))) if count else []


def _cells(name: str, figures: SplitFigures) -> Iterator[tuple[str, str]]:
    """Yield the label and the cell of each line of a column of the table."""
    documents, characters, tokens = figures.documents, figures.characters, figures.tokens
    yield "", name
    yield "documents", f"{documents:,}"
    yield "characters", "not known" if characters is None else f"{characters:,}"
    yield "tokens", f"{tokens:,}"
    yield "unknown tokens", f"{figures.unknown:,} ({figures.unknown / max(1, tokens):.2%})"
    yield "characters a token", "not known" if characters is None else f"{characters / max(1, tokens):.2f}"
    yield "tokens a document", f"{tokens / max(1, documents):.1f}"
    for percent, quantile in zip(PERCENTS, figures.quantiles or itertools.repeat(0), strict=False):
        yield f"  {_QUANTILES.get(percent, f'{percent}% have up to')}", f"{quantile:,}"
    for row in figures.rows:
        yield f"in rows of {row.length:,}", f"{row.packed_rows:,} rows"
        yield "  a document in each", f"{row.padded_rows:,} rows, {row.padding:.1%} empty"
        yield "  ... and cut there", f"{row.kept:.1%} of tokens kept"


def _documents(seen: Batch[np.ndarray], plain: Batch[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return for each position of a row the number of its document, int32, and whether its token was inserted.

    Args:
        seen: a row as the model sees it; arrays of shape (T,).
        plain: the same row in segments of one document, without inserted tokens.
    """
    documents_T, inserted_T = plain.segments_BT.copy(), np.zeros(plain.tokens_BT.shape, bool)
    changed = np.flatnonzero(seen.tokens_BT != plain.tokens_BT)
    segments, firsts = np.unique(seen.segments_BT[changed], return_index=True)
    for segment, place in zip(segments, changed[firsts], strict=True):  # the token there is never an eos without it
        inserted_T[place] = True
        end = np.flatnonzero(seen.segments_BT == segment)[-1] + 1
        documents_T[place + 1 : end] = plain.segments_BT[place : end - 1]
    return documents_T, inserted_T


def _place(split: TokenSplit, start: int, length: int) -> str:
    """Describe which document a segment of the stream is of, and which of its tokens."""
    document = bisect.bisect_right(range(split.n_documents), start, key=lambda number: split.bounds(number)[0]) - 1
    begin, end = split.bounds(document)
    tokens = f"tokens {start - begin:,} to {start - begin + length - 1:,} of {end - begin:,}"
    return f"document {document:,} of {split.n_documents:,}, {tokens}"


def _with_ends(ids_T: np.ndarray, tokenizer: Tokenizer) -> str:
    """Return the text of the ids, with signs where a document begins and ends."""
    signs = {tokenizer.eos_id: END, tokenizer.bos_id: BEGIN}
    places = np.flatnonzero(np.isin(ids_T, list(signs)))
    runs = np.split(ids_T, np.unique(np.concatenate((places, places + 1))))
    return "".join(signs.get(run[0], "") or printable(decoded(run, tokenizer)) for run in runs if len(run))
