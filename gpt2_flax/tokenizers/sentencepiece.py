"""SentencePiece: ids come from the `sentencepiece` library, `transformers` gets an equivalent `tokenizer.json`.

A folder in the format of `LlamaTokenizer` or `T5Tokenizer` would give other ids from one version of `transformers` to
the next; a `tokenizer.json` of our own means the same in all of them. Its ids are those of SentencePiece, but for
these cases, of which none concerns a model trained here and texts of up to 100,000 tokens:
- `sentencepiece` adds the scores of a unigram up in float32, `tokenizers` in float64. Where two segmentations are as
  good as equal, such as those of a character repeated many times, or late in a long text, they may choose differently:
  1 of 3,501 lines and 9 of 18 texts of 200 lines with one published model. `exact_scores` is our way out.
- `tokenizers` normalizes clusters of characters by their beginning alone: combining marks are lost behind a character
  that the map of the model replaces, such as a full-width letter.
- A text that is a user-defined piece and nothing else lacks the leading blank of a BPE or character model; pieces
  marked as unused are not treated as SentencePiece does.
As everywhere in `transformers`, `<s>` written in a text is the special token unless `split_special_tokens` is set.
"""

import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as protobuf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from gpt2_flax.errors import ExitCode, UserError, quote
from gpt2_flax.input_files import VOCABULARY_BYTES, read_whole
from gpt2_flax.tokenizers.ragged_ids import Encoded
from gpt2_flax.tokenizers.special_tokens import FROM_FILES, Ends, named_tokens
from gpt2_flax.tokenizers.tokenizer_json import FastTokenizer, tokenizer_spec

BLANK = "▁"  # what SentencePiece writes for a blank
SCORE_STEP = 2.0**-4  # then float32 sums are exact up to 2**20: texts of more than 100,000 tokens

_Piece = protobuf.ModelProto.SentencePiece
_Spec = protobuf.TrainerSpec


class SentencePieceTokenizer:
    """The tokenizer of a model given as the bytes of its file; `where` names it in errors.

    See `text.tokenizer.Tokenizer` for the members. A model without a token for the begin of a document, as T5 has it,
    uses the one for the end. `ends` may name other pieces for both. Raises `UserError` (DATA) for a file that is not a
    BPE, unigram or character model, or has no token for the end of a document.
    """

    def __init__(self, model: bytes, where: object, ends: Ends = FROM_FILES):
        self._model, self._where = model, str(where)
        self._proto, processor = _parsed(model, where)
        own = Ends(*(self._proto.pieces[i].piece if i >= 0 else None for i in (processor.bos_id(), processor.eos_id())))
        eos = ends.eos or own.eos
        if eos is None:
            fix = "train it with eos_id, or name a piece: --eos PIECE"
            raise UserError(ExitCode.DATA, "model without end of document", where, fix)
        self._ends = Ends(ends.bos or own.bos or eos, eos)
        self._as_trained = self._ends == Ends(own.bos or own.eos, own.eos)
        self.bos_id, self.eos_id = map(processor.piece_to_id, self._ends)
        self.vocab_size: int = processor.get_piece_size()
        self.unk_id = processor.unk_id()
        self.pad_id = processor.pad_id() if processor.pad_id() >= 0 else None
        if not self._as_trained:
            for token in (self.bos_id, self.eos_id):
                self._proto.pieces[token].type = _Piece.CONTROL  # so that no text becomes it
            processor = SentencePieceProcessor(model_proto=self._proto.SerializeToString(), num_threads=1)
        self._processor = processor
        spec = self._proto.trainer_spec
        if spec.model_type not in (_Spec.BPE, _Spec.UNIGRAM, _Spec.CHAR) or spec.treat_whitespace_as_suffix:
            fix = "train it as bpe, unigram or char, with blanks before words"
            raise UserError(ExitCode.DATA, "SentencePiece model of an unknown kind", where, fix)

    def __reduce__(self) -> tuple[type, tuple[bytes, str, Ends]]:
        return SentencePieceTokenizer, (self._model, self._where, self._ends)

    @property
    def fingerprint(self) -> str:
        ends = "" if self._as_trained else f"{self._ends}\n"  # not in the fingerprints of old datasets
        return hashlib.sha256(f"sentencepiece\n{ends}".encode() + self._model).hexdigest()

    @property
    def proto(self) -> protobuf.ModelProto:
        """What the file holds."""
        return self._proto

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        # Control pieces are never matched in text, so no special id can come out.
        return Encoded.from_arrays(self._processor.encode(list(texts), return_type="numpy"), self.vocab_size)

    def decode(self, ids: Iterable[int]) -> str:
        special = {self.bos_id, self.eos_id, self.pad_id, self.unk_id}
        return self._processor.decode([int(token) for token in ids if token not in special])

    def save(self, folder: Path, model_max_length: int | None = None) -> None:
        self._exported().save(folder, model_max_length)
        (folder / "spiece.model").write_bytes(self._model)

    def _exported(self) -> FastTokenizer:
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id, "unk_token": self.unk_id}
        tokens = {name: self._proto.pieces[token].piece for name, token in names.items() if token is not None}
        return FastTokenizer(tokenizer_spec(_backend(self._proto, self.unk_id)), tokens)


def read_sentencepiece(path: Path, ends: Ends = FROM_FILES) -> SentencePieceTokenizer:
    """Return the tokenizer of a `.model`, begin and end by `named_tokens`. Raises `UserError` as that."""
    model = read_whole(path, VOCABULARY_BYTES)
    proto, _ = _parsed(model, path)
    ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    named = named_tokens(path, ids, _names(proto, _Piece.CONTROL), ends)
    return SentencePieceTokenizer(model, path, Ends(named.get("bos_token"), named.get("eos_token")))


def exact_scores(model: bytes) -> bytes:
    """Returns a unigram model with its scores rounded to multiples of `SCORE_STEP`.

    Sums of such numbers have no rounding errors: segmentations of the same score are then really tied, and ties are
    broken alike in `sentencepiece` and `tokenizers`. It also makes the ids of a passage independent of what stands
    before it. The log-likelihood of the segmentations found was within two millionths of the best.
    """
    proto = protobuf.ModelProto.FromString(model)
    for piece in proto.pieces:
        piece.score = round(piece.score / SCORE_STEP) * SCORE_STEP
    return proto.SerializeToString()


def _parsed(model: bytes, where: object) -> tuple[protobuf.ModelProto, SentencePieceProcessor]:
    try:
        proto = protobuf.ModelProto.FromString(model)
        if not proto.pieces or not all(math.isfinite(piece.score) for piece in proto.pieces):
            raise ValueError("it has no pieces" if not proto.pieces else "a score is not a finite number")
        return proto, SentencePieceProcessor(model_proto=model, num_threads=1)
    except Exception as error:  # protobuf's DecodeError or SentencePiece's RuntimeError
        fix = f"check the file: {quote(str(error))}"
        raise UserError(ExitCode.DATA, "not a SentencePiece model", where, fix) from None


def _backend(proto: protobuf.ModelProto, unk_id: int) -> Tokenizer:
    """Rebuilds a model in the `tokenizers` library."""
    unigram = proto.trainer_spec.model_type == _Spec.UNIGRAM
    backend = Tokenizer(_unigram(proto, unk_id) if unigram else _bpe(proto, unk_id))
    defined = _names(proto, _Piece.USER_DEFINED)
    # The user-defined pieces of a unigram stay in the model, which prefers them for their scores.
    own = [] if unigram else defined
    backend.normalizer = _normalizer(proto.normalizer_spec, defined, own)
    if unigram:
        backend.pre_tokenizer = pre_tokenizers.Split(_inside_reserved_names(proto), "isolated")
    backend.decoder = _decoder(proto.normalizer_spec)
    reserved = _names(proto, _Piece.CONTROL, _Piece.UNKNOWN)
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in reserved])
    backend.add_tokens([AddedToken(piece, special=False, normalized=True) for piece in own])
    return backend


def _bpe(proto: protobuf.ModelProto, unk_id: int) -> models.BPE:
    """SentencePiece merges the pair whose piece scores best; `tokenizers` wants the list of all pairs in that order.

    A character model has none.
    """
    pieces = proto.pieces
    ids = {piece.piece: index for index, piece in enumerate(pieces)}
    ranked = [
        (-piece.score, ids[left], ids[right], (left, right))
        for piece in pieces
        if piece.type == _Piece.NORMAL  # "<s>" must not be made from "<" and "s>"
        for left, right in ((piece.piece[:cut], piece.piece[cut:]) for cut in range(1, len(piece.piece)))
        if left in ids and right in ids
    ]
    merges = [pair for *_, pair in sorted(ranked)]
    unknown, byte_fallback = pieces[unk_id].piece, proto.trainer_spec.byte_fallback
    return models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback)


def _unigram(proto: protobuf.ModelProto, unk_id: int) -> models.Unigram:
    # SentencePiece does not use the scores that user-defined pieces have in the file.
    scores = [(piece.piece, -0.1 if piece.type == _Piece.USER_DEFINED else piece.score) for piece in proto.pieces]
    return models.Unigram(scores, unk_id=unk_id, byte_fallback=proto.trainer_spec.byte_fallback)


def _normalizer(spec: protobuf.NormalizerSpec, defined: Sequence[str], own: Sequence[str]) -> normalizers.Normalizer:
    """What SentencePiece does with a text, always as a whole, before it looks for pieces.

    `defined` are pieces that SentencePiece leaves as they are. Of these `tokenizers` finds `own` in the normalized
    text, after it has normalized each of them too; they must not get the leading blank.
    """
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        if "nfkc" in spec.name:
            # The map composes letters and accents too, but `tokenizers` would lose the second of two accents.
            steps.append(normalizers.NFC())
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    # A line end that is a piece would become a blank: meanwhile two characters that no text has stand for it.
    plain = normalizers.Sequence(steps)
    changed = sorted((piece for piece in defined if plain.normalize_str(piece) != piece), key=len, reverse=True)
    hidden = {piece: f"\ufdd0{chr(0xE000 + index)}" for index, piece in enumerate(changed)}
    steps = [*(normalizers.Replace(piece, mark) for piece, mark in hidden.items()), *steps]
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
        steps.append(normalizers.Replace(Regex(rf"\A |[ {BLANK}]+\z"), ""))
    if spec.add_dummy_prefix:  # an empty text gets none
        alone = "|".join(re.escape(hidden.get(piece, piece)) for piece in own)
        steps.append(normalizers.Replace(Regex(rf"\A(?!(?:{alone})?\z)"), BLANK))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", BLANK))
    steps += [normalizers.Replace(mark, piece) for piece, mark in hidden.items()]
    return normalizers.Sequence(steps)


def _decoder(spec: protobuf.NormalizerSpec) -> decoders.Decoder:
    steps = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.remove_extra_whitespaces:
        steps.append(decoders.Strip(" ", 2**20, 0))  # all that lead
    elif spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _inside_reserved_names(proto: protobuf.ModelProto) -> Regex:
    """Matches a place inside each name such as `<s>` or `<0x0A>`, for cutting texts there.

    The unigram model of `tokenizers` would take the piece of that name; SentencePiece never does. The place is one that
    no piece of text reaches across, and beside a known character, since unknown ones in a row are one token: so the cut
    changes nothing else. If there is no such place, it is after the first character.
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


def _names(proto: protobuf.ModelProto, *types: int) -> list[str]:
    """The pieces of some types, in the order of their ids."""
    return [piece.piece for piece in proto.pieces if piece.type in types]
