"""Train tokenizers on a sample of the documents of a corpus.

The sample has a bounded size, so that training takes the same time and memory for any corpus. It is chosen by the
hashes of the documents, so that the same text gives the same vocabulary.
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
RESERVED = 4 + 256  # special pieces and bytes in a SentencePiece vocabulary
TRAINING_BYTES = 50_000_000
MEASURING_BYTES = 1_000_000

Word = list[str]  # its pieces
Pair = tuple[str, str]


class TrainingSample(NamedTuple):
    """Documents, or slices of long documents, in the order of their hashes."""

    training: list[str]
    held: list[str]
    """Documents for measuring; `training` has them too only if it holds the whole corpus."""


class Coverage(NamedTuple):
    """How well a vocabulary suits a text."""

    characters_per_token: float
    unknown_rate: float
    """Share of the tokens that are unknown."""


def sample_documents(
    units: Sequence[Unit], report: Report, training_bytes: int = TRAINING_BYTES, held_bytes: int = MEASURING_BYTES
) -> TrainingSample:
    """Read a corpus once and return the documents with the smallest hashes, as many as fit in both sizes.

    The documents with the smallest hashes of all are held. If the whole corpus fits, all of it is for training. The
    sample depends only on the documents, not on their order or units; equal documents stay together. The memory used is
    the sample in UTF-8 and one batch of the corpus.

    Args:
        report: called with each fault in the corpus.
        training_bytes: size of the sample for training, in UTF-8.
        held_bytes: size of the sample for measuring, in UTF-8.

    Raises:
        UserError: as `Unit.batches`.
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
    return TrainingSample(_texts(training), _texts(documents[:boundary]))


def measure(tokenizer: Tokenizer, documents: Sequence[str]) -> Coverage:
    """Encode `documents` and count tokens and characters; line ends and blanks are characters too."""
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
    """Train a SentencePiece tokenizer that decodes to the original text: no normalization, rare characters as bytes.

    Args:
        vocab_size: number of tokens. A `char` model has fewer if there are fewer characters; otherwise it takes the
            most frequent characters.
        character_coverage: share of the characters of the text that get pieces.

    Raises:
        UserError: DATA if the text is empty, or does not suit `vocab_size`.
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
            max_sentence_length=2**30,  # in bytes; SentencePiece silently drops longer lines
            num_threads=16,  # the sums in unigram training depend on this number, and with them the pieces
            minloglevel=2,
        )
    except RuntimeError as error:
        if failures:  # SentencePiece wraps what the iterator raises
            raise failures[0] from None
        raise _sentencepiece_error(str(error), vocab_size) from None
    trained = exact_scores(model.getvalue()) if model_type == "unigram" else model.getvalue()
    return SentencePieceTokenizer(trained, WHERE)


def train_wordpiece(
    documents: Iterable[str], vocab_size: int, lowercase: bool = True, merges: bool = True
) -> WordPieceTokenizer:
    """Train a BERT tokenizer: special tokens, then characters, then pieces of words found by byte-pair merging.

    Characters that occur at least twice come first, by frequency. The trainer of the `tokenizers` library is not used:
    its vocabulary differs from run to run, even on one thread, and can exceed the given size.

    Args:
        vocab_size: most tokens in the vocabulary.
        merges: whether there are pieces of several characters.

    Raises:
        UserError: DATA if the text is empty, or `vocab_size` leaves no room for a character.
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
    """Keeps the documents with the smallest hashes, as many as fit in `limit` bytes of UTF-8, added in any order."""

    def __init__(self, limit: int):
        self._limit, self._size = limit, 0
        self._heap: list[tuple[int, bytes]] = []  # documents, with negative hashes to have the largest hash first
        self._end = 2**64  # documents with this hash or a larger one do not fit

    @property
    def complete(self) -> bool:
        """Whether no document that was added has been dropped."""
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
            self._end = -negative  # for good, since later documents only leave less room
            self._size -= len(encoded)

    def documents(self) -> list[tuple[int, bytes]]:
        """Return hashes and documents, in the order of the hashes."""
        return sorted((-negative, encoded) for negative, encoded in self._heap)


def _boundary(documents: Sequence[tuple[int, bytes]], n_bytes: int) -> int:
    """Return the first index after at least `n_bytes` bytes that does not separate equal documents."""
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
    """Count the words that WordPiece will encode."""
    normalizer, pre_tokenizer = bert_normalizer(lowercase), pre_tokenizers.BertPreTokenizer()
    spans: Counter[str] = Counter()  # between blanks
    for document in documents:
        spans.update(normalizer.normalize_str(document).split())
    words: Counter[str] = Counter()
    for span, count in spans.items():  # pre-tokenizing is slow, so only once for each distinct span
        for word, _ in pre_tokenizer.pre_tokenize_str(span):
            if len(word) <= LONGEST_WORD:
                words[word] += count
    return words


def _in_characters(counts: Counter[str]) -> list[tuple[Word, int]]:
    """Split words into characters, all but the first with `##`; in alphabetical order.

    Equal pieces are one object, which halves time and memory.
    """
    inner = {character: "##" + character for word in counts for character in word}
    return [([word[0], *map(inner.__getitem__, word[1:])], counts[word]) for word in sorted(counts)]


def _merge(words: Iterable[tuple[Word, int]], room: int, known: set[str]) -> list[str]:
    """Return up to `room` new pieces, by repeatedly joining the pair of neighbours that occurs most often.

    Of pairs that occur equally often, the alphabetically first is joined, so that the result depends on the text alone.
    Words with a character that is not in `known` are ignored, since they are unknown as a whole. Changes `words`.
    """
    split = [(word, count) for word, count in words if len(word) > 1 and known.issuperset(word)]
    pairs: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)  # the words that have or had the pair
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
            continue  # outdated; the heap also has an entry with the right count
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
    """Replace each `pair` in `word` by `piece`, from the left; yield each changed pair of neighbours, old and new."""
    at = 0
    while at < len(word) - 1:
        if (word[at], word[at + 1]) == pair:
            word[at : at + 2] = [piece]
            if at > 0:
                yield (word[at - 1], pair[0]), (word[at - 1], piece)
            if at + 1 < len(word):
                yield (pair[1], word[at + 1]), (piece, word[at + 1])
        at += 1
