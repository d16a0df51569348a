"""What a prepared dataset holds, for people: counts, lengths of documents, unknown tokens, some of its text.

Dimension key: B documents, N different lengths, T tokens.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gpt2_flax.data.dataset import TokenDataset, TokenSplit
from gpt2_flax.data.dataset_info import MARKER, DatasetInfo
from gpt2_flax.errors import ExitCode, UserError, printable
from gpt2_flax.tokenizers.survey import MUCH_UNKNOWN, encoding_lines
from gpt2_flax.tokenizers.tokenizer import Tokenizer, load_tokenizer

PERCENTS = (0, 1, 5, 25, 50, 75, 95, 99, 100)
SHOWN_CHARACTERS = 200
SHOWN_TOKENS = 1024  # decoded for that, however long the document
SHOWN_NAMES = 10
FEW_TOKENS = 20_000  # of the validation split: its loss is then off by some hundredths by chance

_QUANTILES = {0: "least", 50: "median", 100: "most"}
_SHORT = 2**16  # lengths below are counted in a table


@dataclass(frozen=True)
class RowFigures:
    """What becomes of a split in rows of `length` tokens to train on."""

    length: int
    kept: float
    """Share of the tokens left if each document is cut at `length`."""
    padded_rows: int
    """If no row holds two documents: each is cut in rows of length + 1 tokens, of which the last is padded."""
    padding: float
    """Share of the `length` positions of those rows that hold no token."""
    packed_rows: int
    """If documents share rows."""


@dataclass(frozen=True)
class SplitFigures:
    """`quantiles` has the tokens of a document for each of `PERCENTS`: so many percent of documents have no more."""

    documents: int
    characters: int | None
    tokens: int
    unknown: int
    quantiles: tuple[int, ...]
    rows: tuple[RowFigures, ...]


def split_figures(split: TokenSplit, lengths: Sequence[int] = (128, 1024)) -> SplitFigures:
    """Returns exact figures; reads where documents start, not the tokens, in bounded memory.

    Raises `UserError` (DATA) when document starts are damaged.
    """
    tokens_N, documents_N = _histogram(split.document_lengths())
    quantiles = _quantiles(tokens_N, documents_N) if split.n_documents else ()
    rows = tuple(_rows(tokens_N, documents_N, length) for length in lengths)
    return SplitFigures(split.n_documents, split.n_characters, split.n_tokens, split.n_unknown, quantiles, rows)


def inspection_lines(dataset: TokenDataset, samples: int = 3, lengths: Sequence[int] = (128, 1024)) -> Iterator[str]:
    """Yields what there is to say of a dataset, with the beginnings of up to `samples` documents of each split.

    Raises `UserError` (DATA) for damaged document starts, a tokenizer that is missing or not the dataset's, and at the
    end when a file changed meanwhile.
    """
    info, splits, tokenizer = dataset.info, (dataset.train, dataset.validation), dataset_tokenizer(dataset)
    special = {"begin": info.bos_id, "end": info.eos_id, "unknown": info.unk_id}
    yield f"sources       {_names(info.sources)}"
    yield f"vocabulary    {info.vocab_size:,}; " + ", ".join(f"{name} {_or_none(id_)}" for name, id_ in special.items())
    yield f"ids           {info.dtype}"
    yield f"on disk       {_size(dataset)}"
    if info.encodings:
        yield f"encodings     {', '.join(encoding_lines(info.encodings))}"
    yield from left_out_lines(info)
    yield ""
    yield from _table([(split.name, split_figures(split, lengths)) for split in splits])
    for split in splits:
        for number in _spread(split.n_documents, samples):
            start, stop = split.bounds(number)
            text = decoded(split.read(start, min(stop, start + SHOWN_TOKENS)), tokenizer)
            shown = text[:SHOWN_CHARACTERS] + ("..." if len(text) > SHOWN_CHARACTERS else "")
            yield ""
            yield f"{split.name} document {number:,} of {split.n_documents:,}, {stop - start:,} tokens"
            yield f"  {printable(shown)}"
    dataset.check_unchanged()


def dataset_tokenizer(dataset: TokenDataset) -> Tokenizer:
    """Returns the tokenizer in the folder; raises `UserError` (DATA) when it is missing or another one than made it."""
    tokenizer = load_tokenizer(dataset.tokenizer_folder)
    if tokenizer.fingerprint != dataset.info.tokenizer_fingerprint:
        what = f"tokenizer is not the one that {MARKER} names"
        raise UserError(ExitCode.DATA, what, dataset.tokenizer_folder, "prepare the dataset again")
    return tokenizer


def decoded(ids_T: np.ndarray, tokenizer: Tokenizer) -> str:
    """Returns the text of the ids, with U+FFFD for each unknown token, which `decode` may leave out."""
    parts = np.split(ids_T, np.flatnonzero(ids_T == (-1 if tokenizer.unk_id is None else tokenizer.unk_id)))
    return "\ufffd".join(tokenizer.decode(part[bool(number) :].tolist()) for number, part in enumerate(parts))


def split_line(info: DatasetInfo, split: str) -> str:
    """Returns the counts of a split in one line."""
    shards = info.shards[split]
    documents, tokens = sum(shard.documents for shard in shards), sum(shard.tokens for shard in shards)
    known = [shard.characters for shard in shards if shard.characters is not None]
    characters = f"{sum(known):,} characters, " if len(known) == len(shards) else ""
    return f"{split}: {documents:,} documents, {characters}{tokens:,} tokens"


def summary_lines(output: object, info: DatasetInfo) -> Iterator[str]:
    """Yields what became of the sources in the dataset `output`, and warnings of what may surprise."""
    for split in info.shards:
        yield f"{output} {split_line(info, split)}"
    if info.unknown_share is not None:
        unknown = sum(shard.unknown for shards in info.shards.values() for shard in shards)
        warning = "warning: " if info.unknown_share > MUCH_UNKNOWN else ""
        yield f"{warning}unknown tokens: {unknown:,} ({info.unknown_share:.2%})"
    yield from left_out_lines(info)
    held = sum(shard.tokens for shard in info.shards["validation"])
    if not held:
        yield "no validation split: training on this dataset has no validation loss"
    elif held < FEW_TOKENS:
        yield f"warning: the validation split has {held:,} tokens, below {FEW_TOKENS:,}: its figures will be noisy"


def left_out_lines(info: DatasetInfo) -> Iterator[str]:
    """Yields what of the sources is not in the dataset as it was, if there is such."""
    left_out, duplicates = info.left_out, info.duplicates
    if left_out.skipped or left_out.replaced:
        yield f"unreadable    {left_out.skipped:,} documents left out, {left_out.replaced:,} mended with U+FFFD"
        for example in left_out.examples[:SHOWN_NAMES]:
            yield f"              {printable(f'{example.file}:{example.line}: {example.reason}')}"
    if duplicates is not None:
        yield f"duplicates    {duplicates.documents:,} documents left out, {duplicates.characters:,} characters"


def _histogram(lengths: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The different lengths, ascending, and how many documents have each, both int64 (N,)."""
    short, long = np.zeros(_SHORT, np.int64), [np.zeros(0, np.int64)]
    for lengths_B in lengths:
        short += np.bincount(lengths_B[lengths_B < _SHORT], minlength=_SHORT)
        long.append(lengths_B[lengths_B >= _SHORT])
    tokens_N, documents_N = np.unique(np.concatenate(long), return_counts=True)
    used = np.flatnonzero(short)
    return np.concatenate((used, tokens_N)), np.concatenate((short[used], documents_N))


def _quantiles(tokens_N: np.ndarray, documents_N: np.ndarray) -> tuple[int, ...]:
    up_to_N = np.cumsum(documents_N)
    ranks = [max(1, -(-int(up_to_N[-1]) * percent // 100)) for percent in PERCENTS]
    return tuple(tokens_N[np.searchsorted(up_to_N, ranks)].tolist())


def _rows(tokens_N: np.ndarray, documents_N: np.ndarray, length: int) -> RowFigures:
    full_N, rest_N = np.divmod(tokens_N, length + 1)
    rows = int(((full_N + (rest_N > 0)) * documents_N).sum())
    empty = int(((rest_N > 0) * (length - rest_N) * documents_N).sum())
    tokens = int((tokens_N * documents_N).sum())
    kept = int((np.minimum(tokens_N, length) * documents_N).sum())
    packed = -(-(tokens - 1) // length) if tokens else 0
    return RowFigures(length, kept / max(1, tokens), rows, empty / max(1, rows * length), packed)


def _spread(count: int, samples: int) -> list[int]:
    """Up to `samples` of the numbers below `count`, evenly spaced."""
    return list(dict.fromkeys((2 * i + 1) * count // (2 * samples) for i in range(samples))) if count else []


def _table(columns: Sequence[tuple[str, SplitFigures]]) -> Iterator[str]:
    for cells in zip(*(_cells(name, figures) for name, figures in columns), strict=True):
        yield f"{cells[0][0]:22}" + "".join(f"{value:>26}" for _, value in cells)


def _cells(name: str, figures: SplitFigures) -> Iterator[tuple[str, str]]:
    """One column of the table: a label for the whole line and what stands in it."""
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


def _names(sources: Sequence[str]) -> str:
    more = f" and {len(sources) - SHOWN_NAMES:,} more" if len(sources) > SHOWN_NAMES else ""
    return printable(", ".join(sources[:SHOWN_NAMES])) + more


def _or_none(token: int | None) -> str:
    return "none" if token is None else str(token)


def _size(dataset: TokenDataset) -> str:
    sizes = [path.stat().st_size for path in dataset.folder.rglob("*") if path.is_file()]
    return f"{sum(sizes):,} bytes in {len(sizes):,} files"
