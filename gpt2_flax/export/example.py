"""Choose the example prompt of a model card: never empty, and in the language of the model if that is known."""

import unicodedata
from collections.abc import Iterable, Sequence

from gpt2_flax.tokenizers.tokenizer import Tokenizer

_MOST = 20  # characters
_CHINESE, _ENGLISH = "这是很久之前的事情了", "Once upon a time"


def example_prompt(given: Iterable[str | None], texts: Sequence[str], tokenizer: Tokenizer, n_positions: int) -> str:
    """Return the first of `given` that is not blank, else the first words of one of `texts`.

    If no text begins with printable characters, the prompt is Chinese for a Chinese vocabulary, else English.
    """
    if asked := next((prompt for prompt in given if prompt and prompt.strip()), None):
        return asked
    most = max(1, min(_MOST, n_positions // 4))  # leaves room for new tokens: a character has up to three tokens
    (ids,) = tokenizer.encode_batch([_CHINESE])
    # A vocabulary of another language encodes these characters as bytes or unknown tokens.
    known = _CHINESE if len(ids) <= len(_CHINESE) and tokenizer.unk_id not in ids else _ENGLISH
    beginnings = (_beginning(text, most) for text in (*texts, known))
    return next(start for start in beginnings if _is_plain(start))


def _beginning(text: str, most: int) -> str:
    """Return the first words of `text` that fit into `most` characters, or the start of a longer first word."""
    words = text.split() or [""]
    start = words[0]
    if len(start) > most:  # as in Chinese, where a sentence has no blanks
        end = most
        while end and _belong_together(start[end - 1], start[end]):
            end -= 1
        return start[:end]
    for word in words[1:]:
        if len(start) + 1 + len(word) > most:
            break
        start += f" {word}"
    return start


def _belong_together(one: str, other: str) -> bool:
    """Return whether two consecutive characters look like one: accents, emoji, flags, Hangul syllables."""
    joiner = "\u200d"
    return (
        unicodedata.category(other).startswith("M")
        or unicodedata.combining(one) == 9  # a virama, which joins two consonants
        or joiner in (one, other)
        or "\U0001f3fb" <= other <= "\U0001f3ff"  # skin tones
        or "\U0001f1e6" <= min(one, other) <= max(one, other) <= "\U0001f1ff"  # the two letters of a flag
        or "\u1160" <= other <= "\u11ff"  # vowels and final consonants
    )


def _is_plain(text: str) -> bool:
    return text.isprintable() and "\ufffd" not in text and any(map(str.isalnum, text))
