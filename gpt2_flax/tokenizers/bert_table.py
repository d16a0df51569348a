"""Encode text with a BERT tokenizer by table look-up: many times as fast on Chinese text, with the same ids.

To a BERT tokenizer, most characters of Chinese text *stand alone*, whatever characters are beside them: a Chinese
character or a punctuation mark is a word, a blank is no word. `BertTable` asks the tokenizer once for these characters
and their ids. The text between them is *runs* of other characters (Latin words, digits, kana, emoji, marks).
`BertTable` asks the tokenizer for each distinct run once.

The ids are the same because the tokenizer treats each character by itself before it looks up words, with one exception.
Lower-casing puts adjacent combining marks into their canonical order. This never moves a character that stands alone,
because no combining mark remains of it.

Dimension key: B texts, U UTF-16 units, R runs, N known runs, T tokens.
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import islice, pairwise

import numpy as np
import tokenizers
from tokenizers import models

from gpt2_flax.tokenizers.ragged_ids import RaggedIds, token_dtype

GROUP_CHARACTERS = 2**16  # looked up at once; larger arrays would be new memory from the system each time
# About the most that is kept of known runs, 30 MB:
KNOWN_RUNS = 2**17
KNOWN_CHARACTERS = 2**22

_UNITS = 2**16
_SURROGATES = range(0xD800, 0xE000)


class BertTable:
    """Encodes texts as a BERT tokenizer does.

    Its memory stays below about 50 MB for any texts. Building the table takes half a second. Not thread-safe.

    Args:
        backend: a tokenizer of BertNormalizer, BertPreTokenizer and WordPiece, with `encode_special_tokens` set.
        vocab_size: larger than every id.
    """

    def __init__(self, backend: tokenizers.Tokenizer, vocab_size: int):
        self._backend, self._vocab_size = backend, vocab_size
        self._space, self._run = vocab_size, vocab_size + 1  # in the table, in the place of an id
        self._dtype = token_dtype(vocab_size + 2)
        self._table = self._build()
        # Separates runs: a character that stands alone. The one with the largest id is rarely the unknown token.
        mark = int(np.where(self._table < vocab_size, self._table, 0).argmax())
        self._mark, self._mark_id = chr(mark), self._table[mark]
        self._numbers: defaultdict[str, int] = defaultdict()
        self._numbers.default_factory = self._numbers.__len__  # a new run gets the next number
        self._forget()

    def encode(self, texts: Sequence[str]) -> RaggedIds:
        """Return the ids of each text. Raises UnicodeEncodeError for a lone surrogate."""
        ends_B = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)) + 1)
        cuts = np.flatnonzero(np.diff(ends_B // GROUP_CHARACTERS)) + 1
        groups = [self._encode_group(texts[a:b]) for a, b in pairwise((0, *cuts.tolist(), len(texts))) if a < b]
        if not groups:
            return RaggedIds.from_lists([], self._vocab_size)
        ids, lengths = zip(*groups, strict=True)
        return RaggedIds(np.concatenate(ids, dtype=token_dtype(self._vocab_size)), np.concatenate(lengths))

    def _encode_group(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return ids_T in the dtype of the table and int64 lengths_B."""
        joined = "\n".join([*texts, ""])
        if joined.count("\n") > len(texts):  # for line feeds inside texts, which count as blanks
            joined = "\n".join([*(text.replace("\n", " ") for text in texts), ""])
        units_U = np.frombuffer(joined.encode("utf-16-le"), np.dtype("<u2"))
        text_ends_B = np.flatnonzero(units_U == ord("\n"))
        slots_U = self._table.take(units_U)
        # A run ends at the first unit after it. There is one, since the last unit is a line feed.
        is_run_U = slots_U == self._run
        edges = np.flatnonzero(np.diff(is_run_U, prepend=False))
        starts_R, ends_R = edges[::2], edges[1::2]
        if len(starts_R):
            numbers_R = self._number(_words(units_U, is_run_U, ends_R))
            slots_U, text_ends_B = self._place(slots_U, text_ends_B, starts_R, ends_R, numbers_R)
        is_token_U = slots_U < self._vocab_size
        text_starts_B = np.concatenate(([0], text_ends_B[:-1]))  # a line feed is no token: it may belong to either
        lengths_B = np.add.reduceat(is_token_U, text_starts_B, dtype=np.int32)
        return slots_U.compress(is_token_U), lengths_B.astype(np.int64)

    def _place(
        self,
        slots_U: np.ndarray,
        text_ends_B: np.ndarray,
        starts_R: np.ndarray,
        ends_R: np.ndarray,
        numbers_R: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Write the ids of each run over its units.

        Returns:
            slots_U and text_ends_B, with units inserted if a run has more ids than units.
        """
        lengths_R = self._bounds[numbers_R + 1] - self._bounds[numbers_R]
        lacking_R = np.maximum(lengths_R - (ends_R - starts_R), 0)  # normalizing can turn one character into several
        if lacking_R.any():
            slots_U = np.insert(slots_U, np.repeat(ends_R, lacking_R), self._run)
            inserted = np.concatenate(([0], np.cumsum(lacking_R)))
            text_ends_B = text_ends_B + inserted[np.searchsorted(starts_R, text_ends_B)]
            starts_R = starts_R + inserted[:-1]
        offsets_R = np.cumsum(lengths_R) - lengths_R
        token_T = np.arange(lengths_R.sum())
        to_T = np.repeat(starts_R - offsets_R, lengths_R) + token_T
        from_T = np.repeat(self._bounds[numbers_R] - offsets_R, lengths_R) + token_T
        slots_U[to_T] = self._ids[from_T]
        return slots_U, text_ends_B

    def _number(self, words: list[str]) -> np.ndarray:
        """Return the index of each run in `_bounds`, after asking the tokenizer for the new runs."""
        if len(self._numbers) > KNOWN_RUNS or self._characters > KNOWN_CHARACTERS:
            self._forget()
        numbers_R = np.fromiter(map(self._numbers.__getitem__, words), np.intp, len(words))
        if n_new := len(self._numbers) + 1 - len(self._bounds):
            new = [*islice(reversed(self._numbers), n_new)][::-1]
            encoded = self._encode_runs(new)
            self._characters += sum(map(len, new))
            ids = np.concatenate((self._ids, encoded.ids_T), dtype=self._dtype)
            bounds = np.concatenate((self._bounds, self._bounds[-1] + np.cumsum(encoded.lengths_B)))
            self._ids, self._bounds = ids, bounds  # together, so that an interruption leaves no wrong ids
        return numbers_R

    def _forget(self) -> None:
        # The ids of N known runs, joined, and the N + 1 bounds between the runs.
        self._ids, self._bounds = np.empty(0, self._dtype), np.zeros(1, np.int64)
        self._numbers.clear()
        self._characters = 0

    def _encode_runs(self, runs: list[str]) -> RaggedIds:
        """Ask the tokenizer for the ids of runs, joined to one text, which takes half the time of many texts."""
        (ids,) = ids_of(self._backend, [self._mark.join([*runs, ""])])
        ids_T = np.array(ids, self._dtype)
        ends = np.flatnonzero(ids_T == self._mark_id)
        if len(ends) != len(runs):  # some run has the id of the mark
            return RaggedIds.from_lists(ids_of(self._backend, runs), self._vocab_size)
        return RaggedIds(np.delete(ids_T, ends), np.diff(ends, prepend=-1) - 1)

    def _build(self) -> np.ndarray:
        """Return the table (65,536,): for each unit the id of its character, `_space` or `_run`.

        A character separates words if "a", the character and "a" are at least two words. If these are two words more
        than the character alone, it stands alone: as a word, or as a blank if it is no word. A probe with another
        vocabulary counts the words, since the real vocabulary may lack "a", and gives one unknown token for two words.
        """
        probe = tokenizers.Tokenizer(models.WordLevel({"word": 0}, unk_token="word"))
        probe.normalizer, probe.pre_tokenizer = self._backend.normalizer, self._backend.pre_tokenizer
        characters = [chr(unit) for unit in range(_UNITS) if unit not in _SURROGATES]
        words = dict(zip(characters, ids_of(probe, [f"a{character}a" for character in characters]), strict=True))
        separating = [character for character in characters if len(words[character]) > 1]
        table = np.full(_UNITS, self._run, self._dtype)
        for character, ids in zip(separating, ids_of(self._backend, separating), strict=True):
            if len(ids) == len(words[character]) - 2 < 2:  # as many ids as words, since each word has an id
                table[ord(character)] = ids[0] if ids else self._space
        return table


def _words(units_U: np.ndarray, is_run_U: np.ndarray, ends_R: np.ndarray) -> list[str]:
    """Return the text of each run."""
    wanted_U = is_run_U.copy()
    wanted_U[ends_R] = True
    spaced = np.where(is_run_U, units_U, ord(" "))[wanted_U]  # a run has no blank
    return spaced.tobytes().decode("utf-16-le").split(" ")[:-1]


def ids_of(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text, asking for 512 at a time, since an encoding is much larger than its ids."""
    some = (texts[start : start + 512] for start in range(0, len(texts), 512))
    return [encoding.ids for batch in some for encoding in backend.encode_batch_fast(batch, add_special_tokens=False)]
