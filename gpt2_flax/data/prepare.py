"""Text to a token dataset: each unit of the corpus becomes one shard of each split, in any number of processes.

Whether a document is for validation depends only on its text. Equal documents are therefore in the same split, and the
same corpus gives the same bytes with any number of workers. A unit is finished when its record exists; after a stop,
the next call resumes with the units that are left.
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
from gpt2_flax.data.dataset_info import MARKER, SPLITS, DatasetInfo, Duplicates, LeftOut, shard_paths, write_info
from gpt2_flax.data.deduplicate import find_duplicates, hash_units
from gpt2_flax.data.held_out import check_fraction, hold_out_tail
from gpt2_flax.data.output_folder import LocalFolder, OutputFolder, unfinished
from gpt2_flax.data.shard_job import MOST_EXAMPLES, RECORDS, ShardJob, ShardRecord, ShardTask
from gpt2_flax.data.workers import Engine, run
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.folders import file_sha256, utf8_name, write_whole
from gpt2_flax.progress import progress_bar
from gpt2_flax.text.corpus import STANDARD_INPUT, Unit, corpus_units, empty_corpus, standard_input_as_file
from gpt2_flax.text.documents import DEFAULT_OPTIONS, CorpusOptions
from gpt2_flax.tokenizers import survey
from gpt2_flax.tokenizers.ragged_ids import token_dtype
from gpt2_flax.tokenizers.tokenizer import Tokenizer
from gpt2_flax.tokenizers.transformers_check import check_exported, spread

SETTINGS = "settings.json"
HASHES = "hashes/"
SPOOL = "stdin/"
MOST_HELD_OUT = 10  # times the share that validation should have
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
    """Make a dataset of a corpus, print a survey of the corpus, and return the content of dataset.json.

    Args:
        sources: Files, folders, patterns and addresses, see `corpus_units`.
        tokenizer: The tokenizer that encodes the documents.
        output: The folder to make, or an address that `fsspec` knows.
        options: How to read the sources.
        validation_fraction: The share of documents for validation, 0 for none. If all documents fall into one split,
            or the few that are chosen hold more than `MOST_HELD_OUT` times this share of all tokens, then the last
            tokens of all are for validation.
        deduplicate: Whether to keep only the first of equal documents.
        allow_unknown: Whether to accept a large share of unknown tokens.
        workers: The number of processes; None means one for each core.
        engine: Where the workers run.
        overwrite: Whether `output` may replace a dataset.
        unit_bytes: The size of a unit of the corpus; None means a size that depends on the corpus.

    Raises:
        UserError: As `corpus_units`, `check_exported`, `unfinished` and `run`; USAGE for a wrong fraction; DATA for too
            many unknown tokens, or for too few tokens for two splits.
    """
    check_fraction(validation_fraction)
    with unfinished(str(output), MARKER, overwrite) as partial:
        settings = {
            "gpt2_flax": gpt2_flax.__version__,
            "sources": [utf8_name(source) for source in sources],
            "tokenizer": tokenizer.fingerprint,
            "validation_fraction": validation_fraction,
            "deduplicate": deduplicate,
            "unit_bytes": unit_bytes,
        } | {name: value for name, value in dataclasses.asdict(options).items() if name != "on_error"}
        _check_settings(partial, settings, overwrite)
        with _kept_if_useful(partial):
            passed_over, where = survey.PassedOver(), ", ".join(sources)
            units = corpus_units(_without_standard_input(partial, sources), options, unit_bytes, passed_over)
            documents = survey.sample_corpus(units)
            for line in survey.survey_lines(units, documents, options, passed_over, tokenizer, allow_unknown, where):
                print(line, flush=True)
            check_exported(tokenizer, spread(documents.texts), partial)
            dropped = [NOTHING_DROPPED] * len(units)
            if deduplicate:
                with partial.scratch(HASHES) as folder:
                    dropped = find_duplicates(hash_units(units, folder, workers, engine))
            job = ShardJob(partial, tokenizer, validation_fraction, options.on_error)
            records = _records(job, units, dropped, workers, engine)
            info = _info(sources, units, tokenizer, records, deduplicate)
            held, total = _held_out(info)
            if held > MOST_HELD_OUT * validation_fraction * total:
                records = _records(dataclasses.replace(job, validation_fraction=0.0), units, dropped, workers, engine)
                info = _info(sources, units, tokenizer, records, deduplicate)
        share = info.unknown_share
        if not allow_unknown and share is not None and share > survey.MOST_UNKNOWN:
            # The sample did not show this. Finished shards are kept for a call that allows it.
            raise survey.too_much_unknown(f"{share:.1%} of the tokens are unknown", ", ".join(info.sources))
        info = _with_both_splits(partial, tokenizer, info, validation_fraction)
        _finish(partial, tokenizer, info)
    return info


def prepare_text(sources: Sequence[str], tokenizer: Tokenizer, folder: Path, options: CorpusOptions) -> TokenSplit:
    """Write all documents into `folder`, which exists, as one validation split, and open it.

    Raises `UserError` as `corpus_units`.
    """
    units = corpus_units(sources, options)
    for line in survey.encoding_lines(survey.other_encodings(units)):
        print(line, flush=True)
    job = ShardJob(LocalFolder(folder), tokenizer, validation_fraction=1.0, on_error=options.on_error)
    records = _records(job, units, [NOTHING_DROPPED] * len(units), workers=1, engine="local")
    split = TokenSplit(folder, "validation", _info(sources, units, tokenizer, records, deduplicate=False))
    if not split.n_documents:
        raise empty_corpus(sources)
    return split


def _check_settings(partial: OutputFolder, settings: Mapping[str, Any], overwrite: bool) -> None:
    """Raise `UserError` (CANT_CREATE) if the finished shards were made with other settings."""
    names, before = partial.names(), {}
    if SETTINGS in names:
        with contextlib.suppress(ValueError):
            before = json.loads(partial.read(SETTINGS))
    before = before if isinstance(before, dict) else {}
    differing = [name for name, value in settings.items() if before.get(name, ...) != value]
    if any(name.startswith(RECORDS) for name in names) and differing:
        if not overwrite:
            what = f"unfinished output of another call, with another {', '.join(differing)}"
            fix = "repeat that call to resume it, or add --overwrite to start over"
            raise UserError(ExitCode.CANT_CREATE, what, partial, fix)
        _remove_scaffold(partial, ())
    with partial.staging() as folder:
        write_whole(folder / SETTINGS, json.dumps(settings, ensure_ascii=False, indent=2).encode())


@contextlib.contextmanager
def _kept_if_useful(partial: OutputFolder) -> Iterator[None]:
    """Empty the folder if the block fails before any shard is finished."""
    try:
        yield
    except UserError:
        if not any(name.startswith(RECORDS) for name in partial.names()):
            _remove_scaffold(partial, ())
        raise


def _without_standard_input(partial: OutputFolder, sources: Sequence[str]) -> list[str]:
    """Copy standard input to a file, which several processes can read, and read again after a stop."""
    if STANDARD_INPUT not in sources:
        return list(sources)
    if not isinstance(partial, LocalFolder):
        fix = "write it to a file that every worker can read"
        raise UserError(ExitCode.USAGE, "standard input cannot go to another machine", partial, fix)
    path = partial.path / SPOOL / "stdin.txt"
    path.parent.mkdir(exist_ok=True)
    files = standard_input_as_file(sources, path)
    seconds = int(file_sha256(path)[:7], 16)  # equal text gets the same time, so that a later call can resume
    os.utime(path, (seconds, seconds))
    return files


def _records(
    job: ShardJob, units: Sequence[Unit], dropped: Sequence[np.ndarray], workers: int | None, engine: Engine
) -> list[ShardRecord]:
    """Do the tasks that are not finished yet, and return the records of all."""
    tasks = [ShardTask(index, *pair) for index, pair in enumerate(zip(units, dropped, strict=True))]
    records = {task.index: record for task in tasks if (record := job.finished(task))}
    if records:
        print(f"resuming: {len(records)} of {len(tasks)} shards are done", file=sys.stderr)
    todo = [(task.index, task) for task in tasks if task.index not in records]
    with progress_bar("tokenizing", sum(task.unit.size for _, task in todo), "B", "tokens") as advance:
        records |= run(engine, job, todo, workers, advance)
    return [records[index] for index in range(len(tasks))]


def _info(
    sources: Sequence[str],
    units: Sequence[Unit],
    tokenizer: Tokenizer,
    records: Sequence[ShardRecord],
    deduplicate: bool,
) -> DatasetInfo:
    duplicates = Duplicates(
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
        encodings={utf8_name(path): encoding for path, encoding in survey.other_encodings(units).items()},
        left_out=left_out,
        duplicates=duplicates if deduplicate else None,
        shards={split: [record.shards[split] for record in records] for split in SPLITS},
    )


def _held_out(info: DatasetInfo) -> tuple[int, int]:
    """Return the number of tokens for validation, and of all tokens."""
    tokens = {split: info.n_tokens(split) for split in SPLITS}
    return tokens["validation"], sum(tokens.values())


def _with_both_splits(
    partial: OutputFolder, tokenizer: Tokenizer, info: DatasetInfo, validation_fraction: float
) -> DatasetInfo:
    documents = {split: sum(shard.documents for shard in info.shards[split]) for split in SPLITS}
    if not any(documents.values()):
        _remove_scaffold(partial, ())  # the next call will have other settings
        raise empty_corpus(info.sources)
    if all(documents.values()) or not validation_fraction:
        return info
    info = hold_out_tail(partial, tokenizer, info, validation_fraction)
    held, total = _held_out(info)
    print(f"too few documents for whole ones: the last {held:,} of {total:,} tokens are for validation", flush=True)
    return info


def _finish(partial: OutputFolder, tokenizer: Tokenizer, info: DatasetInfo) -> None:
    """Write the tokenizer and then dataset.json, and remove every other file that is not a shard."""
    with partial.staging() as folder:
        (folder / "tokenizer").mkdir(exist_ok=True)
        tokenizer.save(folder / "tokenizer")
    with partial.staging() as folder:
        write_info(folder, info)
    _remove_scaffold(
        partial,
        {
            path.as_posix()
            for split, shards in info.shards.items()
            for index in range(len(shards))
            for path in shard_paths(Path(), split, index)
        },
    )


def _remove_scaffold(partial: OutputFolder, kept: Container[str]) -> None:
    """Remove all intermediate files, and all shards that are not in `kept`."""
    folders = (RECORDS, HASHES, SPOOL, *(f"{split}/" for split in SPLITS))
    for name in sorted(partial.names()):
        if name == SETTINGS or (name.startswith(folders) and name not in kept):
            partial.remove(name)
