"""SentencePiece: ids come from the `sentencepiece` library, `transformers` gets an equivalent `tokenizer.json`.

A folder in the format of `LlamaTokenizer` or `T5Tokenizer` would give other ids from one version of `transformers` to
the next; a `tokenizer.json` of our own means the same in all of them.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as protobuf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from gpt2_flax.errors import ExitCode, UserError, quote
from gpt2_flax.text.fast import FastTokenizer, tokenizer_spec

BLANK = "▁"  # what SentencePiece writes for a blank

_Piece = protobuf.ModelProto.SentencePiece
_Spec = protobuf.TrainerSpec


class SentencePieceTokenizer:
    """The tokenizer of a model given as the bytes of its file; `where` names it in errors.

    See `text.tokenizer.Tokenizer` for the members. Raises `UserError` (DATA) for a file that is not a BPE or unigram
    model, or has no tokens for begin and end of document.
    """

    def __init__(self, model: bytes, where: object):
        try:
            self._proto = protobuf.ModelProto.FromString(model)
            self._processor = SentencePieceProcessor(model_proto=model, num_threads=1)
        except Exception as error:  # protobuf's DecodeError or SentencePiece's RuntimeError
            fix = f"check the file: {quote(str(error))}"
            raise UserError(ExitCode.DATA, "not a SentencePiece model", where, fix) from None
        self._model, processor = model, self._processor
        self.vocab_size: int = processor.get_piece_size()
        self.bos_id, self.eos_id, self.unk_id = processor.bos_id(), processor.eos_id(), processor.unk_id()
        self.pad_id = processor.pad_id() if processor.pad_id() >= 0 else None
        if min(self.bos_id, self.eos_id) < 0:
            fix = "train it with bos_id and eos_id"
            raise UserError(ExitCode.DATA, "model without begin and end of document", where, fix)
        spec = self._proto.trainer_spec
        if spec.model_type not in (_Spec.BPE, _Spec.UNIGRAM) or spec.treat_whitespace_as_suffix:
            fix = "train it as bpe or unigram, with blanks before words"
            raise UserError(ExitCode.DATA, "SentencePiece model of an unknown kind", where, fix)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(b"sentencepiece\n" + self._model).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        # Control pieces are never matched in text, so no special id can come out.
        return [np.array(ids, np.int32) for ids in self._processor.encode(list(texts))]

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


def _backend(proto: protobuf.ModelProto, unk_id: int) -> Tokenizer:
    """Rebuilds a model in the `tokenizers` library."""
    bpe = proto.trainer_spec.model_type == _Spec.BPE
    backend = Tokenizer(_bpe(proto, unk_id) if bpe else _unigram(proto, unk_id))
    if steps := _normalizers(proto.normalizer_spec):
        backend.normalizer = normalizers.Sequence(steps)
    prefix = proto.normalizer_spec.add_dummy_prefix
    scheme = "first" if prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(BLANK, prepend_scheme=scheme, split=False)
    steps = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    special = [piece.piece for piece in proto.pieces if piece.type in (_Piece.CONTROL, _Piece.UNKNOWN)]
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    own = [piece.piece for piece in proto.pieces if piece.type == _Piece.USER_DEFINED]
    backend.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in own])
    return backend


def _bpe(proto: protobuf.ModelProto, unk_id: int) -> models.BPE:
    """SentencePiece merges the pair whose piece scores best; `tokenizers` wants the list of all pairs in that order."""
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
    scores = [(piece.piece, piece.score) for piece in proto.pieces]
    return models.Unigram(scores, unk_id=unk_id, byte_fallback=proto.trainer_spec.byte_fallback)


def _normalizers(spec: protobuf.NormalizerSpec) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    return steps
