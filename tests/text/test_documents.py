"""Bytes to documents: line ends, encodings, faults, long documents, damaged streams; always in bounded memory."""

import functools
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.corpus_files import PACK, read, read_texts, sizes, slices

from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.text import compression
from gpt2_flax.text.documents import SLICE_CHARACTERS
from gpt2_flax.tokenizers.tokenizer import load_tokenizer

MULTIBYTE = ["utf-8", "gb18030", "gbk", "big5", "cp949", "shift_jis", "euc_jp", "johab"]


def test_each_line_is_a_document_and_blank_ones_are_none(write):
    assert read_texts(write("一\r\n\n \u3000 \n二 \n三".encode())) == ["一", "二 ", "三"]


def test_only_lf_and_crlf_end_a_line(write):
    path = write("a\u2028b\x85c\x0bd\x0ce\rf\r\r\ng\r".encode())
    assert read_texts(path) == ["a\u2028b\x85c\x0bd\x0ce\rf\r", "g\r"]


def test_blank_lines_separate_documents_of_several_lines(write):
    path = write("\n\n一\n二\r\n\n\u3000\n\n三\n四".encode())
    assert read_texts(path, separator="blank-line") == ["一\n二", "三\n四"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
def test_a_byte_order_mark_at_the_start_is_not_text(write, encoding):
    content = "\ufeff一\n\ufeff二".encode(encoding.removesuffix("-sig"))
    assert read_texts(write(content), encoding=encoding, unit_bytes=1) == ["一", "\ufeff二"]


@pytest.mark.parametrize("encoding", MULTIBYTE)
def test_documents_in_other_encodings(write, encoding):
    text = "中文\n" * 1000 + "丁 a\r\n"
    with sizes(block=7):
        assert read_texts(write(text.encode(encoding)), encoding=encoding) == ["中文"] * 1000 + ["丁 a"]


@pytest.mark.parametrize("encoding", ["utf-7", "rot13", "cp500", "hz", "iso2022_jp", "idna"])
def test_encodings_without_plain_lines_are_refused(write, encoding):
    with pytest.raises(UserError, match="iconv") as error:
        read(write(b"text"), encoding=encoding)
    assert error.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize("encoding", ["no-such", "", "\0"])
def test_unknown_encodings_are_refused(write, encoding):
    with pytest.raises(UserError, match="unknown text encoding") as error:
        read(write(b"text"), encoding=encoding)
    assert error.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize("unit_bytes", [8, 10**6])
def test_bytes_that_are_not_utf8_are_reported_with_file_line_and_byte(write, unit_bytes):
    path = write("一\n二\r\n".encode() * 10 + "三a".encode() + b"\xff\n" + "四\n".encode())
    with pytest.raises(UserError) as error:
        read(path, unit_bytes=unit_bytes)
    assert error.value.exit_code == ExitCode.DATA
    assert error.value.where == f"{path}:21"
    assert error.value.what == "not UTF-8 (byte 5 of the line is 0xFF)"
    assert "--encoding" in error.value.fix
    assert "--on-error skip or replace" in error.value.fix

    texts, problems = read(path, unit_bytes=unit_bytes, on_error="skip")
    assert texts == ["一", "二"] * 10 + ["四"]
    assert problems == [(str(path), 21, "not UTF-8 (byte 5 of the line is 0xFF)", True)]

    texts, problems = read(path, unit_bytes=unit_bytes, on_error="replace")
    assert texts == ["一", "二"] * 10 + ["三a\ufffd", "四"]
    assert problems == [(str(path), 21, "not UTF-8 (byte 5 of the line is 0xFF)", False)]


@pytest.mark.parametrize("content", [b"\xed\xa0\x80\n", b"\xc0\x80\n", b"\xe4\xb8\n", b"\xff\xffa\x00", b"\xe4\xb8"])
def test_surrogates_overlong_forms_and_cut_characters_are_refused(write, content):
    with pytest.raises(UserError, match=r"not UTF-8 .*a\.txt:1; "):
        read(write(content))


def test_a_paragraph_with_a_fault_is_left_out_as_a_whole(write):
    path = write(b"1\n\n2\n\xff\n\xfe\n2\n\n3\n\xff")
    with sizes(block=3):
        texts, problems = read(path, separator="blank-line", on_error="skip")
    assert texts == ["1"]
    assert [problem.line for problem in problems] == [4, 9]


TOKENS = ["a", "b ", " ", "\u3000", "\n", "\n", "\r\n", "\r", "\n\n", "中", "。", "文字文字", "\u2028", "\ufeff"]
BROKEN = [b"\xff", b"\x81", b"\xe4\xb8", b"\xf0\x9f"]


@st.composite
def contents(draw, encoding: str) -> bytes:
    tokens = [token.encode(encoding, "ignore") for token in TOKENS]
    faults = BROKEN if draw(st.booleans()) else []
    return b"".join(draw(st.lists(st.sampled_from(tokens + faults), max_size=60)))


def expected(content: bytes, encoding: str, separator: str, on_error: str) -> list[str]:
    """The documents, found the plain way."""
    found: list[str | None] = []  # lines; None is one that cannot be decoded
    for index, line in enumerate(content.split(b"\n")):
        try:
            text = line.decode(encoding, "replace" if on_error == "replace" else "strict")
        except UnicodeDecodeError:
            found.append(None)
            continue
        text = text.removeprefix("\ufeff") if index == 0 else text
        found.append(text.removesuffix("\r") if index < content.count(b"\n") else text)
    if separator == "line":
        return [line for line in found if line and line.strip()]
    if separator == "file":
        filled = [index for index, line in enumerate(found) if line is None or line.strip()]
        lines = found[filled[0] : filled[-1] + 1] if filled else []
        return ["\n".join(lines)] if lines and None not in lines else []
    paragraphs: list[list[str | None]] = [[]]
    for line in found:
        paragraphs[-1].append(line)
        if line is not None and not line.strip():
            paragraphs[-1].pop()
            paragraphs.append([])
    return ["\n".join(lines) for lines in paragraphs if lines and None not in lines]


@pytest.mark.slow
@settings(max_examples=400)
@given(
    data=st.data(),
    encoding=st.sampled_from(MULTIBYTE),
    separator=st.sampled_from(["line", "blank-line", "file"]),
    on_error=st.sampled_from(["skip", "replace"]),
    suffix=st.sampled_from(["", "", "", *PACK]),
)
def test_documents_do_not_depend_on_how_a_file_is_read(tmp_path_factory, data, encoding, separator, on_error, suffix):
    content = data.draw(contents(encoding))
    path = tmp_path_factory.mktemp("corpus") / f"a.txt{suffix}"
    path.write_bytes(PACK[suffix](content) if suffix else content or b"\n")
    options = {"encoding": encoding, "separator": separator, "on_error": on_error}
    whole, problems = read(path, **options)
    assert whole == expected(content, encoding, separator, on_error)
    assert len({problem.line for problem in problems}) == len(problems)
    in_slice = data.draw(st.integers(1, 30))
    with sizes(in_slice=in_slice):
        whole, problems = read(path, **options)
    with sizes(data.draw(st.integers(1, 30)), in_slice):
        again = read(path, unit_bytes=data.draw(st.integers(1, 40)), **options)
    assert again == (whole, problems)


def test_a_whole_file_is_a_document_without_the_blank_lines_at_its_ends(write, tmp_path):
    write("\n \n\u3000一\r\n\n \n二 \n\n\u3000\n".encode(), "a.txt")
    write(b" \n\n", "b.txt")
    write("三\n\n四".encode(), "c.txt")
    assert read_texts(tmp_path, separator="file", unit_bytes=4) == ["\u3000一\n\n \n二 ", "三\n\n四"]


def test_a_fault_leaves_out_the_whole_file(write, tmp_path):
    write(b"1\n\n2\n\xff\n3", "a.txt")
    write(b"4\n5", "b.txt")
    texts, problems = read(tmp_path, separator="file", on_error="skip")
    assert texts == ["4\n5"]
    assert [problem.line for problem in problems] == [4]


@pytest.mark.parametrize("separator", ["line", "blank-line", "file"])
@pytest.mark.parametrize("cut", range(8))
def test_a_fault_in_a_later_slice_ends_a_long_document(write, separator, cut):
    path = write(b"before\n\n" + b"x" * 20 + b"y" * cut + b"\xff" + b"z" * 20 + b"\n\nafter")
    with sizes(block=4, in_slice=8):
        texts, problems = read(path, separator=separator, on_error="skip")
    long = "x" * 20 + "y" * cut
    assert texts == ([f"before\n\n{long}"] if separator == "file" else ["before", long, "after"])
    reason = f"not UTF-8 (byte {21 + cut} of the line is 0xFF); the rest of this long document is left out"
    assert problems == [(str(path), 3, reason, True)]


@pytest.mark.parametrize("block", [1, 4, 1000])
def test_a_document_is_long_from_the_first_character_too_many(write, block):
    path = write(b"x" * 8 + b"\xff\n" + b"y" * 9 + b"\r\xff\n")
    with sizes(block, in_slice=8):
        texts, problems = read(path, on_error="skip")
    assert texts == ["y" * 9 + "\r"]
    assert ["the rest" in problem.reason for problem in problems] == [False, True]


@pytest.mark.parametrize("separator", ["line", "blank-line"])
def test_a_document_that_begins_with_very_many_blanks_keeps_them(write, separator):
    path = write(b"\t" * 50 + b"\n" + b" " * 50 + b"x\n\n" + b" " * 50)
    with sizes(block=4, in_slice=8):
        assert read_texts(path, separator=separator) == [" " * 50 + "x"]


CUTS = {
    "line ends": ("一二三\n四五。六\n七八", ["一二三\n四五。六", "\n七八"]),
    "blanks": ("ab cd。 ef ghij", ["ab cd。 ef", " ghij"]),
    "punctuation": ("一二三，四五，六七八九十", ["一二三，四五，", "六七八九十"]),
    "Chinese": ("一二abcdefghijk", ["一二", "abcdefghij", "k"]),
    "after blanks": ("         abcdef", ["         ", "abcdef"]),
    "ASCII punctuation": ("ab,cd-efghijk", ["ab,cd-", "efghijk"]),
    "anywhere": ("abcdefghijklm", ["abcdefghij", "klm"]),
    "exactly": ("abcdefghij", ["abcdefghij"]),
}


@pytest.mark.parametrize("kind", CUTS)
def test_long_documents_are_cut_at_the_best_place(write, kind):
    text, expected = CUTS[kind]
    with sizes(in_slice=10):
        assert slices(write(text.encode()), separator="blank-line") == expected


@settings(max_examples=100)
@given(
    text=st.lists(st.sampled_from(["中文", "字。", "，", " ", "word", "\u0301", "it’s", "1.5", "x@y\n"]), min_size=1)
)
def test_slices_have_the_wordpiece_ids_of_the_whole(tmp_path_factory, tokenizer_folder, text):
    path = tmp_path_factory.mktemp("corpus") / "a.txt"
    path.write_text("字" + "".join(text), encoding="utf-8")
    tokenizer = load_tokenizer(tokenizer_folder)
    whole = tokenizer.encode_batch(slices(path, separator="blank-line"))
    longest_word = max(map(len, re.findall(r"[\w\u0301]*", path.read_text(encoding="utf-8"), re.ASCII)))
    with sizes(in_slice=max(8, longest_word)):
        cut = tokenizer.encode_batch(slices(path, separator="blank-line"))
    assert cut.ids_T.tolist() == whole.ids_T.tolist()


@pytest.mark.parametrize("suffix", PACK)
def test_members_and_padding_of_compressed_files(write, suffix):
    one, two, three = map(PACK[suffix], (b"one\ntwo", b" and\nthree\n", b"four"))
    path = write(one + two + bytes(8) + three + bytes(4), f"a.txt{suffix}")
    with sizes(block=3):
        assert read_texts(path) == ["one", "two and", "three", "four"]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("cut", [0, 1, 5, 0.25, 0.5, 0.9, -9, -4, -1])
def test_truncated_streams_are_never_taken_for_whole(write, suffix, cut):
    lines, packed = _packed_lines(suffix)
    path = write(packed[: int(cut * len(packed)) if isinstance(cut, float) else cut], f"a.txt{suffix}")
    with pytest.raises(UserError, match=rf"truncated \{suffix} data: .*a\.txt\{suffix}:\d+; ") as error:
        read(path)
    assert error.value.exit_code == ExitCode.DATA
    texts, problems = read(path, write(b"next", "b.txt"), on_error="skip")
    assert texts == [*lines[: len(texts) - 1], "next"]
    assert [(problem.reason, problem.line) for problem in problems] == [(f"truncated {suffix} data", len(texts))]
    if cut == 0.9 and suffix != ".bz2":  # which has one block here
        assert len(texts) > 1000


@functools.cache
def _packed_lines(suffix: str) -> tuple[list[str], bytes]:
    lines = [f"line {index}" for index in range(40_000)]
    return lines, PACK[suffix]("\n".join(lines).encode())


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("damage", [b"garbage!", b"\x1f\x8b\xff", b"BZh", b"\xfd7zXZ"])
def test_damage_after_the_first_member_is_an_error(write, suffix, damage):
    path = write(PACK[suffix](b"one\ntwo\n") + damage, f"a.txt{suffix}")
    with pytest.raises(UserError, match=rf"(damaged|truncated) \{suffix} data"):
        read(path)
    texts, problems = read(path, on_error="replace")
    assert texts == ["one", "two"]
    assert [(problem.line, problem.skipped) for problem in problems] == [(3, True)]


@pytest.mark.parametrize("suffix", PACK)
def test_a_flipped_bit_is_found_by_the_checksum(write, suffix):
    packed = bytearray(PACK[suffix](bytes(range(32, 127)) * 50))
    packed[-6 if suffix == ".gz" else len(packed) // 2] ^= 1
    with pytest.raises(UserError, match="damaged"):
        read(write(bytes(packed), f"a.txt{suffix}"))


def test_a_missing_zstd_package_says_how_to_install_it(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "backports", None)
    monkeypatch.setitem(sys.modules, "compression", None)
    with pytest.raises(UserError, match=re.escape("pip install 'gpt2_flax[corpora]'")) as error:
        read(write(b"", "a.txt.zst"))
    assert error.value.exit_code == ExitCode.NO_INPUT


def test_the_decompressor_returns_no_more_than_asked_for(write):
    with open(write(PACK[".gz"](bytes(10**6))), "rb") as file:
        stream = compression.Decompressed(file, ".gz")
        blocks = iter(lambda: len(stream.read(1000)), 0)
        assert set(blocks) == {1000}


MEASURE = textwrap.dedent(
    """
    import re, sys
    from gpt2_flax.text.corpus import CorpusOptions, corpus_units
    # Not getrusage, whose maximum begins with that of the parent.
    memory = lambda: int(re.search(r"VmHWM:[^0-9]*([0-9]+)", open("/proc/self/status").read())[1])
    before, n_bytes, characters = memory(), 0, 0
    problems = []
    for unit in corpus_units([sys.argv[1]], CorpusOptions(separator=sys.argv[2], on_error="skip"), 2**22):
        for batch in unit.batches(problems.append):
            n_bytes += batch.n_bytes
            characters += sum(map(len, batch.texts))
    print(characters, len(problems), (memory() - before) // 1024)
    """
)


@pytest.mark.multiprocess
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("name", "separator"),
    [("a.txt", "line"), ("a.txt", "blank-line"), ("a.txt", "file"), ("a.txt.gz", "line"), ("a.jsonl", "line")],
)
def test_a_long_line_does_not_fill_the_memory(write, name, separator):
    line = "很长的一行，".encode() * (2**22 + 2**18)  # 76.5 MiB
    path = write(PACK[".gz"](line) if name.endswith(".gz") else line, name)
    command = [sys.executable, "-c", MEASURE, str(path), separator]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    characters, problems, grown = map(int, result.stdout.split())
    assert (characters, problems) == ((0, 1) if name == "a.jsonl" else (len(line) // 3, 0))
    assert grown < (76 if name == "a.jsonl" else 20)  # MiB; a JSON record is held up to 64 MiB of UTF-8


def test_the_longest_slice_is_what_tokenizers_expect():
    assert SLICE_CHARACTERS == 2**18
