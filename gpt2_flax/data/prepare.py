"""Text to a token dataset: each unit of the corpus becomes one shard of each split, in any number of processes.

Whether a document is for validation depends on its text alone, so equal documents land in the same split, and the same
corpus gives the same bytes with any number of workers.
"""

import contextlib
import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np

from gpt2_flax.data.token_dataset import (
    MARKER,
    SPLITS,
    DatasetInfo,
    Shard,
    ShardWriter,
    TokenSplit,
    token_dtype,
    write_info,
)
from gpt2_flax.errors import ExitCode, UserError, io_error
from gpt2_flax.folders import new_folder
from gpt2_flax.progress import progress_bar
from gpt2_flax.text.corpus import Separator, Unit, corpus_units, empty_corpus
from gpt2_flax.text.tokenizer import Tokenizer, load_tokenizer

BATCH_CHARACTERS = 2**18  # encoded together: enough to keep every core busy, little enough to be stopped in a second

Shards = dict[str, Shard]  # one for each split


def prepare(
    sources: Sequence[str],
    tokenizer: Tokenizer,
    output: Path,
    *,
    separator: Separator = "line",
    validation_fraction: float = 0.01,
    workers: int = 1,
    overwrite: bool = False,
    unit_bytes: int | None = None,
) -> DatasetInfo:
    """Writes the dataset folder `output` and returns what its dataset.json says.

    Raises `UserError`: what `corpus_units` and `new_folder` raise, DATA when a split would be empty.
    """
    units = corpus_units(sources, separator, unit_bytes)
    with new_folder(output, MARKER, overwrite) as folder:
        info = _write_shards(folder, sources, units, tokenizer, validation_fraction, workers)
        _check_splits(info, validation_fraction)
        write_info(folder, info)
    return info


def prepare_text(sources: Sequence[str], tokenizer: Tokenizer, folder: Path, separator: Separator) -> TokenSplit:
    """Writes all documents into `folder`, which exists, as one validation split, and returns it opened.

    Raises `UserError` as `corpus_units`.
    """
    units = corpus_units(sources, separator)
    info = _write_shards(folder, sources, units, tokenizer, validation_fraction=1.0, workers=1)
    split = TokenSplit(folder, "validation", info)
    if not split.n_documents:
        raise empty_corpus(sources)
    return split


def _write_shards(
    folder: Path,
    sources: Sequence[str],
    units: Sequence[Unit],
    tokenizer: Tokenizer,
    validation_fraction: float,
    workers: int,
) -> DatasetInfo:
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    job = _Job(folder, validation_fraction)
    with progress_bar("tokenizing", sum(unit.size for unit in units), "B") as advance:
        shards: dict[int, Shards] = {}
        for index, pair in job.run(units) if workers == 1 else _run_in_processes(job, units, workers):
            shards[index] = pair
            advance(units[index].size)
    return DatasetInfo(
        dtype=token_dtype(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        tokenizer_fingerprint=tokenizer.fingerprint,
        sources=[os.fsencode(source).decode("utf-8", "backslashreplace") for source in sources],
        shards={split: [shards[index][split] for index in range(len(units))] for split in SPLITS},
    )


def split_of(document: str, validation_fraction: float) -> str:
    """Returns the split that a document belongs to, a pure function of its text."""
    digest = hashlib.blake2b(document.encode("utf-8"), digest_size=8, person=b"split").digest()
    return SPLITS[int.from_bytes(digest, "little") < validation_fraction * 2**64]


@dataclass(frozen=True)
class _Job:
    """What every unit needs; small enough to send to another process."""

    folder: Path
    validation_fraction: float

    def run(self, units: Sequence[Unit]) -> Iterator[tuple[int, Shards]]:
        tokenizer = load_tokenizer(self.folder / "tokenizer")
        for index, unit in enumerate(units):
            yield index, self.prepare_unit(index, unit, tokenizer)

    def prepare_unit(self, index: int, unit: Unit, tokenizer: Tokenizer, stop: Event | None = None) -> Shards:
        """Writes the shards of one unit. When `stop` is set by then, raises `_Stopped` before the next batch."""
        try:
            with contextlib.ExitStack() as stack:
                writers = {
                    split: stack.enter_context(ShardWriter(self.folder, split, index, tokenizer.vocab_size))
                    for split in SPLITS
                }
                for documents in _batches(unit.documents()):
                    if stop is not None and stop.is_set():
                        raise _Stopped
                    for document, ids in zip(documents, tokenizer.encode_batch(documents), strict=True):
                        if len(ids):
                            framed = np.concatenate(([tokenizer.bos_id], ids, [tokenizer.eos_id]))
                            writers[split_of(document, self.validation_fraction)].add(framed, len(document))
                return {split: writer.close() for split, writer in writers.items()}
        except OSError as error:
            raise io_error(error, self.folder) from error


class _Stopped(Exception):
    """Another unit has failed."""


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _check_splits(info: DatasetInfo, validation_fraction: float) -> None:
    documents = {split: sum(shard.documents for shard in info.shards[split]) for split in SPLITS}
    if not any(documents.values()):
        raise empty_corpus(info.sources)
    for split, change in zip(SPLITS, ("lower", "raise"), strict=True):
        if not documents[split]:
            what = f"no document for the {split} split among {sum(documents.values())}"
            fix = f"{change} --validation-fraction, now {validation_fraction:g}, or bring more text"
            raise UserError(ExitCode.DATA, what, ", ".join(info.sources), fix)


def _run_in_processes(job: _Job, units: Sequence[Unit], workers: int) -> Iterator[tuple[int, Shards]]:
    """As `_Job.run`, in the order of completion. The first failure ends the others at their next batch."""
    context = multiprocessing.get_context("spawn")  # safe whatever threads this process has
    stop = context.Event()
    pool = ProcessPoolExecutor(min(workers, len(units)), context, _start_worker, (job, stop))
    try:
        futures = {pool.submit(_prepare_in_worker, index, unit): index for index, unit in enumerate(units)}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        fix = "it may have run out of memory: take fewer --workers"
        raise UserError(ExitCode.IO, "a worker process died", f"one of {workers} workers", fix) from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


_worker: tuple[_Job, Tokenizer, Event]  # of this process, when it is a worker


def _start_worker(job: _Job, stop: Event) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core is enough
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = job, load_tokenizer(job.folder / "tokenizer"), stop


def _end_with_parent() -> None:
    """A worker would wait for work for ever after its parent has been killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _prepare_in_worker(index: int, unit: Unit) -> Shards:
    job, tokenizer, stop = _worker
    return job.prepare_unit(index, unit, tokenizer, stop)
