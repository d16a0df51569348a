"""SentencePiece tokenizers: the `sentencepiece` library encodes, `transformers` gets an equivalent `tokenizer.json`.

A folder in the format of `LlamaTokenizer` or `T5Tokenizer` gives different ids in different versions of `transformers`;
a `tokenizer.json` gives the same ids in all versions. They are the ids of SentencePiece, with these exceptions. None of
them concerns a model trained here and texts of up to 100,000 tokens.
- `sentencepiece` adds the scores of a unigram model in float32, `tokenizers` in float64. If two segmentations are
  nearly tied, as for a character repeated many times, or late in a long text, the libraries may choose differently.
  With one published model, 1 of 3,501 lines and 9 of 18 texts of 200 lines differ. `exact_scores` avoids this.
- `tokenizers` normalizes a cluster of characters by its beginning alone. After a character that the model replaces,
  such as a full-width letter, it loses combining marks.
- A text that is nothing but a user-defined piece lacks the leading blank of a BPE or character model. Pieces marked as
  unused are not treated as by SentencePiece.
As always in `transformers`, `<s>` written in a text is the special token unless `split_special_tokens` is set.
"""

import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from gpt2_flax.errors import ExitCode, UserError, quote
from gpt2_flax.input_files import VOCABULARY_BYTES, read_whole
from gpt2_flax.tokenizers.ragged_ids import RaggedIds
from gpt2_flax.tokenizers.special_tokens import FROM_FILES, Ends, named_tokens
from gpt2_flax.tokenizers.tokenizer_json import JsonTokenizer, tokenizer_spec

BLANK = "▁"  # a blank in a piece
SCORE_STEP = 2.0**-4  # makes float32 sums exact up to 2**20, which texts of 100,000 tokens do not reach

protobuf: Any = sentencepiece_model_pb2  # its classes are made at run time, so types cannot name them
_Piece = protobuf.ModelProto.SentencePiece
_Spec = protobuf.TrainerSpec


class SentencePieceTokenizer:
    """The `tokenizer.Tokenizer` of a SentencePiece model.

    Args:
        model: the content of its file.
        where: the name of the model in errors.
        ends: the pieces that begin and end documents; by default the pieces that the model names. A model without a
            begin piece, such as T5, uses its end piece.

    Raises:
        UserError: DATA if this is not a BPE, unigram or character model, or it has no end piece.
    """

    def __init__(self, model: bytes, where: object, ends: Ends = FROM_FILES):
        self._model, self._where = model, str(where)
        self.proto, processor = _parsed(model, where)
        """The content of the file, a `ModelProto`."""
        own = Ends(*(self.proto.pieces[i].piece if i >= 0 else None for i in (processor.bos_id(), processor.eos_id())))
        eos = ends.eos or own.eos
        if eos is None:
            fix = "train it with eos_id, or name a piece: --eos PIECE"
            raise UserError(ExitCode.DATA, "model without end of document", where, fix)
        bos = ends.bos or own.bos or eos
        self._ends = Ends(bos, eos)
        self._as_trained = self._ends == Ends(own.bos or own.eos, own.eos)
        self.bos_id, self.eos_id = processor.piece_to_id([bos, eos])
        self.vocab_size: int = processor.get_piece_size()
        self.unk_id: int | None = processor.unk_id()
        self.pad_id = processor.pad_id() if processor.pad_id() >= 0 else None
        if not self._as_trained:
            for token in (self.bos_id, self.eos_id):
                self.proto.pieces[token].type = _Piece.CONTROL  # no text is encoded as such a piece
            processor = SentencePieceProcessor(model_proto=self.proto.SerializeToString(), num_threads=1)
        self._processor = processor
        spec = self.proto.trainer_spec
        if spec.model_type not in (_Spec.BPE, _Spec.UNIGRAM, _Spec.CHAR) or spec.treat_whitespace_as_suffix:
            fix = "train it as bpe, unigram or char, with blanks before words"
            raise UserError(ExitCode.DATA, "SentencePiece model of an unknown kind", where, fix)

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePieceTokenizer, (self._model, self._where, self._ends)

    @property
    def fingerprint(self) -> str:
        ends = "" if self._as_trained else f"{self._ends}\n"  # the fingerprints of old datasets do not have it
        return hashlib.sha256(f"sentencepiece\n{ends}".encode() + self._model).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> RaggedIds:
        # SentencePiece never matches control pieces in text, so there is no special id.
        return RaggedIds.from_arrays(self._processor.encode(list(texts), return_type="numpy"), self.vocab_size)

    def decode(self, ids: Iterable[int]) -> str:
        special = {self.bos_id, self.eos_id, self.pad_id, self.unk_id}
        return self._processor.decode([int(token) for token in ids if token not in special])

    def save(self, folder: Path, model_max_length: int | None = None) -> None:
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id, "unk_token": self.unk_id}
        tokens = {name: self.proto.pieces[token].piece for name, token in names.items() if token is not None}
        spec = tokenizer_spec(_backend(self.proto, self._processor.unk_id()))
        JsonTokenizer(spec, tokens).save(folder, model_max_length)
        (folder / "spiece.model").write_bytes(self._model)


def read_sentencepiece(path: Path, ends: Ends = FROM_FILES) -> SentencePieceTokenizer:
    """Return the tokenizer of a `.model`; `named_tokens` gives its begin and end pieces, and its errors."""
    model = read_whole(path, VOCABULARY_BYTES)
    proto, _ = _parsed(model, path)
    ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    named = named_tokens(path, ids, _names(proto, _Piece.CONTROL), ends)
    return SentencePieceTokenizer(model, path, Ends(named.get("bos_token"), named.get("eos_token")))


def exact_scores(model: bytes) -> bytes:
    """Return a unigram model with its scores rounded to multiples of `SCORE_STEP`.

    Sums of such numbers have no rounding errors. Segmentations with equal scores are then exact ties, which
    `sentencepiece` and `tokenizers` break alike, and the ids of a passage do not depend on the text before it. The
    log-likelihood of the segmentations is within two millionths of the best.
    """
    proto = protobuf.ModelProto.FromString(model)
    for piece in proto.pieces:
        piece.score = round(piece.score / SCORE_STEP) * SCORE_STEP
    return proto.SerializeToString()


def _parsed(model: bytes, where: object) -> tuple[Any, SentencePieceProcessor]:
    try:
        proto = protobuf.ModelProto.FromString(model)
        if not proto.pieces or not all(math.isfinite(piece.score) for piece in proto.pieces):
            raise ValueError("it has no pieces" if not proto.pieces else "a score is not a finite number")
        return proto, SentencePieceProcessor(model_proto=model, num_threads=1)
    except Exception as error:  # protobuf's DecodeError or SentencePiece's RuntimeError
        fix = f"check the file: {quote(str(error))}"
        raise UserError(ExitCode.DATA, "not a SentencePiece model", where, fix) from None


def _backend(proto: Any, unk_id: int) -> Tokenizer:
    """Rebuild a model in the `tokenizers` library."""
    unigram = proto.trainer_spec.model_type == _Spec.UNIGRAM
    backend = Tokenizer(_unigram(proto, unk_id) if unigram else _bpe(proto, unk_id))
    defined = _names(proto, _Piece.USER_DEFINED)
    # A unigram model keeps its user-defined pieces, and prefers them for their scores.
    added = [] if unigram else defined
    backend.normalizer = _normalizer(proto.normalizer_spec, defined, added)
    if unigram:
        backend.pre_tokenizer = pre_tokenizers.Split(_inside_reserved_names(proto), "isolated")
    backend.decoder = _decoder(proto.normalizer_spec)
    reserved = _names(proto, _Piece.CONTROL, _Piece.UNKNOWN)
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in reserved])
    backend.add_tokens([AddedToken(piece, special=False, normalized=True) for piece in added])
    return backend


def _bpe(proto: Any, unk_id: int) -> models.BPE:
    """Return the model with its merges: all pairs of pieces that join to a piece, in the order of its score.

    A character model has no merges.
    """
    pieces = proto.pieces
    ids = {piece.piece: index for index, piece in enumerate(pieces)}
    ranked = [
        (-piece.score, ids[left], ids[right], (left, right))
        for piece in pieces
        if piece.type == _Piece.NORMAL  # "<" and "s>" must not join to "<s>"
        for left, right in ((piece.piece[:cut], piece.piece[cut:]) for cut in range(1, len(piece.piece)))
        if left in ids and right in ids
    ]
    merges = [pair for *_, pair in sorted(ranked)]
    unknown, byte_fallback = pieces[unk_id].piece, proto.trainer_spec.byte_fallback
    return models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback)


def _unigram(proto: Any, unk_id: int) -> models.Unigram:
    # SentencePiece ignores the scores of user-defined pieces in the file.
    scores = [(piece.piece, -0.1 if piece.type == _Piece.USER_DEFINED else piece.score) for piece in proto.pieces]
    return models.Unigram(scores, unk_id=unk_id, byte_fallback=proto.trainer_spec.byte_fallback)


def _normalizer(spec: Any, defined: Sequence[str], added: Sequence[str]) -> normalizers.Normalizer:
    """Return what SentencePiece does with a whole text before it searches for pieces.

    Args:
        spec: the `NormalizerSpec` of the model.
        defined: user-defined pieces, which SentencePiece does not normalize.
        added: the user-defined pieces that `tokenizers` normalizes too, and then searches in the normalized text. They
            must not get the leading blank.
    """
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        if "nfkc" in spec.name:
            # The map also composes letters and accents, but `tokenizers` would lose the second of two accents.
            steps.append(normalizers.NFC())
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    # While the text is normalized, two characters that no text has replace each piece that would change, such as LF.
    plain = normalizers.Sequence(steps)
    changed = sorted((piece for piece in defined if plain.normalize_str(piece) != piece), key=len, reverse=True)
    hidden = {piece: f"\ufdd0{chr(0xE000 + index)}" for index, piece in enumerate(changed)}
    steps = [*(normalizers.Replace(piece, mark) for piece, mark in hidden.items()), *steps]
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
        steps.append(normalizers.Replace(Regex(rf"\A |[ {BLANK}]+\z"), ""))
    if spec.add_dummy_prefix:  # an empty text gets no blank
        alone = "|".join(re.escape(hidden.get(piece, piece)) for piece in added)
        steps.append(normalizers.Replace(Regex(rf"\A(?!(?:{alone})?\z)"), BLANK))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", BLANK))
    steps += [normalizers.Replace(mark, piece) for piece, mark in hidden.items()]
    return normalizers.Sequence(steps)


def _decoder(spec: Any) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.remove_extra_whitespaces:
        steps.append(decoders.Strip(" ", 2**20, 0))  # all leading blanks
    elif spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _inside_reserved_names(proto: Any) -> Regex:
    """Return a pattern that matches one place inside each name such as `<s>` or `<0x0A>`, where the text is split.

    Otherwise the unigram model of `tokenizers` would match the piece of that name, which SentencePiece never does.
    Splitting changes nothing else at a place that no piece of text spans, and that is beside a known character, since
    adjacent unknown characters are one token. If there is no such place, it is after the first character.
    """
    pieces = _names(proto, _Piece.NORMAL, _Piece.USER_DEFINED)
    known, joined = set(pieces), "\0".join(pieces)

    def inside(start: str, rest: str = "") -> str:
        pairs = enumerate(itertools.pairwise(start), start=1)
        at = next((at for at, (one, two) in pairs if one + two not in joined and not known.isdisjoint((one, two))), 1)
        return f"(?<={re.escape(start[:at])})(?={re.escape(start[at:])}{rest})"

    names = _names(proto, _Piece.CONTROL, _Piece.UNKNOWN)
    places = [inside(name) for name in names if len(name) > 1]
    if proto.trainer_spec.byte_fallback:
        places.append(inside("<0x", "[0-9A-F]{2}>"))
    return Regex("|".join(places))


def _names(proto: Any, *types: int) -> list[str]:
    """Return the pieces of the given types, in the order of their ids."""
    return [piece.piece for piece in proto.pieces if piece.type in types]
