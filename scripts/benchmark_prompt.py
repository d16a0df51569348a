"""Measure how well a model continues a prompt that ends with the end token, as `BertTokenizer` makes it.

Each held-out document that is long enough gives one prompt, its first tokens, and the true tokens behind the prompt:

    bos prompt        the prompt as `gpt2-flax generate` gives it to the model
    bos prompt eos    the prompt as `TextGenerationPipeline(model, BertTokenizer.from_pretrained(...))` gives it

The script prints the mean nats of the true tokens, and of the first of them, for both. The tokens are the same, so the
difference is the cost of the end token. Before that, the script evaluates the ordinary text. To measure the effect of
`data.prompt_separator`, compare two runs that differ in nothing else.

    python scripts/benchmark_prompt.py runs/model --data data/dataset            # its validation split
    python scripts/benchmark_prompt.py runs/model --data held_out.txt --prompt-tokens 32
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_flax.checkpoint.source import load_source
from gpt2_flax.checkpoint.weights import model_from_weights
from gpt2_flax.data.dataset import TokenDataset, TokenSplit
from gpt2_flax.data.dataset_info import MARKER
from gpt2_flax.data.packing import IGNORE, Batch
from gpt2_flax.data.prepare import prepare_text
from gpt2_flax.errors import UserError
from gpt2_flax.inference.evaluate import evaluate_source
from gpt2_flax.model.gpt2 import GPT2
from gpt2_flax.parallel.device_batches import device_batch, row_shards
from gpt2_flax.parallel.mesh import make_mesh
from gpt2_flax.text.documents import DEFAULT_OPTIONS
from gpt2_flax.tokenizers.tokenizer import Tokenizer


def texts(split: TokenSplit, tokenizer: Tokenizer, n_tokens: int, count: int) -> np.ndarray:
    """Return the first tokens of up to `count` documents, without special tokens, int32 (B, n_tokens)."""
    ends = tokenizer.bos_id, tokenizer.eos_id
    bare = (ids_T[~np.isin(ids_T, ends)] for ids_T in split.documents())
    long = (ids_T[:n_tokens] for ids_T in bare if len(ids_T) >= n_tokens)
    return np.array(list(itertools.islice(long, count)), np.int32).reshape(-1, n_tokens)


def rows(texts_BT: np.ndarray, n_prompt: int, bos_id: int, eos_id: int | None, n_targets: int) -> Batch:
    """Return rows of bos, prompt, `eos_id` if given, and true tokens; the first `n_targets` of those are targets."""
    before = [np.full((len(texts_BT), 1), bos_id), texts_BT[:, :n_prompt]]
    if eos_id is not None:
        before.append(np.full((len(texts_BT), 1), eos_id))
    tokens_BT = np.concatenate([*before, texts_BT[:, n_prompt:]], 1).astype(np.int32)[:, :-1]
    first = sum(part_BT.shape[1] for part_BT in before) - 1
    targets_BT = np.full_like(tokens_BT, IGNORE)
    targets_BT[:, first : first + n_targets] = texts_BT[:, n_prompt : n_prompt + n_targets]
    positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
    return Batch(tokens_BT, targets_BT, np.ones_like(tokens_BT), positions_BT)


def nats(model: GPT2, batch: Batch, n_rows: int) -> float:
    """Return the mean nats of a target; the number of rows is a multiple of `n_rows`."""
    mesh, totals = make_mesh(), np.zeros(3)
    for start in range(0, len(batch.tokens_BT), n_rows):
        placed = device_batch(mesh, n_rows, lambda first, last: Batch(*(x_BT[first:last] for x_BT in batch)), start)
        totals += [float(total) for total in _sums(model, placed)]
    return totals[0] / totals[2]


_sums = jax.jit(lambda model, batch: model.loss(batch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a run folder, or any other model")
    parser.add_argument("--step", type=int, help="checkpoint of the run (default: the newest)")
    parser.add_argument("--data", required=True, help="a dataset, whose validation split is read, or held-out text")
    parser.add_argument("--prompts", type=int, default=2000, help="most prompts (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=16, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--true-tokens", type=int, default=32, help="tokens to predict (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="rows computed together (default: %(default)s)")
    args = parser.parse_args()
    mesh = make_mesh()
    n_rows = -(-args.batch_size // row_shards(mesh)) * row_shards(mesh)
    try:
        source = load_source(args.model, args.step)
        if (length := 1 + args.prompt_tokens + args.true_tokens) > source.model.n_positions:
            parser.error(f"the model sees {source.model.n_positions} tokens, fewer than the {length} of a row")
        print(f"ordinary text   {evaluate_source(source, args.data, None, n_rows, 0, DEFAULT_OPTIONS)}", flush=True)
        tokenizer = source.tokenizer()
        with tempfile.TemporaryDirectory() as folder:
            if (Path(args.data) / MARKER).is_file():
                split = TokenDataset(args.data).validation
            else:
                split = prepare_text([args.data], tokenizer, Path(folder), DEFAULT_OPTIONS)
            texts_BT = texts(split, tokenizer, args.prompt_tokens + args.true_tokens, args.prompts)
        texts_BT = texts_BT[: len(texts_BT) // n_rows * n_rows]
        if not len(texts_BT):
            parser.error(f"--data has fewer than {n_rows} documents that are long enough; lower --batch-size")
        with jax.set_mesh(mesh):
            model = jax.device_put(model_from_weights(source.model, source.weights), NamedSharding(mesh, P()))
            print(f"{len(texts_BT):,} prompts of {args.prompt_tokens} tokens, nats of the true tokens behind them")
            print(f"{'':16}{f'mean of {args.true_tokens}':>12}{'the first':>12}")
            for name, eos_id in (("bos prompt", None), ("bos prompt eos", tokenizer.eos_id)):
                batches = (
                    rows(texts_BT, args.prompt_tokens, tokenizer.bos_id, eos_id, n_targets)
                    for n_targets in (args.true_tokens, 1)
                )
                print(f"{name:16}" + "".join(f"{nats(model, batch, n_rows):12.4f}" for batch in batches), flush=True)
    except (UserError, OSError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
