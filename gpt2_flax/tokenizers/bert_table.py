"""The ids of a BERT tokenizer by table look-up: many times as fast on Chinese text, and the same on any text.

To a BERT tokenizer most of Chinese text is characters that stand alone: a Chinese character or a punctuation mark is a
word of its own, a blank is no word, whatever stands beside them. `BertTable` asks the tokenizer once which characters
these are and what their ids are. What lies between them, a *run* (Latin words, digits, kana, emoji, marks), it asks
for too, each distinct run once.

That gives the same ids because all that the tokenizer does before it looks up words treats each character by itself,
save one step: lower-casing puts combining marks that follow one another into their canonical order. No part of a
character that stands alone moves in that: what remains of it is no combining mark.

Dimension key: B texts, U UTF-16 units, R runs, N known runs, T tokens.
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import islice, pairwise

import numpy as np
import tokenizers
from tokenizers import models

from gpt2_flax.tokenizers.ragged_ids import Encoded, token_dtype

GROUP_CHARACTERS = 2**16  # looked up at once; larger arrays would be new memory from the system each time
KNOWN_RUNS = 2**17  # kept at most, or so, and their characters: about 30 MB
KNOWN_CHARACTERS = 2**22

_UNITS = 2**16
_SURROGATES = range(0xD800, 0xE000)


class BertTable:
    """Encodes texts as `backend` does, a tokenizer of BertNormalizer, BertPreTokenizer and WordPiece.

    Its special tokens must count as text there (`encode_special_tokens`). `vocab_size` is larger than every id.
    Memory stays below some 50 MB, whatever the texts. Making one takes half a second. Not for several threads at once.
    """

    def __init__(self, backend: tokenizers.Tokenizer, vocab_size: int):
        self._backend, self._vocab_size = backend, vocab_size
        self._space, self._run = vocab_size, vocab_size + 1  # in place of an id
        self._dtype = token_dtype(vocab_size + 2)
        self._table = self._build()
        # Any character that stands alone can part words; that with the largest id is not the unknown one, as a rule.
        mark = int(np.where(self._table < vocab_size, self._table, 0).argmax())
        self._mark, self._mark_id = chr(mark), self._table[mark]
        self._numbers: defaultdict[str, int] = defaultdict()
        self._numbers.default_factory = self._numbers.__len__  # a new run gets the next number
        self._forget()

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Returns the ids of each text; raises UnicodeEncodeError for a lone surrogate."""
        ends_B = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)) + 1)
        cuts = np.flatnonzero(np.diff(ends_B // GROUP_CHARACTERS)) + 1
        groups = [self._encode_group(texts[a:b]) for a, b in pairwise((0, *cuts.tolist(), len(texts))) if a < b]
        if not groups:
            return Encoded.from_lists([], self._vocab_size)
        ids, lengths = zip(*groups, strict=True)
        return Encoded(np.concatenate(ids, dtype=token_dtype(self._vocab_size)), np.concatenate(lengths))

    def _encode_group(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids_T in the type of the table and int64 lengths_B."""
        joined = "\n".join([*texts, ""])
        if joined.count("\n") > len(texts):  # line feeds inside texts: a blank is worth the same
            joined = "\n".join([*(text.replace("\n", " ") for text in texts), ""])
        units_U = np.frombuffer(joined.encode("utf-16-le"), np.dtype("<u2"))
        text_ends_B = np.flatnonzero(units_U == ord("\n"))
        slots_U = self._table.take(units_U)
        # The last unit is a line feed, so each run has an end: the place of the first unit that is not part of it.
        is_run_U = slots_U == self._run
        edges = np.flatnonzero(np.diff(is_run_U, prepend=False))
        starts_R, ends_R = edges[::2], edges[1::2]
        if len(starts_R):
            numbers_R = self._number(_words(units_U, is_run_U, ends_R))
            slots_U, text_ends_B = self._place(slots_U, text_ends_B, starts_R, ends_R, numbers_R)
        is_token_U = slots_U < self._vocab_size
        text_starts_B = np.concatenate(([0], text_ends_B[:-1]))  # a line feed is no token: it may count for either text
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
        """Writes the ids of each run over its units; returns slots_U, longer where a run needs it, and text_ends_B."""
        lengths_R = self._bounds[numbers_R + 1] - self._bounds[numbers_R]
        lacking_R = np.maximum(lengths_R - (ends_R - starts_R), 0)  # normalising can make one character several
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
        """Returns the number of each run in `_ids` and `_bounds`, after asking for those not known."""
        if len(self._numbers) > KNOWN_RUNS or self._characters > KNOWN_CHARACTERS:
            self._forget()
        numbers_R = np.fromiter(map(self._numbers.__getitem__, words), np.intp, len(words))
        if n_new := len(self._numbers) + 1 - len(self._bounds):
            new = [*islice(reversed(self._numbers), n_new)][::-1]
            encoded = self._encode_runs(new)
            self._characters += sum(map(len, new))
            ids = np.concatenate((self._ids, encoded.ids_T), dtype=self._dtype)
            bounds = np.concatenate((self._bounds, self._bounds[-1] + np.cumsum(encoded.lengths_B)))
            self._ids, self._bounds = ids, bounds  # at once: an interruption leaves runs to be asked for, no wrong ids
        return numbers_R

    def _forget(self) -> None:
        # The ids of N known runs one after the other, and the N + 1 places where one ends and the next begins.
        self._ids, self._bounds = np.empty(0, self._dtype), np.zeros(1, np.int64)
        self._numbers.clear()
        self._characters = 0

    def _encode_runs(self, runs: list[str]) -> Encoded:
        """Asks the tokenizer; about all runs as one text, which takes it half as long as many texts do."""
        (ids,) = _ask(self._backend, [self._mark.join([*runs, ""])])
        ids_T = np.array(ids, self._dtype)
        ends = np.flatnonzero(ids_T == self._mark_id)
        if len(ends) != len(runs):  # some run has the id of the mark
            return Encoded.from_lists(_ask(self._backend, runs), self._vocab_size)
        return Encoded(np.delete(ids_T, ends), np.diff(ends, prepend=-1) - 1)

    def _build(self) -> np.ndarray:
        """Returns the id of the character of each unit, `_space` or `_run`.

        "a", a character, "a" are two words more than the character alone if nothing can join it. One that is a word by
        itself stands alone then, one that is none is a blank. Words are what a probe with another vocabulary counts:
        the real one may lack "a", and does not tell whether what it does not know is one word or two.
        """
        probe = tokenizers.Tokenizer(models.WordLevel({"word": 0}, unk_token="word"))
        probe.normalizer, probe.pre_tokenizer = self._backend.normalizer, self._backend.pre_tokenizer
        characters = [chr(unit) for unit in range(_UNITS) if unit not in _SURROGATES]
        words = dict(zip(characters, _ask(probe, [f"a{character}a" for character in characters]), strict=True))
        parting = [character for character in characters if len(words[character]) > 1]
        table = np.full(_UNITS, self._run, self._dtype)
        for character, ids in zip(parting, _ask(self._backend, parting), strict=True):
            if len(ids) == len(words[character]) - 2 < 2:  # each word has an id or more, so these are also its words
                table[ord(character)] = ids[0] if ids else self._space
        return table


def _words(units_U: np.ndarray, is_run_U: np.ndarray, ends_R: np.ndarray) -> list[str]:
    """Returns the text of each run."""
    wanted_U = is_run_U.copy()
    wanted_U[ends_R] = True
    spaced = np.where(is_run_U, units_U, ord(" "))[wanted_U]  # a blank is never part of a run
    return spaced.tobytes().decode("utf-16-le").split(" ")[:-1]


def _ask(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of each text; a part at a time, as an encoding is much larger than its ids."""
    parts = (texts[start : start + 512] for start in range(0, len(texts), 512))
    return [encoding.ids for part in parts for encoding in backend.encode_batch_fast(part, add_special_tokens=False)]
