"""Search for exact duplicates in a corpus of any size: documents are hashed, and hashes are sorted in portions.

The first of equal documents, in the order of the corpus, is kept. Documents count as equal if 128 bits of BLAKE2b are
equal: among 10**12 documents, the chance that any two different ones collide is 10**-15.
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
_DOCUMENTS_A_PORTION = 2**23  # sorting these takes about 1 GiB


def hash_units(units: Sequence[Unit], folder: Path, workers: int | None, engine: Engine) -> list[Path]:
    """Write a file in `folder` for each unit, with the hashes of its documents, and return the paths of all files.

    A file that exists is not written again. It holds (N,) pairs of uint64, `high` and `low`. Raises `UserError` as
    `workers.run`.
    """
    paths = [folder / f"{hashlib.sha256(identity(unit).encode()).hexdigest()}.npy" for unit in units]
    todo = [(index, unit) for index, unit in enumerate(units) if not paths[index].exists()]
    with progress_bar("comparing", sum(unit.size for _, unit in todo), "B") as advance:
        for index, hashes_N in run(engine, _hash_documents, todo, workers, advance):
            temporary = paths[index].with_suffix(".tmp")
            with open(temporary, "wb") as file:
                np.save(file, hashes_N, allow_pickle=False)
            temporary.rename(paths[index])
    return paths


def find_duplicates(paths: Iterable[Path], portion: int = _DOCUMENTS_A_PORTION) -> list[np.ndarray]:
    """Return, for each file of hashes, the ascending int64 numbers of documents with an equal earlier document.

    The hashes of about `portion` documents are in memory at a time; the files are read once for each portion.
    """
    files = [np.load(path, mmap_mode="r") for path in paths]
    bounds = np.cumsum([0, *map(len, files)])
    is_repeated_N = np.zeros(bounds[-1], bool)  # of the documents of all files
    portions = max(1, -(-int(bounds[-1]) // portion))
    for number in range(portions):
        low, high = (2**64 * bound // portions for bound in (number, number + 1))
        insides = [
            np.flatnonzero((file["high"] >= np.uint64(low)) & (file["high"] <= np.uint64(high - 1))) for file in files
        ]
        hashes_N = np.concatenate([file[inside_N] for file, inside_N in zip(files, insides, strict=True)])
        documents_N = np.concatenate([first + inside_N for first, inside_N in zip(bounds[:-1], insides, strict=True)])
        order_N = np.lexsort((hashes_N["low"], hashes_N["high"]))  # stable: the earliest of equal hashes comes first
        hashes_N = hashes_N[order_N]
        is_repeated_N[documents_N[order_N[1:]][hashes_N[1:] == hashes_N[:-1]]] = True
    return [np.flatnonzero(file_N) for file_N in np.split(is_repeated_N, bounds[1:-1])]


def _hash_documents(unit: Unit, tick: Tick) -> np.ndarray:
    digests: list[bytes] = []
    hasher = None  # of a document that continues in the next batch
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
