"""One unit of the corpus becomes one shard of each split: the work that processes and clusters share.

Dimension key: B texts of a batch, T tokens of them.
"""

import contextlib
import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import ValidationError

from gpt2_flax.data.dataset_info import SPLITS, Duplicates, Example, LeftOut, Record, Shard
from gpt2_flax.data.output_folder import Storage
from gpt2_flax.data.shards import ShardWriter
from gpt2_flax.data.workers import Tick
from gpt2_flax.errors import io_error
from gpt2_flax.folders import write_whole
from gpt2_flax.text.corpus import Unit, identity
from gpt2_flax.text.documents import Documents, Problem
from gpt2_flax.tokenizers.ragged_ids import RaggedIds
from gpt2_flax.tokenizers.tokenizer import Tokenizer

RECORDS = "units/"
MOST_EXAMPLES = 100  # of what was left out
DROPPED = len(SPLITS)  # the place among the splits of a document that goes into none


def record_name(index: int) -> str:
    """Returns the name of a unit's record in the dataset that is being made."""
    return f"{RECORDS}{index:05d}.json"


class UnitRecord(Record):
    """What was made of a unit, in a file that is written last; `fingerprint` is of what it was made from."""

    fingerprint: str
    on_error: str
    shards: dict[str, Shard]
    left_out: LeftOut
    duplicates: Duplicates


@dataclass(frozen=True)
class UnitTask:
    """`dropped` are the ascending int64 numbers of the unit's documents that are left out as duplicates."""

    index: int
    unit: Unit
    dropped: np.ndarray

    @property
    def fingerprint(self) -> str:
        """Of the text that goes into the shards. How to read and encode it, all tasks of a call have in common."""
        return hashlib.sha256(identity(self.unit).encode() + self.dropped.tobytes()).hexdigest()

    @property
    def record_name(self) -> str:
        return record_name(self.index)


@dataclass(frozen=True)
class UnitWork:
    """Turns tasks into records, see `engines.run`; raises what `Unit.batches` does and `UserError` for full disks."""

    storage: Storage
    tokenizer: Tokenizer
    validation_fraction: float
    on_error: str

    def finished(self, task: UnitTask) -> UnitRecord | None:
        """Returns the record that an earlier call left, unless it is of another text or was read in another way."""
        try:
            record = UnitRecord.model_validate_json(self.storage.read(task.record_name))
        except (FileNotFoundError, ValidationError):
            return None
        same_reading = record.on_error == self.on_error or not (record.left_out.skipped or record.left_out.replaced)
        return record if record.fingerprint == task.fingerprint and same_reading else None

    def __call__(self, task: UnitTask, tick: Tick) -> UnitRecord:
        try:
            with self.storage.staging() as folder, contextlib.ExitStack() as stack:
                size, unknown = self.tokenizer.vocab_size, self.tokenizer.unk_id
                writers = [
                    stack.enter_context(ShardWriter(folder, split, task.index, size, unknown)) for split in SPLITS
                ]
                sorter, problems = _Sorter(task, self, writers), _Problems()
                for batch in task.unit.batches(problems.add):
                    tick(batch.n_bytes, sorter.add(batch))
                record = UnitRecord(
                    fingerprint=task.fingerprint,
                    on_error=self.on_error,
                    shards={split: writer.close() for split, writer in zip(SPLITS, writers, strict=True)},
                    left_out=problems.result(),
                    duplicates=Duplicates(documents=len(task.dropped), characters=sorter.dropped_characters),
                )
                write_whole(folder / task.record_name, record.model_dump_json().encode())
        except OSError as error:
            raise io_error(error, self.storage.where) from error
        return record


class _Sorter:
    """Encodes the batches of one unit and hands each document, framed, to the writer of its split."""

    def __init__(self, task: UnitTask, work: UnitWork, writers: Sequence[ShardWriter]):
        self._tokenizer, self._fraction, self._writers = work.tokenizer, work.validation_fraction, writers
        self._dropped = task.dropped
        self._begun = 0  # documents so far
        self._place: int | None = None  # of a document whose end has not come yet
        self.dropped_characters = 0

    def add(self, batch: Documents) -> int:
        """Returns the number of tokens that `batch` became."""
        texts = batch.texts
        begins_B, ends_B = np.ones((2, len(texts)), bool)
        begins_B[:1], ends_B[-1:] = self._place is None, not batch.unfinished
        characters_B = np.fromiter(map(len, texts), np.int64, len(texts))
        places_B = self._places(texts)
        self._place = int(places_B[-1]) if batch.unfinished else None
        kept_B = places_B != DROPPED
        if not kept_B.all():
            self.dropped_characters += int(characters_B[~kept_B].sum())
            texts = list(itertools.compress(texts, kept_B))
            begins_B, ends_B, characters_B, places_B = (
                column_B[kept_B] for column_B in (begins_B, ends_B, characters_B, places_B)
            )
        encoded = self._tokenizer.encode_batch(texts)
        places_B[begins_B & ends_B & (encoded.lengths_B == 0)] = DROPPED  # nothing but control characters, say
        ids_T, lengths_B = _frame(encoded, begins_B, ends_B, self._tokenizer.bos_id, self._tokenizer.eos_id)
        for place, writer in enumerate(self._writers):
            chosen_B = places_B == place
            chosen_ids_T = ids_T if chosen_B.all() else ids_T[np.repeat(chosen_B, lengths_B)]
            starts_B = np.cumsum(lengths_B[chosen_B]) - lengths_B[chosen_B]
            writer.add(chosen_ids_T, starts_B[begins_B[chosen_B]], int(characters_B[chosen_B].sum()))
        return len(ids_T)

    def _places(self, texts: Sequence[str]) -> np.ndarray:
        places_B = in_validation(texts, self._fraction).astype(np.int8)  # the number of the split
        begun_B = np.arange(len(texts)) + self._begun
        if self._place is not None:
            places_B[:1] = self._place
            begun_B -= 1
        self._begun = int(begun_B[-1]) + 1 if len(texts) else self._begun
        places_B[np.isin(begun_B, self._dropped)] = DROPPED
        return places_B


def in_validation(documents: Sequence[str], validation_fraction: float) -> np.ndarray:
    """Returns (B,) whether each document is for validation: a function of its text, of its first part if it is long."""
    hashes = [hashlib.blake2b(text.encode("utf-8"), digest_size=8, person=b"split").digest() for text in documents]
    limit = math.ceil(validation_fraction * 2**64)  # may need 65 bits
    return np.frombuffer(b"".join(hashes), "<u8") <= np.uint64(limit - 1) if limit else np.zeros(len(hashes), bool)


def _frame(
    encoded: RaggedIds, begins_B: np.ndarray, ends_B: np.ndarray, bos_id: int, eos_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids_T with `bos_id` and `eos_id` around the texts that begin and end here, and the new lengths_B."""
    lengths_B = encoded.lengths_B + begins_B + ends_B
    stops_B = np.cumsum(lengths_B)
    first, last = (stops_B - lengths_B)[begins_B], (stops_B - 1)[ends_B]
    ids_T = np.empty(int(lengths_B.sum()), encoded.ids_T.dtype)
    text_T = np.ones(len(ids_T), bool)
    text_T[first] = text_T[last] = False
    ids_T[text_T] = encoded.ids_T
    ids_T[first], ids_T[last] = bos_id, eos_id
    return ids_T, lengths_B


class _Problems:
    """Counts what a reader reports."""

    def __init__(self) -> None:
        self.counts = {True: 0, False: 0}  # left out, mended
        self.examples: list[Example] = []

    def add(self, problem: Problem) -> None:
        self.counts[problem.skipped] += 1
        if len(self.examples) < MOST_EXAMPLES:
            self.examples.append(Example(file=problem.file, line=problem.line, reason=problem.reason))

    def result(self) -> LeftOut:
        return LeftOut(skipped=self.counts[True], replaced=self.counts[False], examples=self.examples)
