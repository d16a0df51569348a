"""Read corpora, checking the promises of each batch, and compress files."""

import bz2
import contextlib
import gzip
import itertools
import lzma
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt2_flax.text import compression, corpus, documents, encodings
from gpt2_flax.text.compression import zstd_module
from gpt2_flax.text.documents import CorpusOptions, Problem

PACK = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: zstd_module().compress(data, options={zstd_module().CompressionParameter.checksum_flag: 1}),
}


def read(*sources: Path | str, unit_bytes: int | None = None, **options: str) -> tuple[list[str], list[Problem]]:
    """Return all documents, with long documents joined, and the reported faults."""
    problems: list[Problem] = []
    texts: list[str] = []
    for unit in corpus.corpus_units([str(source) for source in sources], CorpusOptions(**options), unit_bytes):
        batches = list(pickle.loads(pickle.dumps(unit)).batches(problems.append))
        assert sum(batch.n_bytes for batch in batches) == unit.size
        assert min((batch.n_bytes for batch in batches), default=0) >= 0
        unfinished = False
        for batch in batches:
            assert all(0 < len(text) <= documents.SLICE_CHARACTERS for text in batch.texts)
            assert batch.texts or not (unfinished or batch.unfinished)
            more = list(batch.texts)
            if unfinished:
                texts[-1] += more.pop(0)
            texts += more
            unfinished = batch.unfinished
        assert not unfinished
    assert all(text.strip() for text in texts)
    return texts, problems


def read_texts(*sources: Path | str, **options) -> list[str]:
    """Return all documents of a corpus without faults."""
    texts, problems = read(*sources, **options)
    assert problems == []
    return texts


def slices(path: Path, **options: str) -> list[str]:
    """Return the texts of a file, long documents in slices."""
    units = corpus.corpus_units([str(path)], CorpusOptions(**options))
    batches = (unit.batches(pytest.fail) for unit in units)
    return [text for batch in itertools.chain.from_iterable(batches) for text in batch.texts]


@contextlib.contextmanager
def sizes(block: int = encodings.BLOCK_BYTES, in_slice: int = documents.SLICE_CHARACTERS) -> Iterator[None]:
    """Read `block` bytes at once, and cut documents into slices of at most `in_slice` characters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encodings, "BLOCK_BYTES", block)
        patch.setattr(compression, "READ_BYTES", block)
        patch.setattr(documents, "BATCH_CHARACTERS", block)
        patch.setattr(documents, "SLICE_CHARACTERS", in_slice)
        yield
