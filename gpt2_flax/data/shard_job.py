"""Turning one unit of the corpus into one shard of each split: the work that processes and clusters share.

Dimension key: B texts of a batch, T tokens of the batch.
"""

import contextlib
import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from pydantic import ValidationError

from gpt2_flax.data.dataset_info import SPLITS, Duplicates, Example, LeftOut, Record, Shard
from gpt2_flax.data.dataset_writer import ShardWriter
from gpt2_flax.data.output_folder import OutputFolder
from gpt2_flax.data.workers import Tick
from gpt2_flax.errors import io_error
from gpt2_flax.folders import write_whole
from gpt2_flax.text.corpus import Unit, identity
from gpt2_flax.text.documents import Documents, Problem
from gpt2_flax.tokenizers.ragged_ids import RaggedIds
from gpt2_flax.tokenizers.tokenizer import Tokenizer

RECORDS = "units/"
MOST_EXAMPLES = 100  # of documents that could not be read
DROPPED = len(SPLITS)  # stands for no split where documents have the number of their split


class ShardRecord(Record):
    """The result of a task, written as a file after its shards; `fingerprint` identifies the task."""

    fingerprint: str
    validation_fraction: float
    on_error: str
    shards: dict[str, Shard]
    left_out: LeftOut
    duplicates: Duplicates


@dataclass(frozen=True)
class ShardTask:
    """A unit of the corpus and the ascending int64 numbers of its documents that are dropped as duplicates."""

    index: int
    unit: Unit
    dropped: np.ndarray

    @property
    def fingerprint(self) -> str:
        """Identifies the text of the shards; all tasks of a call read and encode text in the same way."""
        return hashlib.sha256(identity(self.unit).encode() + self.dropped.tobytes()).hexdigest()


def record_name(index: int) -> str:
    """Return the name of a task's record in the output folder."""
    return f"{RECORDS}{index:05d}.json"


@dataclass(frozen=True)
class ShardJob:
    """Does tasks for `workers.run`; raises as `Unit.batches`, and `UserError` if the disk is full."""

    output: OutputFolder
    tokenizer: Tokenizer
    validation_fraction: float
    on_error: str

    def finished(self, task: ShardTask) -> ShardRecord | None:
        """Return the record of an earlier call, None if there is none or it is of another text or way of reading."""
        try:
            record = ShardRecord.model_validate_json(self.output.read(record_name(task.index)))
        except (FileNotFoundError, ValidationError):
            return None
        same_reading = record.on_error == self.on_error or not (record.left_out.skipped or record.left_out.replaced)
        same_splits = record.validation_fraction == self.validation_fraction
        return record if record.fingerprint == task.fingerprint and same_reading and same_splits else None

    def __call__(self, task: ShardTask, tick: Tick) -> ShardRecord:
        size, unknown = self.tokenizer.vocab_size, self.tokenizer.unk_id
        try:
            with self.output.staging() as folder, contextlib.ExitStack() as stack:
                writers = [
                    stack.enter_context(ShardWriter(folder, split, task.index, size, unknown)) for split in SPLITS
                ]
                sorter, problems = _Sorter(task, self.tokenizer, self.validation_fraction, writers), _Problems()
                for batch in task.unit.batches(problems.add):
                    tick(batch.n_bytes, sorter.add(batch))
                record = ShardRecord(
                    fingerprint=task.fingerprint,
                    validation_fraction=self.validation_fraction,
                    on_error=self.on_error,
                    shards={split: writer.close() for split, writer in zip(SPLITS, writers, strict=True)},
                    left_out=LeftOut(skipped=problems.skipped, replaced=problems.replaced, examples=problems.examples),
                    duplicates=Duplicates(documents=len(task.dropped), characters=sorter.dropped_characters),
                )
                write_whole(folder / record_name(task.index), record.model_dump_json().encode())
        except OSError as error:
            raise io_error(error, self.output) from error
        return record


class _Sorter:
    """Encodes the batches of a unit and gives each document, with its special tokens, to the writer of its split."""

    def __init__(self, task: ShardTask, tokenizer: Tokenizer, fraction: float, writers: Sequence[ShardWriter]):
        self._tokenizer, self._fraction, self._writers, self._dropped = tokenizer, fraction, writers, task.dropped
        self._n_begun = 0
        self._open_place: int | None = None  # the place of a document that continues in the next batch
        self.dropped_characters = 0

    def add(self, batch: Documents) -> int:
        """Write a batch and return its number of tokens."""
        texts = batch.texts
        begins_B, ends_B = np.ones((2, len(texts)), bool)
        begins_B[:1], ends_B[-1:] = self._open_place is None, not batch.unfinished
        characters_B = np.fromiter(map(len, texts), np.int64, len(texts))
        places_B = self._places(texts)
        self._open_place = int(places_B[-1]) if batch.unfinished else None
        kept_B = places_B != DROPPED
        if not kept_B.all():
            self.dropped_characters += int(characters_B[~kept_B].sum())
            texts = list(itertools.compress(texts, kept_B))
            begins_B, ends_B, characters_B, places_B = (
                column_B[kept_B] for column_B in (begins_B, ends_B, characters_B, places_B)
            )
        encoded = self._tokenizer.encode_batch(texts)
        places_B[begins_B & ends_B & (encoded.lengths_B == 0)] = DROPPED  # a document of control characters only
        ids_T, lengths_B = _frame(encoded, begins_B, ends_B, self._tokenizer.bos_id, self._tokenizer.eos_id)
        for place, writer in enumerate(self._writers):
            chosen_B = places_B == place
            chosen_ids_T = ids_T if chosen_B.all() else ids_T[np.repeat(chosen_B, lengths_B)]
            starts_B = np.cumsum(lengths_B[chosen_B]) - lengths_B[chosen_B]
            writer.add(chosen_ids_T, starts_B[begins_B[chosen_B]], int(characters_B[chosen_B].sum()))
        return len(ids_T)

    def _places(self, texts: Sequence[str]) -> np.ndarray:
        """Return the number of the split of each text, or `DROPPED`."""
        places_B = in_validation(texts, self._fraction).astype(np.int8)
        documents_B = np.arange(len(texts)) + self._n_begun
        if self._open_place is not None:
            places_B[:1] = self._open_place
            documents_B -= 1
        self._n_begun = int(documents_B[-1]) + 1 if len(texts) else self._n_begun
        places_B[np.isin(documents_B, self._dropped)] = DROPPED
        return places_B


def in_validation(documents: Sequence[str], validation_fraction: float) -> np.ndarray:
    """Return (B,) whether each document is for validation, a function of its text (of its beginning if it is long)."""
    hashes = [hashlib.blake2b(text.encode("utf-8"), digest_size=8, person=b"split").digest() for text in documents]
    limit = math.ceil(validation_fraction * 2**64)  # may need 65 bits
    return np.frombuffer(b"".join(hashes), "<u8") <= np.uint64(limit - 1) if limit else np.zeros(len(hashes), bool)


def _frame(
    encoded: RaggedIds, begins_B: np.ndarray, ends_B: np.ndarray, bos_id: int, eos_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids_T with `bos_id` before each text that begins a document and `eos_id` after each that ends one.

    The second array is the new lengths_B.
    """
    lengths_B = encoded.lengths_B + begins_B + ends_B
    stops_B = np.cumsum(lengths_B)
    first, last = (stops_B - lengths_B)[begins_B], (stops_B - 1)[ends_B]
    ids_T = np.empty(int(lengths_B.sum()), encoded.ids_T.dtype)
    text_T = np.ones(len(ids_T), bool)
    text_T[first] = text_T[last] = False
    ids_T[text_T] = encoded.ids_T
    ids_T[first], ids_T[last] = bos_id, eos_id
    return ids_T, lengths_B


@dataclass
class _Problems:
    """Counts the documents that a reader reports as unreadable."""

    skipped: int = 0
    replaced: int = 0
    examples: list[Example] = field(default_factory=list)

    def add(self, problem: Problem) -> None:
        self.skipped += problem.skipped
        self.replaced += not problem.skipped
        if len(self.examples) < MOST_EXAMPLES:
            self.examples.append(Example(file=problem.file, line=problem.line, reason=problem.reason))
