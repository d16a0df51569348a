"""Check that `transformers` will give the ids of a tokenizer, from the `tokenizer.json` that it saves."""

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import tokenizers

from gpt2_flax.errors import ExitCode, UserError, quote
from gpt2_flax.folders import scratch_folder
from gpt2_flax.tokenizers.bert_table import ids_of
from gpt2_flax.tokenizers.sentencepiece import SentencePieceTokenizer
from gpt2_flax.tokenizers.tokenizer import Tokenizer

ODD_TEXTS = (
    "这是很久之前的事情了。",
    "The quick brown fox jumps over the lazy dog, 3.14 times!",
    "2024年。JAX和Flax在GPU上训练GPT-2模型。",
    "東京タワー — café naïve Straße",
    "emoji 😀, (brackets) and internationalization",
    "a line\nand\tanother\n\n  indented  one ",
)
SAMPLES, SAMPLE_CHARACTERS = 200, 2000  # texts of a corpus to compare, and most characters of each
_TIES = 0.02
"""Share of the sample texts that a foreign unigram model may segment differently: see `tokenizers.sentencepiece`."""


def check_exported(tokenizer: Tokenizer, samples: Sequence[str], where: object) -> None:
    """Compare the ids of `ODD_TEXTS` and `samples` with the saved `tokenizer.json`, which `AutoTokenizer` runs.

    A few samples may differ for a SentencePiece model; a warning on standard error gives their number.

    Args:
        where: the name of the tokenizer in errors.

    Raises:
        UserError: DATA if more texts differ, since a model trained with the tokenizer could not be exported.
    """
    fix = "a model trained with it could not be exported: use another one, or make one with `gpt2-flax tokenizer`"
    with scratch_folder() as folder:
        try:
            tokenizer.save(folder)
            saved = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            saved.encode_special_tokens = True
            different = differing_texts(tokenizer, partial(ids_of, saved), samples)
        except BaseException as error:
            # `tokenizers` raises plain Exception; its panics are not even that.
            if type(error) is not Exception and type(error).__name__ != "PanicException":
                raise
            what = f"tokenizer cannot be saved for transformers ({quote(str(error))})"
            raise UserError(ExitCode.DATA, what, where, fix) from None
    if too_many(tokenizer, different, samples):
        what = f"tokenizer gives other ids once it is saved for transformers, first for {quote(different[0])}"
        raise UserError(ExitCode.DATA, what, where, fix)
    if different:
        what = f"{len(different)} of {len(samples)} sample texts get other ids from transformers"
        print(f"warning: {what}, where segmentations are tied, first {quote(different[0])}", file=sys.stderr)


def differing_texts(
    tokenizer: Tokenizer, encode: Callable[[Sequence[str]], Sequence[Sequence[int]]], samples: Sequence[str]
) -> list[str]:
    """Return the texts among `ODD_TEXTS` and `samples` for which `encode`, the saved tokenizer, gives other ids."""
    texts = [*ODD_TEXTS, *samples]
    ours, theirs = tokenizer.encode_batch(texts), encode(texts)
    # A corpus may hold "<s>" as text, by default a special token in `transformers`. Ids of special tokens do not count.
    special = [token for token in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) if token is not None]
    kept = (ids[~np.isin(ids, special)] for ids in map(np.asarray, theirs))
    return [text for text, one, other in zip(texts, ours, kept, strict=True) if not np.array_equal(one, other)]


def too_many(tokenizer: Tokenizer, different: Sequence[str], samples: Sequence[str]) -> bool:
    """Return whether more texts are `different` than ties between segmentations can explain."""
    allowed = math.ceil(_TIES * len(samples)) if isinstance(tokenizer, SentencePieceTokenizer) else 0
    return len(different) > allowed or not set(ODD_TEXTS).isdisjoint(different)


def spread(texts: Sequence[str], count: int = SAMPLES) -> list[str]:
    """Return the beginnings of up to `count` evenly spread texts."""
    count = min(count, len(texts))
    return [texts[index * len(texts) // count][:SAMPLE_CHARACTERS] for index in range(count)]
