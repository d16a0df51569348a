"""Vocabularies from one's own text.

Training reads a sample of the documents, chosen by their hash, so that it takes the same time for any corpus and gives
the same vocabulary for the same text.
"""

import hashlib
import heapq
import io
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from sentencepiece import SentencePieceTrainer
from tokenizers import pre_tokenizers

from gpt2_flax.errors import ExitCode, UserError, quote
from gpt2_flax.progress import progress_bar
from gpt2_flax.text.corpus import Unit
from gpt2_flax.text.spm import SentencePieceTokenizer
from gpt2_flax.text.tokenizer import Tokenizer
from gpt2_flax.text.wordpiece import LONGEST_WORD, MASK, SPECIAL_TOKENS, WordPieceTokenizer, bert_normalizer

WHERE = "tokenizer training"
TRAINING_BYTES = 50_000_000
MEASURING_BYTES = 1_000_000

Word = tuple[str, ...]  # as pieces


@dataclass(frozen=True)
class Coverage:
    """How well a vocabulary fits a text."""

    characters_per_token: float
    unknown_rate: float
    """Share of tokens that are the unknown one."""


def sample_documents(units: Sequence[Unit], limit_bytes: int) -> Iterator[str]:
    """Yields about `limit_bytes` of documents spread over all units; all of them when there is less."""
    total = sum(unit.size for unit in units)
    limit = 2**64 * limit_bytes // max(total, 1)
    with progress_bar("reading", total, "B") as advance:
        for unit in units:
            for document in unit.documents():
                digest = hashlib.blake2b(document.encode("utf-8"), digest_size=8, person=b"vocabulary").digest()
                if int.from_bytes(digest, "little") < limit:
                    yield document
            advance(unit.size)


def measure(tokenizer: Tokenizer, documents: Iterable[str]) -> Coverage:
    """Encodes `documents`, which must not be empty, and counts; line ends and blanks are characters too."""
    texts = list(documents)
    ids = tokenizer.encode_batch(texts)
    tokens = max(1, sum(map(len, ids)))
    unknown = 0 if tokenizer.unk_id is None else sum(int((row == tokenizer.unk_id).sum()) for row in ids)
    return Coverage(sum(map(len, texts)) / tokens, unknown / tokens)


def train_sentencepiece(
    documents: Iterable[str],
    vocab_size: int,
    model_type: Literal["bpe", "unigram"] = "bpe",
    character_coverage: float = 0.9995,
) -> SentencePieceTokenizer:
    """Returns a SentencePiece tokenizer that keeps every text as it is: no normalization, rare characters as bytes.

    Raises `UserError` (DATA) when the text is empty, or does not suit `vocab_size`.
    """
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
    return SentencePieceTokenizer(model.getvalue(), WHERE)


def train_wordpiece(documents: Iterable[str], vocab_size: int, lowercase: bool = True) -> WordPieceTokenizer:
    """Returns a BERT tokenizer with at most `vocab_size` tokens: the special ones, then characters, then longer pieces.

    Characters that occur twice or more are taken first, the most frequent first; what room is left goes to pieces of
    words found by byte-pair merging. The `tokenizers` library has a trainer too, but it gives another vocabulary each
    time and more tokens than asked for. Raises `UserError` (DATA) for an empty text, or no room for any.
    """
    words = _count_words(documents, lowercase)
    if not words:
        raise _no_text()
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for piece in word:
            characters[piece] += count
    tokens = [*dict.fromkeys(SPECIAL_TOKENS.values()), MASK]
    room = vocab_size - len(tokens)
    if room < 1:
        fix = f"take more than {len(tokens)}, the number of special tokens"
        raise UserError(ExitCode.DATA, "vocabulary too small for its characters", f"--vocab-size {vocab_size}", fix)
    frequent = sorted((piece for piece, count in characters.items() if count > 1), key=lambda p: (-characters[p], p))
    tokens += frequent[:room]
    tokens += _merge(words, vocab_size - len(tokens), known=set(tokens))
    return WordPieceTokenizer("".join(token + "\n" for token in tokens).encode("utf-8"), WHERE, lowercase)


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


def _count_words(documents: Iterable[str], lowercase: bool) -> dict[Word, int]:
    """Counts the words that WordPiece will see, as tuples of single characters with `##` before all but the first."""
    normalizer, pre_tokenizer = bert_normalizer(lowercase), pre_tokenizers.BertPreTokenizer()
    chunks: Counter[str] = Counter()
    for document in documents:
        chunks.update(normalizer.normalize_str(document).split())
    words: Counter[Word] = Counter()
    for chunk, count in chunks.items():  # the slow part once for each distinct chunk
        for word, _ in pre_tokenizer.pre_tokenize_str(chunk):
            if len(word) <= LONGEST_WORD:
                words[word[0], *("##" + character for character in word[1:])] += count
    return words


def _merge(words: dict[Word, int], room: int, known: set[str]) -> list[str]:
    """Returns up to `room` new pieces: again and again, the two neighbours that occur most often become one.

    Words with a character that is not in `known` are left out: they are unknown as a whole. Equal counts are decided by
    the alphabet, so the result depends on the text alone.
    """
    split = sorted((word, count) for word, count in words.items() if len(word) > 1 and known.issuperset(word))
    pieces_of, counts = [word for word, _ in split], [count for _, count in split]
    pairs: Counter[tuple[str, str]] = Counter()
    places: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for place, word in enumerate(pieces_of):
        for pair in itertools.pairwise(word):
            pairs[pair] += counts[place]
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
        changed = set()
        for place in places.pop(pair):
            old = pieces_of[place]
            new = pieces_of[place] = _join(old, pair, piece)
            for word, sign in ((old, -1), (new, 1)):
                for neighbours in itertools.pairwise(word):
                    pairs[neighbours] += sign * counts[place]
                    changed.add(neighbours)
                    if sign > 0:
                        places[neighbours].add(place)
        for neighbours in changed:
            heapq.heappush(heap, (-pairs[neighbours], neighbours))
    return list(merged)


def _join(word: Word, pair: tuple[str, str], piece: str) -> Word:
    """Replaces every occurrence of `pair` in `word` by `piece`, from the left."""
    joined: list[str] = []
    index = 0
    while index < len(word):
        found = word[index : index + 2] == pair
        joined.append(piece if found else word[index])
        index += 2 if found else 1
    return tuple(joined)
