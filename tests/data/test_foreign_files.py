"""Damaged files of Megatron-LM."""

import os
import struct
from pathlib import Path
from unittest import mock

import pytest
from support.foreign_files import contents, imported, refused, write_megatron

from gpt2_flax.data import foreign_files
from gpt2_flax.errors import ExitCode, UserError


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_floating_point_numbers_are_refused(tmp_path, kind):
    name = write_megatron(tmp_path / "floats", [[[1, 2]]], kind)
    assert "floating-point" in str(refused(tmp_path, [name], [name]))


def put(place: int, code: str, *values: int):
    return lambda data: data[:place] + struct.pack(code, *values) + data[place + struct.calcsize(code) :]


def cut(place: int):
    return lambda data: data[:place]


def mutations():
    """Yield a name, a change of an index of 3 sequences and 2 documents, and a fragment of the error message."""
    yield "magic", put(0, "<B", 7), "not a Megatron-LM index"
    yield "version", put(9, "<Q", 2), "version 2"
    for code in (0, 9, 255):
        yield f"code {code}", put(17, "<B", code), "unknown type"
    yield "another type", put(17, "<B", 4), "sequence 1 does not follow"
    for count in (0, 2, 4, 2**31, 2**63):
        yield f"{count} sequences", put(18, "<Q", count), "bytes where its head says"
        yield f"{count} documents", put(26, "<Q", count), "bytes where its head says"
    yield "negative length", put(34, "<i", -1), "does not follow"
    yield "a length backwards", put(34, "<3i3q", 3, -1, 3, 0, 6, 4), "sequence 1 does not follow"
    yield "longer sequence", put(34, "<i", 9), "does not follow"
    yield "longer end", put(42, "<i", 9), "bytes where its index says"
    yield "pointer", put(46, "<q", 2), "sequence 0 does not follow"
    yield "far pointer", put(62, "<q", 2**62), "sequence 2 does not follow"
    yield "first document", put(70, "<q", 1), "documents do not ascend"
    yield "order of documents", put(78, "<q", -5), "documents do not ascend"
    yield "last document", put(86, "<q", 4), "documents do not ascend"
    for place in (0, 5, 20, 33, 34, 50, 93):
        yield f"cut at {place}", cut(place), "index"
    yield "longer", lambda data: data + b"\0", "index has 95 bytes"
    yield "modes", lambda data: data + bytes(3), "index has 97 bytes"


@pytest.mark.parametrize(
    ("change", "message"), [case[1:] for case in mutations()], ids=[case[0] for case in mutations()]
)
def test_a_damaged_index_is_refused(tmp_path, change, message):
    name = write_megatron(tmp_path / "text", [[[5, 6], [7]], [[8, 9]]])
    index = tmp_path / "text.idx"
    whole = index.read_bytes()
    assert len(whole) == 94
    index.write_bytes(change(whole))
    for chunk in (1, 2, 2**20):
        with mock.patch.object(foreign_files, "CHUNK", chunk):
            assert message in str(refused(tmp_path, [name], validation_fraction=0.5))
    index.write_bytes(whole)
    assert contents(imported(tmp_path, [name], [], validation_fraction=0.5).validation) == [[8, 9]]


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data[:-2], lambda data: data + b"ab"])
def test_a_bin_that_is_not_that_of_its_index_is_refused(tmp_path, change):
    name = write_megatron(tmp_path / "text", [[[5, 6], [7]], [[8, 9]]])
    path = tmp_path / "text.bin"
    path.write_bytes(change(path.read_bytes()))
    error = refused(tmp_path, [name])
    assert "where its index says 10" in str(error)
    assert error.where == str(path)


def test_an_index_without_sequences_or_documents_is_refused(tmp_path):
    name = write_megatron(tmp_path / "none", [])
    assert "without documents" in str(refused(tmp_path, [name]))
    name = write_megatron(tmp_path / "empty", [[[]]])
    assert "without tokens" in str(refused(tmp_path, [name]))


def test_an_index_that_is_cut_while_it_is_read_gives_a_sentence(tmp_path):
    name = write_megatron(tmp_path / "tokens", [[[1, 2], [3]], [[4, 5, 6]]], "uint16")
    index_path = Path(f"{name.removesuffix('.bin').removesuffix('.idx')}.idx")
    index = foreign_files.MegatronIndex(index_path, index_path.with_suffix(".bin"))
    assert index.starts(0, 6).tolist() == [0, 3]
    os.truncate(index_path, 60)
    with pytest.raises(UserError, match="file became shorter while it was in use") as error:
        index.starts(0, 6)
    assert (error.value.exit_code, error.value.where) == (ExitCode.DATA, str(index_path))
