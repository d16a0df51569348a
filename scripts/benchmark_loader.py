"""Measure how fast loaders make rows, in this package and in others, on the same tokens in one run.

The script writes a token dataset whose documents are as long as the documents of CLUECorpusSmall (median 98 tokens,
mean 265). Then each contender makes batches of random rows in turn, with one thread. The table has millions of tokens
for each second of CPU time: the median of some turns, the lowest and the highest, and the ratio to nanoGPT's crops.

    stream, best_fit, document   rows of this package: tokens, targets, segments and positions, int32
    crops as nanoGPT             x and y, int64, at random places of a file that is mapped for each batch; no segments
    crops, file mapped once      the same, with the file mapped once
    grain                        x and y, int32, of shuffled windows; only if the package `grain` is installed

"starts" is the time until the first batch, in seconds; for best_fit and document it includes making the row index of
the dataset. "padding" is the share of positions without a token in one batch.

    python scripts/benchmark_loader.py
    python scripts/benchmark_loader.py --tokens 1e9 --folder /data --lengths 1024 --batch 256
    python scripts/benchmark_loader.py --plan 1e7

The last command measures only the time to pack so many documents.
"""

import argparse
import importlib.util
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from gpt2_flax.data.batches import Batches, rows_of
from gpt2_flax.data.dataset import TokenDataset, TokenSplit
from gpt2_flax.data.dataset_info import DatasetInfo, shard_paths, write_info
from gpt2_flax.data.dataset_writer import ShardWriter
from gpt2_flax.data.packing import RowLayout
from gpt2_flax.data.prompt_separator import PromptSeparator, SeparatedBatches
from gpt2_flax.folders import file_sha256

VOCAB_SIZE = 21128
MEDIAN, MEAN = 98, 265  # tokens of a document
WRITTEN_AT_ONCE = 10_000  # documents
BASE = "crops as nanoGPT"


def write_dataset(folder: Path, n_tokens: int, n_shards: int) -> TokenSplit:
    """Write a dataset of random tokens in documents of random lengths."""
    random = np.random.default_rng(0)
    shards = []
    for number in range(n_shards):
        with ShardWriter(folder, "train", number, VOCAB_SIZE, None) as writer:
            written = 0
            while written < n_tokens / n_shards:
                lengths = document_lengths(random, WRITTEN_AT_ONCE)
                ids = random.integers(0, VOCAB_SIZE, lengths.sum(), np.uint16)
                writer.add(ids, np.cumsum(lengths) - lengths, None)
                written += len(ids)
            shards.append(writer.close())
    info = DatasetInfo(
        dtype="uint16",
        vocab_size=VOCAB_SIZE,
        bos_id=None,
        eos_id=0,
        unk_id=None,
        tokenizer_fingerprint="none",
        shards={"train": shards, "validation": []},
    )
    write_info(folder, info)
    return TokenDataset(folder).train


def document_lengths(random: np.random.Generator, count: int) -> np.ndarray:
    deviation = np.sqrt(2 * np.log(MEAN / MEDIAN))
    return np.maximum(2, random.lognormal(np.log(MEDIAN), deviation, count)).astype(np.int64)


def of_ours(split: TokenSplit, length: int, n_rows: int, packing: str, separated: float = 0) -> Iterator[object]:
    given = [split], [Fraction(1)], RowLayout(length, packing), 0
    batches = SeparatedBatches(*given, PromptSeparator(separated, 0, 101, 102)) if separated else Batches(*given)
    for step in itertools.count():
        yield batches.batch(step * n_rows, (step + 1) * n_rows)


def of_nanogpt(path: Path, length: int, n_rows: int, again: bool) -> Iterator[object]:
    random = np.random.default_rng(0)
    data = np.memmap(path, np.uint16, "r")
    while True:
        if again:
            data = np.memmap(path, np.uint16, "r")
        places = random.integers(0, len(data) - length, n_rows)
        x = np.stack([data[i : i + length].astype(np.int64) for i in places])
        y = np.stack([data[i + 1 : i + 1 + length].astype(np.int64) for i in places])
        yield x, y


class Windows:
    """The data source for grain: consecutive windows of the file."""

    def __init__(self, path: Path, length: int):
        self.data, self.length = np.memmap(path, np.uint16, "r").view(np.ndarray), length

    def __len__(self) -> int:
        return (len(self.data) - 1) // self.length

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        window = self.data[number * self.length : (number + 1) * self.length + 1].astype(np.int32)
        return {"x": window[:-1], "y": window[1:]}


def of_grain(path: Path, length: int, n_rows: int) -> Iterator[object]:
    import grain.python as grain

    rows = grain.MapDataset.source(Windows(path, length)).shuffle(seed=0).repeat().batch(n_rows)
    return (rows[number] for number in itertools.count())


def contenders(split: TokenSplit, length: int, n_rows: int) -> dict[str, Callable[[], Iterator[object]]]:
    path = shard_paths(split.folder, "train", 0)[0]  # the first shard, the only one by default
    found: dict[str, Callable[[], Iterator[object]]] = {
        packing: lambda packing=packing: of_ours(split, length, n_rows, packing)
        for packing in ("stream", "best_fit", "document")
    }
    found["stream, prompt_separator 0.1"] = lambda: of_ours(split, length, n_rows, "stream", separated=0.1)
    found[BASE] = lambda: of_nanogpt(path, length, n_rows, again=True)
    found["crops, file mapped once"] = lambda: of_nanogpt(path, length, n_rows, again=False)
    if importlib.util.find_spec("grain"):
        found["grain"] = lambda: of_grain(path, length, n_rows)
    return found


def compare(split: TokenSplit, length: int, n_rows: int, seconds: float, turns: int) -> None:
    print(f"\nrows of {length}, {n_rows} a batch{'':10}M tokens/s{'':22}to nanoGPT   starts   padding")
    running, starts = {}, {}
    for name, make in contenders(split, length, n_rows).items():
        begin = time.perf_counter()
        running[name] = make()
        next(running[name])
        starts[name] = time.perf_counter() - begin
    rates: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(turns):
        for name, batches in running.items():
            rates[name].append(rate(batches, length * n_rows, seconds))
    base = statistics.median(rates[BASE])
    for name, found in rates.items():
        median = statistics.median(found)
        print(
            f"  {name:30}{median:10.1f}  {f'({min(found):.1f} to {max(found):.1f})':22}{median / base:7.2f}x"
            f"{starts[name]:8.3f} s{padding(next(running[name])):9.2%}",
            flush=True,
        )


def rate(batches: Iterator[object], tokens: int, seconds: float) -> float:
    """Return millions of tokens for each second of CPU time."""
    begin, count = time.process_time(), 0
    while (passed := time.process_time() - begin) < seconds:
        for _ in range(10):
            next(batches)
        count += 10
    return count * tokens / passed / 1e6


def padding(batch: object) -> float:
    return float((batch.segments_BT == 0).mean()) if hasattr(batch, "segments_BT") else 0.0


def plan(folder: Path, n_documents: int, lengths: list[int]) -> None:
    """Time the packing of documents; the file of their tokens holds only zeros."""
    sizes = document_lengths(np.random.default_rng(0), n_documents)
    tokens, offsets = shard_paths(folder, "train", 0)
    tokens.parent.mkdir()
    with tokens.open("wb") as file:
        file.truncate(2 * int(sizes.sum()))
    offsets.write_bytes((np.cumsum(sizes) - sizes).astype("<u8").tobytes())
    counts = {"documents": n_documents, "tokens": int(sizes.sum()), "unknown": 0, "characters": None, "max_id": 0}
    shard = counts | {"tokens_sha256": "0" * 64, "offsets_sha256": file_sha256(offsets)}
    fixed = {"dtype": "uint16", "vocab_size": VOCAB_SIZE, "bos_id": None, "eos_id": 0, "unk_id": None}
    shards = {"train": [shard], "validation": []}
    write_info(folder, DatasetInfo.model_validate({**fixed, "tokenizer_fingerprint": "none", "shards": shards}))
    split = TokenDataset(folder).train
    for length in lengths:
        begin, cpu = time.perf_counter(), time.process_time()
        rows = rows_of(split, RowLayout(length, "best_fit"))
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        empty = 1 - (split.n_tokens - n_documents) / (rows.n_rows * length)
        print(
            f"{n_documents:,} documents, {split.n_tokens:,} tokens in {rows.n_rows:,} rows of {length}: "
            f"{seconds:.1f} s ({cpu:.1f} of CPU time), padding {empty:.3%}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=50e6, help="tokens in the dataset (default: %(default).0f)")
    parser.add_argument("--shards", type=int, default=1, help="files of the dataset (default: %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 1024], help="(default: 128 1024)")
    parser.add_argument("--batch", type=int, default=64, help="rows in a batch (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds in a turn (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="turns of each contender (default: %(default)s)")
    parser.add_argument("--plan", type=float, metavar="DOCUMENTS", help="only pack so many documents")
    parser.add_argument(
        "--folder", type=Path, help="folder for the dataset, which is removed afterwards (default: temporary)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.plan:
            plan(Path(folder), int(args.plan), args.lengths)
            return
        split = write_dataset(Path(folder), int(args.tokens), args.shards)
        print(f"{split.n_documents:,} documents, {split.n_tokens:,} tokens, {args.shards} shards")
        if not importlib.util.find_spec("grain"):
            print("grain is not installed: left out")
        for length in args.lengths:
            compare(split, length, args.batch, args.seconds, args.turns)


if __name__ == "__main__":
    main()
