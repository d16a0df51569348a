"""Continuations of texts, whole or as they come."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from gpt2_flax.checkpoint.source import Source
from gpt2_flax.checkpoint.weights import model_from_weights
from gpt2_flax.errors import ExitCode, UserError, printable
from gpt2_flax.inference.decode import generate, generate_one
from gpt2_flax.inference.sampling import Sampling
from gpt2_flax.model.decoding import Decoder, decoder_of
from gpt2_flax.tokenizers.tokenizer import Tokenizer

MOST_ROWS = 32  # of a batch
_MOST_NAMED = 20  # characters in a warning


class Generator:
    """A model in float32 and its tokenizer, loaded once, that continue texts.

    Tokens without text ([UNK], [PAD] and the begin of a document) are never chosen, unless `Sampling.banned` is set.
    """

    def __init__(self, source: Source):
        self.tokenizer: Tokenizer = source.tokenizer()
        model = model_from_weights(source.model.model_copy(update={"dtype": "float32"}), source.weights)
        self.decoder: Decoder = decoder_of(model)

    def texts(
        self, prompts: Sequence[str], max_new_tokens: int, sampling: Sampling, seed: int, samples: int = 1
    ) -> list[str]:
        """Return each prompt with its continuation; the `samples` of a prompt follow each other.

        Raises:
            UserError: DATA, when a prompt leaves no room for a token.
        """
        return list(self.texts_in_turn(prompts, max_new_tokens, sampling, seed, samples))

    def texts_in_turn(
        self, prompts: Sequence[str], max_new_tokens: int, sampling: Sampling, seed: int, samples: int = 1
    ) -> Iterator[str]:
        """Yield the result of `texts`, a batch at a time; raise its errors before the first text."""
        _check_lengths(prompts, prompt_ids(self.tokenizer, prompts), self.decoder.cfg.n_positions)
        repeated = [prompt for prompt in prompts for _ in range(samples)]
        batches = ((row, repeated[row : row + MOST_ROWS]) for row in range(0, len(repeated), MOST_ROWS))
        return itertools.chain.from_iterable(
            continue_texts(self.decoder, self.tokenizer, batch, max_new_tokens, sampling, seed, row)
            for row, batch in batches
        )

    def stream(self, prompt: str, max_new_tokens: int, sampling: Sampling, seed: int) -> Iterator[str]:
        """Yield the continuation that `texts` would return, in pieces as they come.

        Raises:
            UserError: DATA, at once, when the prompt leaves no room for a token.
        """
        (before,) = prompt_ids(self.tokenizer, [prompt])
        _check_lengths([prompt], [before], self.decoder.cfg.n_positions)
        return stream_text(self.tokenizer, before, self.new_ids(before, max_new_tokens, sampling, seed))

    def new_ids(self, before: list[int], max_new_tokens: int, sampling: Sampling, seed: int) -> Iterator[int]:
        """Yield the ids after a prompt as they come, without the end of the document; raises as `stream` does."""
        sampling = with_text_only(sampling, self.tokenizer, self.decoder.cfg.vocab_size)
        eos_id = self.tokenizer.eos_id
        return generate_one(self.decoder, before, eos_id, max_new_tokens, sampling, seed)


def prompt_ids(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text as the begin of a document."""
    return [[tokenizer.bos_id, *ids.tolist()] for ids in tokenizer.encode_batch(prompts)]


def _check_lengths(prompts: Sequence[str], ids: Sequence[Sequence[int]], n_positions: int) -> None:
    """Raise `UserError` (DATA) for a prompt that leaves no room for a token."""
    for prompt, tokens in zip(prompts, ids, strict=True):
        if len(tokens) >= n_positions:
            what = f"prompt of {len(tokens)} tokens leaves no room in the model's {n_positions} positions"
            fix = f"shorten it to at most {n_positions - 1} tokens, the begin of the document included"
            raise UserError(ExitCode.DATA, what, f"{printable(prompt[:20])}...", fix)


def unknown_in(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Return the characters of `texts` that the vocabulary lacks, and other words that it cannot spell."""

    def unknown(texts: Sequence[str]) -> list[str]:
        encoded = tokenizer.encode_batch(texts)
        return [text for text, ids in zip(texts, encoded, strict=True) if tokenizer.unk_id in ids.tolist()]

    if tokenizer.unk_id is None or not (texts := unknown(texts)):
        return []
    characters = unknown(sorted(set("".join(texts))))
    words = unknown(sorted({word for text in texts for word in text.split()}))
    return characters + [word for word in words if not set(word) & set(characters)]


def unknown_warning(tokenizer: Tokenizer, texts: Sequence[str]) -> str | None:
    """Return a sentence that names what `unknown_in` returns, None if that is nothing."""
    unknown = unknown_in(tokenizer, texts)
    named = " ".join(map(printable, unknown[:_MOST_NAMED]))
    more = f" and {len(unknown) - _MOST_NAMED} more" if len(unknown) > _MOST_NAMED else ""
    return f"not in the vocabulary, the model sees [UNK] for it: {named}{more}" if unknown else None


def with_text_only(sampling: Sampling, tokenizer: Tokenizer, vocab_size: int, unknown: bool = False) -> Sampling:
    """Return `sampling` with all tokens without text banned, unless `sampling.banned` is set.

    These are `[UNK]` (allowed by `unknown`), `[PAD]`, the begin of a document, and ids that the tokenizer lacks.
    """
    if sampling.banned is not None:
        return sampling
    special = {tokenizer.pad_id, tokenizer.bos_id, None if unknown else tokenizer.unk_id} - {None, tokenizer.eos_id}
    return replace(sampling, banned=(*sorted(special), *range(tokenizer.vocab_size, vocab_size)))


def continue_texts(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    first_row: int = 0,
) -> list[str]:
    """Return each prompt with its continuation; arguments as in `decode.generate`."""
    sampling = with_text_only(sampling, tokenizer, decoder.cfg.vocab_size)
    ids = prompt_ids(tokenizer, prompts)
    new_ids = generate(decoder, ids, tokenizer.eos_id, max_new_tokens, sampling, seed, first_row)
    return [
        prompt + continuation(tokenizer, before, after)
        for prompt, before, after in zip(prompts, ids, new_ids, strict=True)
    ]


def continuation(tokenizer: Tokenizer, before: list[int], after: list[int]) -> str:
    """Return the text that the ids `after` add to the ids `before`, including a blank between them."""
    whole, start = tokenizer.decode(before + after), tokenizer.decode(before)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(whole, start, strict=False))
    return whole[sum(1 for _ in same) :]


def stream_text(tokenizer: Tokenizer, before: list[int], new_ids: Iterator[int]) -> Iterator[str]:
    """Yield the text that `new_ids` add to `before`, in pieces that later ids do not change."""
    after: list[int] = []
    text = shown = ""
    for token in new_ids:
        after.append(token)
        text = continuation(tokenizer, before, after)
        # The bytes of a character may come as several tokens; until the last one, they decode to U+FFFD.
        whole = text.rstrip("\ufffd")
        if len(whole) > len(shown) and whole.startswith(shown):
            yield whole[len(shown) :]
            shown = whole
    if len(text) > len(shown):
        yield text[len(shown) :]
