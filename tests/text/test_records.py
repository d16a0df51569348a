"""Reading documents from JSON and Parquet: the text of each record, and each way in which a record can be faulty."""

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.corpus_files import PACK, read, read_texts, sizes, slices

from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.text import json_documents
from gpt2_flax.text.corpus import CorpusOptions, corpus_units


@pytest.fixture
def write(tmp_path):
    def write(content: bytes | str, name: str = "a.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.JSONL.gz", "a.json.zst", "a.ndjson.bz2"])
def test_each_line_is_an_object_with_a_text(write, name):
    content = '\ufeff{"text": "一\\n\\n二"}\r\n\n \n{"id": 1, "text": " \\u3000"}\n{"text": "三\\ud83d\\ude00"}'
    suffix = Path(name).suffix
    path = write(PACK[suffix](content.encode()) if suffix in PACK else content, name)
    assert read_texts(path) == ["一\n\n二", "三😀"]


def test_a_field_may_be_nested_and_the_name_with_the_dots_goes_first(write):
    path = write('{"a": {"b": {"c": "nested"}}}\n{"a.b.c": "exact", "a": {"b": {"c": 1}}}\n{"a": {"b.c": "inner"}}')
    assert read_texts(path, field="a.b.c") == ["nested", "exact", "inner"]


def test_json_lines_are_cut_at_any_line_end(write):
    path = write('{"text": "x"}\n' * 100)
    assert len(corpus_units([str(path)], CorpusOptions(separator="blank-line"), 100)) > 10
    assert read_texts(path, separator="blank-line", unit_bytes=100) == ["x"] * 100


def test_json_in_another_encoding_and_by_option(write):
    path = write('{"text": "中文"}\n'.encode("gb18030"), "data")
    assert read_texts(path, encoding="gb18030", format="jsonl") == ["中文"]


BROKEN = {
    "[": "not JSON (Expecting value at character 2)",
    '[{"text": "x"}]': "not a JSON object but a list: one object a line is needed",
    '"text"': "not a JSON object but a string: one object a line is needed",
    "null": "not a JSON object but null: one object a line is needed",
    '{"text": "x"': "not JSON (Expecting ',' delimiter at character 13)",
    '{"text": "x"} {}': "not JSON (Extra data at character 15)",
    '{"text": "a\tb"}': "not JSON (Invalid control character at at character 12)",
    "{}": "no field 'text'",
    '{"Text": "x"}': "no field 'text'",
    '{"text": null}': "field 'text' is null, not a string",
    '{"text": ["x"]}': "field 'text' is a list, not a string",
    '{"text": {"x": "y"}}': "field 'text' is an object, not a string",
    '{"text": true}': "field 'text' is true or false, not a string",
    '{"text": 1.5}': "field 'text' is a number, not a string",
    '{"text": ' + "1" * 5000 + "}": "field 'text' is a number, not a string",
    '{"text": ' + "[" * 100_000: "not JSON (nested too deeply)",
    '{"text": "a\\ud800b"}': "half a surrogate pair (character 2 is U+D800)",
    "\ufeff{}": "not JSON (Expecting value at character 1)",
    '{"text": "x\0"}': "not JSON (Invalid control character at at character 12)",
}


@pytest.mark.parametrize("record", BROKEN)
def test_broken_records(write, record):
    path = write('{"text": "before"}\n' + record + '\n{"text": "after"}\n')
    with pytest.raises(UserError) as error:
        read(path)
    assert error.value.exit_code == ExitCode.DATA
    assert error.value.where == f"{path}:2"
    assert error.value.what.startswith(BROKEN[record][:20])
    for on_error, unit_bytes in itertools.product(["skip", "replace"], [None, 1]):
        texts, problems = read(path, on_error=on_error, unit_bytes=unit_bytes)
        mended = ["a\ufffdb"] if "ud800" in record and on_error == "replace" else []
        assert texts == ["before", *mended, "after"]
        [problem] = problems
        assert problem.reason.startswith(BROKEN[record])
        assert problem._replace(reason="") == (str(path), 2, "", not mended)


def test_undecodable_bytes_in_json(write):
    path = write(b'{"text": "a"}\n{"text": "\xff"}\n{"text": \xfe}\n{"text": "b"}')
    texts, problems = read(path, on_error="skip")
    assert texts == ["a", "b"]
    assert [(problem.line, problem.skipped) for problem in problems] == [(2, True), (3, True)]
    texts, problems = read(path, on_error="replace")
    assert texts == ["a", "\ufffd", "b"]
    assert [(problem.line, problem.skipped) for problem in problems] == [(2, False), (3, False), (3, True)]


def test_a_record_that_is_too_long_is_broken(write, monkeypatch):
    assert json_documents.LONGEST_RECORD == 2**26
    monkeypatch.setattr(json_documents, "LONGEST_RECORD", 2**20)
    fits = '{"text": "' + "中" * 349_520 + '"}   '
    assert len(fits.encode()) == 2**20 - 1
    path = write(f"{fits}\r\r\n{fits}\r\r\r".encode() + b"\xff" * 9000 + f"\n{{}}\n{fits}".encode())
    with sizes(block=1000):
        texts, problems = read(path, on_error="skip")
    assert [len(text) for text in texts] == [349_520] * 2
    assert [(problem.line, problem.reason) for problem in problems] == [
        (2, "record longer than 1 MiB"),
        (3, "no field 'text'"),
    ]


def test_a_truncated_stream_of_records_keeps_those_before(write):
    content = "".join(f'{{"text": "line {index}"}}\n' for index in range(1000)).encode()
    path = write(PACK[".gz"](content)[:-100], "a.jsonl.gz")
    texts, problems = read(path, on_error="skip")
    assert texts == [f"line {index}" for index in range(len(texts))]
    assert problems == [(str(path), len(texts) + 1, "truncated .gz data", True)]


def test_numbers_of_thousands_of_digits_in_other_fields_are_read(write):
    number = "9" * 5000
    assert read_texts(write(f'{{"text": "a", "n": {number}}}\n{{"n": [-{number}.5e9], "text": "b"}}')) == ["a", "b"]
    assert read_texts(write(f'[{{"text": "a", "n": {number}}}]', "a.json")) == ["a"]


LIST = ["一\n\n二", {"text": " \u3000"}, {"id": 1, "text": '三[]{},"😀\\'}, "四"]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize("suffix", ["", *PACK])
@pytest.mark.parametrize("block", [1, 7, 2**19])
def test_a_list_of_strings_or_objects_is_read_value_by_value(write, indent, ascii_only, suffix, block):
    content = f"\ufeff \n{json.dumps(LIST, ensure_ascii=ascii_only, indent=indent)}\r\n".encode()
    path = write(PACK[suffix](content) if suffix else content, f"a.json{suffix}")
    with sizes(block=block):
        assert read_texts(path, unit_bytes=10) == ["一\n\n二", '三[]{},"😀\\', "四"]


@pytest.mark.parametrize("block", [1, 7, 2**19])
def test_values_that_span_lines_are_read_one_after_the_other(write, block):
    objects = [{"text": "一", "n": {"m": [1, 2]}}, {"text": "二\n三"}]
    path = write("\n".join(json.dumps(one, indent=4, ensure_ascii=False) for one in objects), "a.jsonl")
    with sizes(block=block):
        assert read_texts(path, unit_bytes=10) == ["一", "二\n三"]
    assert read_texts(write('["一"]\n["二", {"doc": {"body": "三"}}]\n[]\n'), field="doc.body") == ["一", "二", "三"]


BROKEN_LISTS = {  # what comes after '["before",\n'
    '"a"\n': (3, "not JSON (the list has no end)", True),
    '"a" "b"]': (2, "not JSON (Expecting ',' delimiter)", True),
    '"a",\n\n{"text": \n"b" "c"}]': (5, "not JSON (Expecting ',' delimiter)", True),
    '"a", "b\n"]': (2, "not JSON (Invalid control character at)", True),
    '"a", ' + "[" * 100_000: (2, "not JSON (nested too deeply)", True),
    '"a",\n"\xff", "after"]': (3, "not UTF-8 (byte 2 of the line is 0xFF)", True),
    '"a",\n[1], "after"]': (3, "neither a JSON object nor a string but a list", False),
    '"a",\n1234567, "after"]': (3, "neither a JSON object nor a string but a number", False),
    '"a",\nnull, "after"]': (3, "neither a JSON object nor a string but null", False),
    '"a",\n{"Text": "b"}, "after"]': (3, "no field 'text'", False),
    '"a",\n"\\ud800", "after"]': (3, "half a surrogate pair (character 1 is U+D800)", False),
}


@pytest.mark.parametrize("rest", BROKEN_LISTS)
def test_broken_lists(write, rest):
    line, reason, ends = BROKEN_LISTS[rest]
    path = write(b'["before",\n' + rest.encode("utf-8" if rest.isascii() else "latin-1"), "a.json")
    with pytest.raises(UserError) as error:
        read(path)
    assert (error.value.exit_code, error.value.where, error.value.what) == (ExitCode.DATA, f"{path}:{line}", reason)
    for block in (1, 5, 2**19):
        with sizes(block=block):
            texts, problems = read(path, on_error="skip")
        assert texts == ["before", "a"] + ["after"] * (not ends)
        expected = f"{reason}; the rest of this file is left out" if ends else reason
        assert problems == [(str(path), line, expected, True)]


def test_a_value_that_is_too_long_ends_the_file(write, monkeypatch):
    monkeypatch.setattr(json_documents, "LONGEST_RECORD", 2**20)
    fits = "中" * 349_524
    path = write(json.dumps(["a", fits, "b", fits + "中" * 3, "c"], ensure_ascii=False, indent=0), "a.json")
    with sizes(block=1000):
        texts, problems = read(path, on_error="skip")
    assert texts == ["a", fits, "b"]
    assert problems == [(str(path), 5, "record longer than 1 MiB; the rest of this file is left out", True)]


def test_an_unended_value_does_not_fill_the_memory(write, monkeypatch):
    monkeypatch.setattr(json_documents, "LONGEST_RECORD", 2**16)
    tried = []
    decode = json_documents.DECODER.raw_decode
    stand_in = SimpleNamespace(raw_decode=lambda text, at: tried.append(len(text)) or decode(text, at))
    monkeypatch.setattr(json_documents, "DECODER", stand_in)
    with sizes(block=100):
        texts, problems = read(write('["' + "x" * 10**6, "a.json"), on_error="skip")
    assert (texts, len(problems)) == ([], 1)
    assert max(tried) <= 2**16 + 200
    assert sum(tried) < 8 * 2**16  # it is not parsed again for every block


JSON_LINES = st.lists(
    st.one_of(
        st.text('a中\n\r \u2028\\"', max_size=20).map(lambda text: json.dumps({"text": text}, ensure_ascii=False)),
        st.sampled_from(["", " ", "{}", "{", '{"text": "\\udc00"}', '{"text": "\udcff"}', "[]", "\ufeff"]),
    ),
    max_size=8,
)


@settings(max_examples=150)
@given(
    lines=JSON_LINES,
    end=st.sampled_from(["\n", "\r\n"]),
    on_error=st.sampled_from(["skip", "replace"]),
    size=st.integers(1, 30),
    block=st.integers(1, 30),
)
def test_records_do_not_depend_on_how_a_file_is_read(tmp_path_factory, lines, end, on_error, size, block):
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    path.write_bytes(end.join(lines).encode("utf-8", "surrogateescape") + b"\n")
    whole = read(path, on_error=on_error)
    with sizes(block, size):
        assert read(path, on_error=on_error, unit_bytes=size) == whole


pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TEXTS = ["一", "", "二\n三", " \u3000", "四" * 30, "五", "六😀"]
FILLED = [text for text in TEXTS if text.strip()]


@pytest.fixture
def write_table(tmp_path):
    def write_table(column, name: str = "text", file: str = "a.parquet", **options) -> Path:
        path = tmp_path / file
        table = pyarrow.table([column, pyarrow.array(range(len(column)))], names=[name, "id"])
        parquet.write_table(table, path, **options)
        return path

    return write_table


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_a_column_of_strings(write_table, kind, compression):
    dictionary = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
    column = pyarrow.array(TEXTS, dictionary if kind == "dictionary" else getattr(pyarrow, kind)())
    try:
        path = write_table(column, compression=compression, row_group_size=3)
    except pyarrow.ArrowNotImplementedError as error:
        pytest.skip(f"an older pyarrow: {error}")
    assert read_texts(path) == FILLED
    with sizes(block=20, in_slice=7):
        assert read_texts(path, unit_bytes=1) == FILLED


def test_a_column_may_be_nested(write_table):
    inner = [{"b": text, "c": 1} for text in TEXTS]
    assert read_texts(write_table(pyarrow.array(inner), "a"), field="a.b") == FILLED
    table = pyarrow.table({"a": pyarrow.array(inner), "a.b": pyarrow.array(["exact"] * len(TEXTS))})
    path = write_table(pyarrow.array(TEXTS))
    parquet.write_table(table, path)
    assert read_texts(path, field="a.b") == ["exact"] * len(TEXTS)


def test_row_groups_become_units(write_table):
    path = write_table(pyarrow.array([f"text {index}" for index in range(100)]), row_group_size=10)
    size = path.stat().st_size
    for unit_bytes, number in ((1, 10), (size // 5 + 1, 5), (size, 1)):
        units = corpus_units([str(path)], unit_bytes=unit_bytes)
        assert len(units) == number
        assert sum(unit.size for unit in units) == size
        assert len({unit.name for unit in units}) == number
        assert read_texts(path, unit_bytes=unit_bytes) == [f"text {index}" for index in range(100)]


def test_rows_without_text_are_broken(write_table):
    broken = pyarrow.array([b"a", None, b"\xffx", b"b"], pyarrow.binary()).cast(pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), len(broken), broken.buffers())
    path = write_table(column, row_group_size=2)
    with pytest.raises(UserError, match=r"field 'text' is null: .*a\.parquet:2; "):
        read(path)
    texts, problems = read(path, on_error="skip", unit_bytes=1)
    assert texts == ["a", "b"]
    assert problems == [
        (str(path), 2, "field 'text' is null", True),
        (str(path), 3, "not UTF-8 (byte 1 of the text is 0xFF)", True),
    ]
    texts, problems = read(path, on_error="replace")
    assert texts == ["a", "\ufffdx", "b"]
    assert [problem.skipped for problem in problems] == [True, False]


@pytest.mark.parametrize(
    ("column", "field", "what"),
    [
        (["x"], "body", "no column 'body'"),
        (["x"], "text.body", "no column 'text.body'"),
        (["x"], "", "no column ''"),
        ([1], "text", "column 'text' holds int64, not strings"),
        ([b"x"], "text", "column 'text' holds binary, not strings"),
        ([["x"]], "text", "column 'text' holds list<"),
        ([{"a": "x"}], "text", "column 'text' holds struct<a: string>, not strings"),
    ],
)
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_column_that_is_missing_or_no_text_is_always_an_error(write_table, column, field, what, on_error):
    with pytest.raises(UserError) as error:
        read(write_table(pyarrow.array(column)), field=field, on_error=on_error)
    assert error.value.exit_code == ExitCode.DATA
    assert error.value.what.startswith(what)


@pytest.mark.parametrize("damage", ["empty", "text", "head", "tail", "pages"])
def test_damaged_parquet(write_table, tmp_path, damage):
    path = write_table(
        pyarrow.array([f"{index:07d}" for index in range(9000)]),
        use_dictionary=False,
        row_group_size=3000,
        write_page_checksum=True,
    )
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes(
        {
            "empty": b"",
            "text": b"text\n" * 100,
            "head": content[:half],
            "tail": content[half:],
            "pages": content[:half] + bytes(1000) + content[half + 1000 :],
        }[damage]
    )
    (tmp_path / "b.txt").write_bytes(b"next")
    with pytest.raises(UserError, match="damaged Parquet file") as error:
        read(path)
    assert error.value.exit_code == ExitCode.DATA
    assert error.value.where.startswith(str(path))
    for unit_bytes in (None, 1):
        texts, problems = read(path, tmp_path / "b.txt", on_error="skip", unit_bytes=unit_bytes)
        kept = [*range(3000), *range(6000, 9000)] if damage == "pages" else []
        assert texts == [*(f"{index:07d}" for index in kept), "next"]
        lines = {"pages": [3001], "tail": [1, 3001, 6001]}.get(damage, [1])  # one for each row group
        assert [problem.line for problem in problems] == lines


def test_parquet_at_an_address(write_table):
    path = write_table(pyarrow.array(FILLED), row_group_size=2)
    fsspec.filesystem("memory").pipe("/records/a.parquet", path.read_bytes())
    assert read_texts("memory://records", unit_bytes=1) == FILLED


def test_an_empty_table_has_no_text(write_table):
    path = write_table(pyarrow.array([], pyarrow.string()))
    with pytest.raises(UserError, match="no text in the corpus"):
        read(path)


def test_a_long_text_comes_in_slices(write, write_table):
    text = "中文" * 10 + " " + "a" * 5
    with sizes(in_slice=10):
        for path in (write_table(pyarrow.array([text])), write(json.dumps({"text": text}))):
            assert slices(path) == ["中文" * 5, "中文" * 5, " aaaaa"]


def test_a_missing_parquet_package_says_how_to_install_it(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'gpt2_flax\[corpora\]'") as error:
        corpus_units([str(write(b"", "a.parquet"))], CorpusOptions())
    assert error.value.exit_code == ExitCode.NO_INPUT
