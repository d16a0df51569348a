"""Vocabularies from one's own text.

Training reads a sample of the documents, chosen by their hash, so that it takes the same time and memory for any corpus
and gives the same vocabulary for the same text.
"""

import hashlib
import heapq
import io
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from sentencepiece import SentencePieceTrainer
from tokenizers import pre_tokenizers

from gpt2_flax.errors import ExitCode, UserError, quote
from gpt2_flax.progress import progress_bar
from gpt2_flax.text.corpus import Unit
from gpt2_flax.text.documents import Report
from gpt2_flax.tokenizers.sentencepiece import SentencePieceTokenizer, exact_scores
from gpt2_flax.tokenizers.tokenizer import Tokenizer
from gpt2_flax.tokenizers.wordpiece import LONGEST_WORD, MASK, SPECIAL_TOKENS, WordPieceTokenizer, bert_normalizer

ModelType = Literal["bpe", "unigram", "char"]

WHERE = "tokenizer training"
RESERVED = 4 + 256  # the special pieces and bytes of SentencePiece
TRAINING_BYTES = 50_000_000
MEASURING_BYTES = 1_000_000

Word = list[str]  # as pieces
Pair = tuple[str, str]


class Sample(NamedTuple):
    """Documents, or parts of long ones, in the order of their hashes."""

    training: list[str]
    held: list[str]
    """For measuring; not in `training`, unless the corpus has no more than fits."""


class Coverage(NamedTuple):
    """How well a vocabulary fits a text."""

    characters_per_token: float
    unknown_rate: float
    """Share of tokens that are the unknown one."""


def sample_documents(
    units: Sequence[Unit], report: Report, training_bytes: int = TRAINING_BYTES, held_bytes: int = MEASURING_BYTES
) -> Sample:
    """Reads the corpus once and returns the documents with the smallest hashes, as many as fit in both sizes.

    The smallest of all are held, the others are for training. When the whole corpus fits, all of it is for training.
    The sample depends on the documents alone, not on their order or units; equal documents stay together. Memory is
    that of the sample in UTF-8 and a batch of the corpus. Raises what the units raise; `report` gets their problems.
    """
    reservoir = _Reservoir(training_bytes + held_bytes)
    with progress_bar("reading", sum(unit.size for unit in units), "B") as advance:
        for unit in units:
            for batch in unit.batches(report):
                for text in batch.texts:
                    reservoir.add(text)
                advance(batch.n_bytes)
    documents = reservoir.documents()
    boundary = _boundary(documents, held_bytes)
    everything = reservoir.complete or boundary == len(documents)
    training = documents[0 if everything else boundary :]
    return Sample(_texts(training), _texts(documents[:boundary]))


def measure(tokenizer: Tokenizer, documents: Sequence[str]) -> Coverage:
    """Encodes `documents` and counts; line ends and blanks are characters too."""
    ids_T = tokenizer.encode_batch(documents).ids_T
    n_tokens = max(1, len(ids_T))
    n_unknown = 0 if tokenizer.unk_id is None else np.count_nonzero(ids_T == tokenizer.unk_id)
    return Coverage(sum(map(len, documents)) / n_tokens, n_unknown / n_tokens)


def train_sentencepiece(
    documents: Iterable[str],
    vocab_size: int,
    model_type: ModelType = "bpe",
    character_coverage: float = 0.9995,
) -> SentencePieceTokenizer:
    """Returns a SentencePiece tokenizer that keeps every text as it is: no normalization, rare characters as bytes.

    A `char` model may have fewer tokens than `vocab_size`; of more characters it takes the most frequent. Raises
    `UserError` (DATA) when the text is empty, or does not suit `vocab_size`.
    """
    if vocab_size <= RESERVED:
        fix = f"take more than {RESERVED}, the number of special tokens and bytes"
        raise UserError(ExitCode.DATA, "vocabulary too small for its characters", f"--vocab-size {vocab_size}", fix)
    failures: list[Exception] = []
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_lines(documents, failures),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            max_sentence_length=2**30,  # bytes; longer lines would be left out without a word
            num_threads=16,  # the sums of unigram training, hence its pieces, depend on this number
            minloglevel=2,
        )
    except RuntimeError as error:
        if failures:  # SentencePiece has wrapped what the iterator raised
            raise failures[0] from None
        raise _sentencepiece_error(str(error), vocab_size) from None
    trained = exact_scores(model.getvalue()) if model_type == "unigram" else model.getvalue()
    return SentencePieceTokenizer(trained, WHERE)


def train_wordpiece(
    documents: Iterable[str], vocab_size: int, lowercase: bool = True, merges: bool = True
) -> WordPieceTokenizer:
    """Returns a BERT tokenizer with at most `vocab_size` tokens: the special ones, then characters, then longer pieces.

    Characters that occur twice or more are taken first, the most frequent first; what room is left goes to pieces of
    words found by byte-pair merging, unless `merges` is off. The `tokenizers` library has a trainer too, but it gives
    another vocabulary each time and more tokens than asked for. Raises `UserError` (DATA) for an empty text, or no room
    for any.
    """
    counts = _count_words(documents, lowercase)
    if not counts:
        raise _no_text()
    tokens = [*dict.fromkeys(SPECIAL_TOKENS.values()), MASK]
    room = vocab_size - len(tokens)
    if room < 1:
        fix = f"take more than {len(tokens)}, the number of special tokens"
        raise UserError(ExitCode.DATA, "vocabulary too small for its characters", f"--vocab-size {vocab_size}", fix)
    words = _in_characters(counts)
    characters: Counter[str] = Counter()
    for word, count in words:
        for piece in word:
            characters[piece] += count
    frequent = sorted((piece for piece, count in characters.items() if count > 1), key=lambda p: (-characters[p], p))
    tokens += frequent[:room]
    if merges:
        tokens += _merge(words, vocab_size - len(tokens), known=set(tokens))
    return WordPieceTokenizer("".join(token + "\n" for token in tokens).encode("utf-8"), WHERE, lowercase)


class _Reservoir:
    """The documents with the smallest hashes, as many as fit in `limit` bytes of UTF-8, whatever order they come in."""

    def __init__(self, limit: int):
        self._limit, self._size = limit, 0
        self._heap: list[tuple[int, bytes]] = []  # hash, negative so that the largest comes first, and document
        self._end = 2**64  # documents whose hashes reach this do not fit

    @property
    def complete(self) -> bool:
        """Whether it has everything that was added."""
        return self._end == 2**64

    def add(self, document: str) -> None:
        encoded = document.encode("utf-8")
        digest = hashlib.blake2b(encoded, digest_size=8, person=b"vocabulary").digest()
        number = int.from_bytes(digest, "little")
        if number >= self._end:
            return
        heapq.heappush(self._heap, (-number, encoded))
        self._size += len(encoded)
        while self._size > self._limit:
            negative, encoded = heapq.heappop(self._heap)
            self._end = -negative  # for good: what comes later leaves less room, not more
            self._size -= len(encoded)

    def documents(self) -> list[tuple[int, bytes]]:
        """Returns hashes and documents, in their order."""
        return sorted((-negative, encoded) for negative, encoded in self._heap)


def _boundary(documents: Sequence[tuple[int, bytes]], n_bytes: int) -> int:
    """Returns the first index that has at least `n_bytes` before it, and the same document neither before nor after."""
    size = 0
    for index, (number, encoded) in enumerate(documents):
        if size >= n_bytes and number != documents[index - 1][0]:
            return index
        size += len(encoded)
    return len(documents)


def _texts(documents: Iterable[tuple[int, bytes]]) -> list[str]:
    return [encoded.decode("utf-8") for _, encoded in documents]


def _lines(documents: Iterable[str], failures: list[Exception]) -> Iterator[str]:
    try:
        for document in documents:
            yield from document.split("\n")
    except Exception as error:
        failures.append(error)
        raise


def _sentencepiece_error(message: str, vocab_size: int) -> UserError:
    if "sentences_.empty()" in message:
        return _no_text()
    where = f"--vocab-size {vocab_size}"
    if most := re.search(r"value <= (\d+)", message):
        return UserError(ExitCode.DATA, "too little text for the vocabulary", where, f"take at most {most[1]}")
    if least := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return UserError(ExitCode.DATA, "vocabulary too small for its characters", where, f"take more than {least[1]}")
    return UserError(ExitCode.DATA, "SentencePiece cannot be trained", where, f"it says: {quote(message, 200)}")


def _no_text() -> UserError:
    return UserError(ExitCode.DATA, "no text to make a vocabulary from", WHERE, "give files that hold some")


def _count_words(documents: Iterable[str], lowercase: bool) -> Counter[str]:
    """Counts the words that WordPiece will see."""
    normalizer, pre_tokenizer = bert_normalizer(lowercase), pre_tokenizers.BertPreTokenizer()
    chunks: Counter[str] = Counter()
    for document in documents:
        chunks.update(normalizer.normalize_str(document).split())
    words: Counter[str] = Counter()
    for chunk, count in chunks.items():  # the slow part once for each distinct chunk
        for word, _ in pre_tokenizer.pre_tokenize_str(chunk):
            if len(word) <= LONGEST_WORD:
                words[word] += count
    return words


def _in_characters(counts: Counter[str]) -> list[tuple[Word, int]]:
    """Splits words into single characters, with `##` before all but the first; in the order of the alphabet.

    Equal pieces are one object, which halves time and memory.
    """
    inner = {character: "##" + character for character in set().union(*counts)}
    return [([word[0], *map(inner.__getitem__, word[1:])], counts[word]) for word in sorted(counts)]


def _merge(words: Iterable[tuple[Word, int]], room: int, known: set[str]) -> list[str]:
    """Returns up to `room` new pieces: again and again, the two neighbours that occur most often become one.

    Words with a character that is not in `known` are left out: they are unknown as a whole. Equal counts are decided by
    the alphabet, so the result depends on the text alone. Changes the words.
    """
    split = [(word, count) for word, count in words if len(word) > 1 and known.issuperset(word)]
    pairs: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)  # the words that have the pair, or had it
    for place, (word, count) in enumerate(split):
        for pair in itertools.pairwise(word):
            pairs[pair] += count
            places[pair].add(place)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    merged: dict[str, None] = {}
    while heap and len(merged) < room:
        count, pair = heapq.heappop(heap)
        if -count != pairs[pair]:
            continue  # counted anew since; the right entry is in the heap too
        if -count < 2:
            break
        piece = pair[0] + pair[1].removeprefix("##")
        if piece not in known:
            merged[piece] = None
        changed: set[Pair] = set()
        for place in places.pop(pair):
            word, count = split[place]
            for old, new in _join(word, pair, piece):
                pairs[old] -= count
                pairs[new] += count
                changed |= {old, new}
                places[new].add(place)
        del pairs[pair]
        for neighbours in changed:
            if pairs[neighbours] > 1:
                heapq.heappush(heap, (-pairs[neighbours], neighbours))
    return list(merged)


def _join(word: Word, pair: Pair, piece: str) -> Iterator[tuple[Pair, Pair]]:
    """Replaces every occurrence of `pair` in `word` by `piece`, from the left; yields what neighbours become others."""
    at = 0
    while at < len(word) - 1:
        if (word[at], word[at + 1]) == pair:
            word[at : at + 2] = [piece]
            if at > 0:
                yield (word[at - 1], pair[0]), (word[at - 1], piece)
            if at + 1 < len(word):
                yield (pair[1], word[at + 1]), (piece, word[at + 1])
        at += 1
