"""Token files of other programs, written from the definitions of their formats, and their import."""

import itertools
import struct
from unittest import mock

import numpy as np
import pytest

from gpt2_flax.data.dataset import TokenDataset
from gpt2_flax.data.import_tokens import import_tokens
from gpt2_flax.errors import ExitCode, UserError

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}
BOS, EOS, UNKNOWN = 0, 1, 2


class Letters:
    """A tokenizer with one character for each id."""

    pad_id = None

    def __init__(self, vocab_size: int, bos_id: int = BOS, eos_id: int = EOS, unk_id: int | None = UNKNOWN):
        self.vocab_size, self.bos_id, self.eos_id, self.unk_id = vocab_size, bos_id, eos_id, unk_id
        self.fingerprint = "letters"

    def encode_batch(self, texts):
        raise NotImplementedError

    def decode(self, ids) -> str:
        return "".join(
            "x" if token != self.unk_id else "<unk>" for token in ids if token not in (self.bos_id, self.eos_id)
        )

    def save(self, folder, model_max_length=None) -> None:
        (folder / "letters").write_text(str(self.vocab_size))


def write_megatron(
    stem, documents: list[list[list[int]]], dtype: str = "uint16", head: str = "<", order: str = "<"
) -> str:
    """Write documents, lists of sequences of ids; `head` and `order` are the byte orders of the head and the arrays."""
    sequences = [sequence for document in documents for sequence in document]
    size = np.dtype(dtype).itemsize
    lengths = list(map(len, sequences))
    pointers = [size * start for start in itertools.accumulate(lengths, initial=0)][:-1]
    firsts = list(itertools.accumulate(map(len, documents), initial=0))
    with open(f"{stem}.bin", "wb") as file:
        for sequence in sequences:
            file.write(np.array(sequence, np.dtype(dtype).newbyteorder(order)).tobytes())
    with open(f"{stem}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00")
        file.write(struct.pack(f"{head}QB", 1, CODES[dtype]))
        file.write(struct.pack(f"{head}QQ", len(sequences), len(firsts)))
        file.write(struct.pack(f"{order}{len(lengths)}i", *lengths))
        file.write(struct.pack(f"{order}{len(pointers)}q", *pointers))
        file.write(struct.pack(f"{order}{len(firsts)}q", *firsts))
    return str(stem)


def write_llm_c(path, ids: list[int], magic: int = 20240520, version: int = 1, order: str = "<") -> str:
    code = {20240520: "H", 20240801: "I"}.get(magic, "H")
    header = struct.pack(f"{order}3i", magic, version, len(ids)).ljust(1024, b"\0")
    path.write_bytes(header + struct.pack(f"{order}{len(ids)}{code}", *ids))
    return str(path)


def write_ids(path, ids: list[int], dtype: str = "<u2") -> str:
    np.array(ids, dtype).tofile(path)
    return str(path)


def flatten(documents):
    return list(itertools.chain.from_iterable(documents))


def contents(split) -> list[list[int]]:
    return [ids.tolist() for ids in split.documents()]


def imported(tmp_path, train, validation, tokenizer=None, **options) -> TokenDataset:
    with mock.patch("os.fsync"):  # hundreds of datasets of a few bytes need not survive a power failure
        import_tokens(train, validation, tokenizer or Letters(100), tmp_path / "dataset", **options)
    dataset = TokenDataset(tmp_path / "dataset")
    dataset.verify()
    return dataset


def refused(tmp_path, train, validation=(), tokenizer=None, code=ExitCode.DATA, **options) -> UserError:
    with pytest.raises(UserError) as error:
        import_tokens(train, validation, tokenizer or Letters(100), tmp_path / "dataset", **options)
    assert error.value.exit_code == code
    assert "\n" not in str(error.value)
    assert not (tmp_path / "dataset").exists()
    return error.value
