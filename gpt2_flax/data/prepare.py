"""Text to a token dataset: each unit of the corpus becomes one shard of each split, in any number of processes.

Whether a document is for validation depends on its text alone, so equal documents land in the same split, and the same
corpus gives the same bytes with any number of workers. A unit is finished when its record is there; a call that was
stopped is taken up by the next one with the units that are left.
"""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import gpt2_flax
from gpt2_flax.data.dataset import TokenSplit
from gpt2_flax.data.dataset_info import MARKER, SPLITS, DatasetInfo, Duplicates, LeftOut, write_info
from gpt2_flax.data.deduplicate import find_duplicates, hash_units
from gpt2_flax.data.held_out import check_fraction, hold_out_tail
from gpt2_flax.data.output_folder import LocalFolder, Storage, unfinished
from gpt2_flax.data.shard_job import MOST_EXAMPLES, RECORDS, UnitRecord, UnitTask, UnitWork
from gpt2_flax.data.shards import shard_paths
from gpt2_flax.data.workers import Engine, run
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.folders import file_sha256, utf8_name, write_whole
from gpt2_flax.progress import progress_bar
from gpt2_flax.text.corpus import STANDARD_INPUT, Unit, corpus_units, empty_corpus, standard_input_as_file
from gpt2_flax.text.documents import DEFAULT_OPTIONS, CorpusOptions
from gpt2_flax.tokenizers.ragged_ids import token_dtype
from gpt2_flax.tokenizers.survey import (
    MOST_UNKNOWN,
    PassedOver,
    encoding_lines,
    other_encodings,
    sample_corpus,
    survey_lines,
    too_much_unknown,
)
from gpt2_flax.tokenizers.tokenizer import Tokenizer
from gpt2_flax.tokenizers.transformers_check import check_exported, spread

SETTINGS = "settings.json"
HASHES = "hashes/"
SPOOL = "stdin/"
NOTHING_DROPPED = np.zeros(0, np.int64)


def prepare(
    sources: Sequence[str],
    tokenizer: Tokenizer,
    output: Path | str,
    *,
    options: CorpusOptions = DEFAULT_OPTIONS,
    validation_fraction: float = 0.01,
    deduplicate: bool = False,
    allow_unknown: bool = False,
    workers: int | None = 1,
    engine: Engine = "local",
    overwrite: bool = False,
    unit_bytes: int | None = None,
) -> DatasetInfo:
    """Writes the dataset `output`, a folder or a URL that `fsspec` knows, and returns what its dataset.json says.

    Prints what there is to say of the corpus. When all documents fall into one split, the last tokens are for
    validation; with a `validation_fraction` of 0 nothing is.
    Raises `UserError`: what `corpus_units`, `check_exported`, `unfinished` and `run` raise; USAGE for a fraction that
    is none, DATA when too many tokens are unknown, or too few are there for two splits.
    """
    check_fraction(validation_fraction)
    with unfinished(str(output), MARKER, overwrite) as storage:
        settings = {
            "gpt2_flax": gpt2_flax.__version__,
            "sources": [utf8_name(source) for source in sources],
            "tokenizer": tokenizer.fingerprint,
            "validation_fraction": validation_fraction,
            "deduplicate": deduplicate,
            "unit_bytes": unit_bytes,
        } | {name: value for name, value in dataclasses.asdict(options).items() if name != "on_error"}
        _check_settings(storage, settings, overwrite)
        with _kept_if_useful(storage):
            passed_over, where = PassedOver(), ", ".join(sources)
            units = corpus_units(_without_standard_input(storage, sources), options, unit_bytes, passed_over)
            documents = sample_corpus(units)
            for line in survey_lines(units, documents, options, passed_over, tokenizer, allow_unknown, where):
                print(line, flush=True)
            check_exported(tokenizer, spread(documents.texts), storage.where)
            dropped = _duplicates(storage, units, workers, engine) if deduplicate else [NOTHING_DROPPED] * len(units)
            tasks = [UnitTask(index, *pair) for index, pair in enumerate(zip(units, dropped, strict=True))]
            work = UnitWork(storage, tokenizer, validation_fraction, options.on_error)
            info = _info(sources, units, tokenizer, _records(work, tasks, workers, engine), deduplicate)
        if not allow_unknown:
            _check_unknown(info)
        info = _with_both_splits(storage, tokenizer, info, validation_fraction)
        _finish(storage, tokenizer, info)
    return info


def prepare_text(sources: Sequence[str], tokenizer: Tokenizer, folder: Path, options: CorpusOptions) -> TokenSplit:
    """Writes all documents into `folder`, which exists, as one validation split, and returns it opened.

    Raises `UserError` as `corpus_units`.
    """
    units = corpus_units(sources, options)
    for line in encoding_lines(other_encodings(units)):
        print(line, flush=True)
    tasks = [UnitTask(index, unit, NOTHING_DROPPED) for index, unit in enumerate(units)]
    work = UnitWork(LocalFolder(folder), tokenizer, validation_fraction=1.0, on_error=options.on_error)
    info = _info(sources, units, tokenizer, _records(work, tasks, workers=1, engine="local"), deduplicate=False)
    split = TokenSplit(folder, "validation", info)
    if not split.n_documents:
        raise empty_corpus(sources)
    return split


def _check_settings(storage: Storage, settings: Mapping[str, Any], overwrite: bool) -> None:
    """Raises `UserError` (CANT_CREATE) when what is finished so far was made with other settings."""
    names = storage.names()
    before = _read_settings(storage) if SETTINGS in names else {}
    differing = [name for name, value in settings.items() if before.get(name, ...) != value]
    if any(name.startswith(RECORDS) for name in names) and differing:
        if not overwrite:
            what = f"unfinished output of another call, with another {', '.join(differing)}"
            fix = "repeat that call to go on with it, or add --overwrite to start over"
            raise UserError(ExitCode.CANT_CREATE, what, storage.where, fix)
        _remove_scaffold(storage, ())
    with storage.staging() as folder:
        write_whole(folder / SETTINGS, json.dumps(settings, ensure_ascii=False, indent=2).encode())


def _read_settings(storage: Storage) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        settings = json.loads(storage.read(SETTINGS))
        return settings if isinstance(settings, dict) else {}
    return {}


@contextlib.contextmanager
def _kept_if_useful(storage: Storage) -> Iterator[None]:
    """Leaves nothing behind when the block fails before anything was finished."""
    try:
        yield
    except UserError:
        if not any(name.startswith(RECORDS) for name in storage.names()):
            _remove_scaffold(storage, ())
        raise


def _without_standard_input(storage: Storage, sources: Sequence[str]) -> list[str]:
    """Copies standard input to a file, which several processes can read, and read again after a stop."""
    if STANDARD_INPUT not in sources:
        return list(sources)
    if not isinstance(storage, LocalFolder):
        fix = "write it to a file that every worker can read"
        raise UserError(ExitCode.USAGE, "standard input cannot go to another machine", storage.where, fix)
    path = storage.path / SPOOL / "stdin.txt"
    path.parent.mkdir(exist_ok=True)
    files = standard_input_as_file(sources, path)
    seconds = int(file_sha256(path)[:7], 16)  # equal text has equal times, so that a call can go on with it
    os.utime(path, (seconds, seconds))
    return files


def _duplicates(storage: Storage, units: Sequence[Unit], workers: int | None, engine: Engine) -> list[np.ndarray]:
    with storage.scratch(HASHES) as folder:
        return find_duplicates(hash_units(units, folder, workers, engine))


def _records(work: UnitWork, tasks: Sequence[UnitTask], workers: int | None, engine: Engine) -> list[UnitRecord]:
    """Does the tasks that are not finished yet, and returns the records of all."""
    records = {task.index: record for task in tasks if (record := work.finished(task))}
    if records:
        print(f"going on: {len(records)} of {len(tasks)} parts of the corpus are done", file=sys.stderr)
    todo = [task for task in tasks if task.index not in records]
    with progress_bar("tokenizing", sum(task.unit.size for task in todo), "B", "tokens") as advance:
        records |= run(engine, work, [(task.index, task) for task in todo], workers, advance)
    return [records[index] for index in range(len(tasks))]


def _info(
    sources: Sequence[str],
    units: Sequence[Unit],
    tokenizer: Tokenizer,
    records: Sequence[UnitRecord],
    deduplicate: bool,
) -> DatasetInfo:
    dropped = Duplicates(
        documents=sum(record.duplicates.documents for record in records),
        characters=sum(record.duplicates.characters for record in records),
    )
    left_out = LeftOut(
        skipped=sum(record.left_out.skipped for record in records),
        replaced=sum(record.left_out.replaced for record in records),
        examples=[example for record in records for example in record.left_out.examples][:MOST_EXAMPLES],
    )
    return DatasetInfo(
        dtype=token_dtype(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        unk_id=tokenizer.unk_id,
        tokenizer_fingerprint=tokenizer.fingerprint,
        sources=list(map(utf8_name, sources)),
        encodings={utf8_name(path): encoding for path, encoding in other_encodings(units).items()},
        left_out=left_out,
        duplicates=dropped if deduplicate else None,
        shards={split: [record.shards[split] for record in records] for split in SPLITS},
    )


def _check_unknown(info: DatasetInfo) -> None:
    """Raises `UserError` (DATA) for what the sample did not show. What is finished stays, for a call that allows it."""
    share = info.unknown_share
    if share is not None and share > MOST_UNKNOWN:
        raise too_much_unknown(f"{share:.1%} of the tokens are unknown", ", ".join(info.sources))


def _with_both_splits(
    storage: Storage, tokenizer: Tokenizer, info: DatasetInfo, validation_fraction: float
) -> DatasetInfo:
    documents = {split: sum(shard.documents for shard in info.shards[split]) for split in SPLITS}
    if not any(documents.values()):
        _remove_scaffold(storage, ())  # a call that does better has other settings
        raise empty_corpus(info.sources)
    if all(documents.values()) or not validation_fraction:
        return info
    info = hold_out_tail(storage, tokenizer, info, validation_fraction)
    tokens = {split: sum(shard.tokens for shard in info.shards[split]) for split in SPLITS}
    held, total = tokens["validation"], sum(tokens.values())
    print(f"all documents fell into one split: the last {held:,} of {total:,} tokens are for validation", flush=True)
    return info


def _finish(storage: Storage, tokenizer: Tokenizer, info: DatasetInfo) -> None:
    """Adds what makes a dataset of the shards, and takes the scaffold away."""
    with storage.staging() as folder:
        (folder / "tokenizer").mkdir(exist_ok=True)
        tokenizer.save(folder / "tokenizer")
    with storage.staging() as folder:
        write_info(folder, info)
    names = [
        path.as_posix()
        for split, shards in info.shards.items()
        for index in range(len(shards))
        for path in shard_paths(Path(), split, index)
    ]
    _remove_scaffold(storage, set(names))


def _remove_scaffold(storage: Storage, kept: Container[str]) -> None:
    """Removes what a dataset is made with, and shards but those in `kept`."""
    folders = (RECORDS, HASHES, SPOOL, *(f"{split}/" for split in SPLITS))
    for name in sorted(storage.names()):
        if name == SETTINGS or (name.startswith(folders) and name not in kept):
            storage.remove(name)
