"""Exact duplicates in a corpus of any size: every document is hashed, the hashes are sorted and compared in portions.

The first of equal documents, in the order of the corpus, is kept. Documents are taken for equal when 128 bits of
BLAKE2b are: among 10**12 documents a pair of different ones would be dropped with a chance of 10**-15.
Dimension key: N documents.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from gpt2_flax.data.workers import Engine, Tick, run
from gpt2_flax.progress import progress_bar
from gpt2_flax.text.corpus import Unit, identity

_HASH = np.dtype([("high", "<u8"), ("low", "<u8")])
_DOCUMENTS_A_PORTION = 2**23  # about a GiB while they are sorted


def hash_units(units: Sequence[Unit], folder: Path, workers: int | None, engine: Engine) -> list[Path]:
    """Returns one file for each unit, in `folder`, with the hashes of its documents; those that are there are kept.

    A file holds (N,) pairs of uint64 named `high` and `low`. Raises `UserError` as `engines.run`.
    """
    paths = [folder / f"{hashlib.sha256(identity(unit).encode()).hexdigest()}.npy" for unit in units]
    todo = [(index, unit) for index, unit in enumerate(units) if not paths[index].exists()]
    with progress_bar("comparing", sum(unit.size for _, unit in todo), "B") as advance:
        for index, hashes_N in run(engine, _hash_documents, todo, workers, advance):
            _save(paths[index], hashes_N)
    return paths


def find_duplicates(paths: Iterable[Path], portion: int = _DOCUMENTS_A_PORTION) -> list[np.ndarray]:
    """Returns, for each file of hashes, the ascending int64 numbers of the documents that came before.

    About `portion` documents are in memory at a time; the files are read once for each portion.
    """
    files = [np.load(path, mmap_mode="r") for path in paths]
    portions = max(1, -(-sum(map(len, files)) // portion))
    found: list[list[np.ndarray]] = [[] for _ in files]
    for number in range(portions):
        low, high = (2**64 * bound // portions for bound in (number, number + 1))
        hashes, places = [], []
        for index, file in enumerate(files):
            inside_N = (file["high"] >= np.uint64(low)) & (file["high"] <= np.uint64(high - 1))
            documents_N = np.flatnonzero(inside_N)
            hashes.append(file[documents_N])
            places.append(np.stack((np.full(len(documents_N), index), documents_N), axis=1))
        for index, documents_N in _repeated(np.concatenate(hashes), np.concatenate(places)):
            found[index].append(documents_N)
    return [np.sort(np.concatenate(parts)) if parts else np.zeros(0, np.int64) for parts in found]


def _repeated(hashes_N: np.ndarray, places_N2: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """The documents, by file, whose hash an earlier one has; `places_N2` holds file and document, ascending."""
    order_N = np.lexsort((hashes_N["low"], hashes_N["high"]))  # stable: of equal hashes the earliest comes first
    ordered_N = hashes_N[order_N]
    repeated_N = np.zeros(len(order_N), bool)
    repeated_N[1:] = ordered_N[1:] == ordered_N[:-1]
    files_N, documents_N = places_N2[order_N[repeated_N]].T
    return [(int(index), documents_N[files_N == index]) for index in np.unique(files_N)]


def _hash_documents(unit: Unit, tick: Tick) -> np.ndarray:
    digests: list[bytes] = []
    hasher = None  # of a document whose end has not come yet
    for batch in unit.batches(lambda problem: None):
        for left, text in enumerate(batch.texts, start=1 - len(batch.texts)):
            if hasher is None:
                hasher = hashlib.blake2b(digest_size=16, person=b"duplicates")
            hasher.update(text.encode("utf-8"))
            if left or not batch.unfinished:
                digests.append(hasher.digest())
                hasher = None
        tick(batch.n_bytes, 0)
    return np.frombuffer(b"".join(digests), _HASH)


def _save(path: Path, array: np.ndarray) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)
    temporary.rename(path)
