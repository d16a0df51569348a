"""What to train within a budget: the laws of compute-optimal training, as functions of FLOPs and of the corpus.

N parameters trained on D tokens reach the loss E + A / N^a + B / D^a (Hoffmann et al., arXiv:2203.15556). Repeated
tokens and excess parameters are worth less than new ones (Muennighoff et al., arXiv:2305.16264, appendix A). The
constants are from the second paper, a fit on English web text (C4) with GPT-2's tokenizer, with the digits of
https://github.com/huggingface/datablations. N counts all parameters, embeddings included.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gpt2_flax.config.model import ModelConfig
from gpt2_flax.data.dataset import TokenDataset
from gpt2_flax.errors import ExitCode, UserError, quote
from gpt2_flax.input_files import MOST_ROWS
from gpt2_flax.model.flops import flops_per_token

_A, _B, _E = math.exp(6.255414), math.exp(7.3049974), math.exp(0.6254804)  # nats a token
_EXPONENT = 0.3526596  # of parameters and of tokens
REPEATED_TOKENS, _EXCESS_PARAMETERS = 15.387756, 5.309743  # R*; after R repetitions, more is worth e^(-R / R*) of new
_PARAMETERS_PER_TOKEN = (_A / _B) ** (1 / _EXPONENT)  # at the optimum for new tokens: 0.051, one for each 20 tokens

LEAST_WORTH = 0.05
"""Tokens and parameters that are worth a smaller share of new ones are left out: the laws know no overfitting."""
_MOST_REPETITIONS = -math.log(LEAST_WORTH)  # in units of R*: of the corpus 46, of parameters 16

DROPOUT, DROPOUT_EPOCHS = 0.1, 4
"""Dropout, and the epochs from which on it is used: the second paper finds 4 epochs almost as good as new text."""

_GROWTH_UNTIL = 0.5
"""The share of the steps that train a quarter of the layers, as in `base`. The laws predict losses without growth."""

_LARGEST_CORPUS = 1e15  # tokens
_LEAST_FLOPS, _MOST_FLOPS = 1e12, 1e26
_FEWEST_STEPS = 100  # so that whole batches use 99% of the budget

_SECONDS = {"m": 60, "h": 3600, "d": 86400}
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?(?:[eE]\+?\d{1,3})?)([mhd]?)", re.ASCII)


class Shape(NamedTuple):
    """Sizes of a model, and their published name."""

    n_layer: int
    n_head: int
    n_embd: int
    name: str = ""


# Below GPT-2 small, n_layer = n_head = n_embd / 64 as in GPT-2 small; the largest are of arXiv:2005.14165, table 2.1.
SHAPES = (
    Shape(2, 2, 128),
    Shape(4, 4, 256),
    Shape(6, 6, 384),
    Shape(8, 8, 512),
    Shape(10, 10, 640),
    Shape(12, 12, 768, "GPT-2 small"),
    Shape(16, 16, 1024),
    Shape(24, 16, 1024, "GPT-2 medium"),
    Shape(36, 20, 1280, "GPT-2 large"),
    Shape(48, 25, 1600, "GPT-2 xl"),
    Shape(32, 32, 2560, "GPT-3 2.7B"),
    Shape(32, 32, 4096, "GPT-3 6.7B"),
    Shape(40, 40, 5120, "GPT-3 13B"),
)


class Corpus(NamedTuple):
    """What there is to train on."""

    tokens: float | None
    """Different tokens; None means without limit."""
    vocab_size: int
    folder: str | None = None
    """A dataset."""


@dataclass(frozen=True)
class Choice:
    """A model, and the tokens that the budget or the corpus allows it."""

    shape: Shape
    model: ModelConfig
    seq_length: int
    tokens: float
    """Including repetitions."""
    loss: float
    """Predicted, in nats a token. Only differences have a meaning for other corpora and tokenizers."""

    corpus_tokens: float | None

    @property
    def flops_per_token(self) -> float:
        return _mean_flops_per_token(self.model, self.seq_length)

    @property
    def epochs(self) -> float | None:
        """None for a corpus without limit."""
        return None if self.corpus_tokens is None else self.tokens / self.corpus_tokens

    @property
    def dropout(self) -> float:
        return DROPOUT if self.epochs is not None and self.epochs >= DROPOUT_EPOCHS else 0.0


def parse_budget(text: str) -> tuple[float, bool]:
    """Return the amount of a budget: (seconds, True) for `90m`, `24h` or `7d`, or (FLOPs, False) for `1e21`.

    Raises:
        UserError: USAGE for other text.
    """
    if not (match := _AMOUNT.fullmatch(text)):
        fix = "give hours such as 24h, or 90m, or 7d, or floating point operations such as 1e21"
        raise UserError(ExitCode.USAGE, "not a budget", f"--budget {quote(text)}", fix)
    return float(match[1]) * _SECONDS.get(match[2], 1), match[2] != ""


def read_corpus(folder: Path) -> Corpus:
    """Return the training tokens and the vocabulary size of a dataset; raise `UserError` like `TokenDataset`."""
    dataset = TokenDataset(folder)
    if not dataset.train.n_tokens:
        fix = "prepare it again with more text, or with a smaller --validation-fraction"
        raise UserError(ExitCode.DATA, "dataset has no training tokens", folder, fix)
    return Corpus(dataset.train.n_tokens, dataset.info.vocab_size, str(folder))


def parse_tokens(text: str) -> float:
    """Return the tokens of a corpus, such as `14e9`; raise `UserError` (USAGE) for other text, or for too many or 0."""
    match = _AMOUNT.fullmatch(text)
    if not match or match[2] or not 1 <= float(match[1]) <= _LARGEST_CORPUS:
        fix = f"give a number from 1 to {_LARGEST_CORPUS:.0e}, such as 14e9"
        raise UserError(ExitCode.USAGE, "not a number of tokens", f"--corpus-tokens {quote(text)}", fix)
    return float(match[1])


def predicted_loss(parameters: float, tokens: float, corpus_tokens: float | None) -> float:
    """Return the predicted loss in nats a token.

    Args:
        parameters: all parameters of the model.
        tokens: training tokens, including repetitions.
        corpus_tokens: different tokens that there are; None means without limit, and the law without repetitions.
    """
    if corpus_tokens is not None:
        unique = min(corpus_tokens, tokens)
        parameters = _worth(parameters, _PARAMETERS_PER_TOKEN * unique, _EXCESS_PARAMETERS)
        tokens = _worth(tokens, unique, REPEATED_TOKENS)
    return _E + _A / parameters**_EXPONENT + _B / tokens**_EXPONENT


def choices(flops: float, corpus: Corpus, seq_length: int) -> list[Choice]:
    """Return the shapes that are worth training, from small to large, each with the tokens that it should read.

    Args:
        flops: the budget, as `model.flops` counts.
        corpus: tokens and vocabulary.
        seq_length: tokens in a row.

    Raises:
        UserError: USAGE for a budget outside of 1e12 to 1e26 FLOPs.
    """
    if not _LEAST_FLOPS <= flops <= _MOST_FLOPS:
        fix = f"give a budget from {_LEAST_FLOPS:.0e} to {_MOST_FLOPS:.0e}"
        raise UserError(ExitCode.USAGE, f"budget of {flops:.3g} floating point operations", "--budget", fix)
    corpus_tokens, vocab_size, _ = corpus
    most_tokens = math.inf if corpus_tokens is None else corpus_tokens * (1 + REPEATED_TOKENS * _MOST_REPETITIONS)
    found = []
    for shape in SHAPES:
        n_layer, n_head, n_embd, _ = shape
        model = ModelConfig(
            vocab_size=vocab_size, n_positions=seq_length, n_layer=n_layer, n_head=n_head, n_embd=n_embd
        )
        tokens = min(flops / _mean_flops_per_token(model, seq_length), most_tokens)
        loss = predicted_loss(model.parameters, tokens, corpus_tokens)
        found.append(Choice(shape, model, seq_length, tokens, loss, corpus_tokens))
        if corpus_tokens is not None:
            useful = _PARAMETERS_PER_TOKEN * min(corpus_tokens, tokens)
            if model.parameters > useful * (1 + _EXCESS_PARAMETERS * _MOST_REPETITIONS):
                break
    return found


def best_batch(tokens: float) -> float:
    """Return the batch size, in tokens, that reaches the lowest loss in a run of so many tokens.

    Li et al., arXiv:2503.04715, fitted it on runs of 2 to 100 billion tokens.
    """
    return 0.58 * tokens**0.571


def run_values(choice: Choice, n_devices: int) -> dict[str, dict[str, Any]]:
    """Return the values of a config that trains a choice, without dataset and output.

    The batch is the one nearest to `best_batch` of the form `n_devices` x 2^k rows, so that any mesh divides it.

    Raises:
        UserError: USAGE if the run would have fewer than 100 steps.
    """
    wanted = best_batch(choice.tokens) / (choice.seq_length * n_devices)
    exponent = max(0, round(math.log2(wanted)))
    n_rows = n_devices * 2 ** min(exponent, int(math.log2(MOST_ROWS / n_devices)))
    steps = int(choice.tokens / (n_rows * choice.seq_length))
    if steps < _FEWEST_STEPS:
        what = f"budget and corpus allow only {steps} steps of {n_rows:,} rows x {choice.seq_length:,} tokens"
        fix = f"at least {_FEWEST_STEPS} are needed: give more of both, fewer devices, or a smaller --seq-length"
        raise UserError(ExitCode.USAGE, what, "--budget", fix)
    model = {key: getattr(choice.model, key) for key in ("n_positions", "n_layer", "n_head", "n_embd")}
    if choice.dropout:
        model |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), choice.dropout)
    data = {"seq_length": choice.seq_length, "global_batch_size": n_rows}
    growth = {"until": _GROWTH_UNTIL, "n_layer": _layers_before_growth(choice.model)}
    return {"model": model, "data": data, "growth": growth, "training": {"total_steps": steps}}


def _layers_before_growth(model: ModelConfig) -> int:
    return max(1, model.n_layer // 4)


def _mean_flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """Return the operations of `flops_per_token`, the mean over all steps of a run that grows."""
    smaller = model.model_copy(update={"n_layer": _layers_before_growth(model)})
    before, after = (flops_per_token(each, seq_length) for each in (smaller, model))
    return _GROWTH_UNTIL * before + (1 - _GROWTH_UNTIL) * after


def _worth(amount: float, unique: float, r_star: float) -> float:
    """Return the effective number of tokens, or of parameters.

    Of `amount`, only `unique` are new, and the others count less. The result is the number of new ones that would have
    the same worth.
    """
    unique = min(amount, unique)
    return unique * (1 - r_star * math.expm1((1 - amount / unique) / r_star))
