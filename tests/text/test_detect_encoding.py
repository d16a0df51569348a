"""Encodings are detected by byte order mark, as UTF-8, or by a detector that is sure; the documents stay the same."""

import itertools
import json
import random
from pathlib import Path

import pytest
from support.corpus_files import PACK, read, read_texts, sizes
from support.encoded_texts import JAPANESE, KOREAN, SIMPLIFIED, TRADITIONAL, marked

from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.text import detect_encoding
from gpt2_flax.text.corpus import CorpusOptions, corpus_units, identity

WIDE = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
DETECTED = [
    ("gb18030", SIMPLIFIED),
    ("gb18030", TRADITIONAL),
    ("gbk", SIMPLIFIED),
    ("gb2312", SIMPLIFIED),
    ("big5", TRADITIONAL),
    ("cp950", TRADITIONAL),
    ("shift_jis", JAPANESE),
    ("cp932", [*JAPANESE, "①高橋～髙橋"]),  # signs that only Windows' extension has
    ("euc_kr", KOREAN),
    ("cp949", [*KOREAN, "똠방각하"]),
]


def encoding_of(path: Path, **options: str) -> str:
    [unit] = corpus_units([str(path)], CorpusOptions(**options))
    [file] = unit.files
    return file.encoding


@pytest.mark.parametrize("suffix", ["", *PACK])
@pytest.mark.parametrize(("encoding", "texts"), DETECTED)
def test_what_the_detector_is_sure_of_is_read_in_it(write, encoding, texts, suffix):
    content = "\r\n".join(texts).encode(encoding)
    path = write(PACK[suffix](content) if suffix else content, f"a.txt{suffix}")
    assert read_texts(path) == texts
    read_as = encoding_of(path)
    assert content.decode(read_as) == "\r\n".join(texts)
    assert read_as in ("gb18030", "big5", "shift_jis", "cp932", "cp949")


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", *WIDE])
@pytest.mark.parametrize("block", [1, 3, 7, 2**19])
def test_a_byte_order_mark_decides(write, encoding, suffix, block):
    # In UTF-16 these have bytes 0x0A and 0x0D inside characters: U+0A0A, U+0D0A, U+4E0A.
    texts = ["上\u0a0a\u0d0a", "a", "𠀀😀\ufeff", "\u2028 上"]
    content = marked("\r\n\n".join(texts), encoding)
    path = write(PACK[suffix](content) if suffix else content, f"a.txt{suffix}")
    with sizes(block=block):
        assert read_texts(path, unit_bytes=5) == texts
        assert read_texts(path, separator="blank-line", unit_bytes=5) == texts
        assert read_texts(path, separator="file", unit_bytes=5) == ["\n\n".join(texts)]


@pytest.mark.parametrize("encoding", WIDE)
def test_wide_encodings_may_be_named(write, encoding):
    path = write("一\n二".encode(encoding))
    assert read_texts(path, encoding=encoding.upper()) == ["一", "二"]


def test_what_is_no_utf16_is_reported_with_its_line(write):
    surrogate = b"\x00\xd8"
    path = write("\ufeff一\n二".encode("utf-16-le") + surrogate + "x\n三\n".encode("utf-16-le") + b"z")
    with pytest.raises(UserError, match=r"not UTF-16-LE: .*a\.txt:2; .*--encoding"):
        read(path)
    texts, problems = read(path, on_error="skip")
    assert texts == ["一", "三"]
    assert [(problem.line, problem.reason) for problem in problems] == [(2, "not UTF-16-LE"), (4, "not UTF-16-LE")]
    assert read(path, on_error="replace")[0] == ["一", "二\ufffdx", "三", "\ufffd"]


SAME = "\n".join(SIMPLIFIED)


@pytest.mark.parametrize(
    "content",
    [
        SAME.encode()[:-1],  # cut inside the last character
        SAME.encode() + b"\n\xff",
        SAME.encode().replace("。".encode(), "。".encode("gb18030")),
        "今天天气很好".encode("gb18030"),  # too short to be sure
        "L'été dernier, nous avons visité la forêt près du château où les élèves étaient allés. ".encode("cp1252") * 9,
        "Сегодня очень хорошая погода, и мы решили пойти гулять в парк. ".encode("koi8_r") * 9,
        "Сегодня очень хорошая погода, и мы решили пойти гулять в парк. ".encode("cp1251") * 9,
        "\n".join(JAPANESE).encode("euc_jp"),
        "\n".join(KOREAN).encode("johab"),
        SAME.encode("utf-16-le"),  # without its mark
        random.Random(0).randbytes(3000),
    ],
)
def test_everything_else_is_an_error_that_names_line_byte_and_option(write, content):
    with pytest.raises(UserError, match=r"not UTF-8 \(byte \d+ of the line is 0x..\): .*a\.txt:\d+; .*--encoding") as e:
        read(write(content))
    assert e.value.exit_code == ExitCode.DATA


def test_a_wrong_choice_is_rarer_than_one_in_a_thousand():
    path = Path(__file__).parents[3] / "shared/data/CLUECorpusSmall_sampled.txt"
    if not path.exists():
        pytest.skip("needs text of CLUECorpusSmall")
    text, draw = path.read_text(encoding="utf-8"), random.Random(0)
    for encoding, length in itertools.product(["gb18030", "big5"], [120, 200, 1000]):
        starts = [draw.randrange(len(text) - length) for _ in range(300)]
        contents = (text[start : start + length].encode(encoding, "ignore") for start in starts)
        found = [detect_encoding.FileSample([content], whole=True).encoding for content in contents]
        assert set(found) <= {"utf-8", encoding}
        assert length < 200 or found.count(encoding) > 270


def test_utf8_is_never_taken_for_another(write):
    for text in (SIMPLIFIED, TRADITIONAL, JAPANESE, KOREAN, ["ASCII"], ["Überall größere Füße"] * 20):
        assert encoding_of(write("\n".join(text).encode())) == "utf-8"


def test_files_of_one_corpus_differ(write, tmp_path):
    write("\n".join(SIMPLIFIED).encode("gb18030"), "a.txt")
    write("\n".join(TRADITIONAL).encode("big5"), "b.txt")
    write("一".encode(), "c.txt")
    write("二".encode("utf-16"), "d.text")
    [unit] = corpus_units([str(tmp_path)])
    assert [file.encoding for file in unit.files] == ["gb18030", "big5", "utf-8", "utf-16-le"]
    assert read_texts(tmp_path) == [*SIMPLIFIED, *TRADITIONAL, "一", "二"]
    assert all("\ufffd" in text for text in read(tmp_path / "a.txt", encoding="utf-8", on_error="replace")[0])


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "utf-32-be"])
def test_json_is_read_in_any_of_them(write, encoding):
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in SIMPLIFIED)
    assert read_texts(write(marked(lines, encoding), "a.jsonl"), unit_bytes=50) == SIMPLIFIED
    whole = json.dumps(SIMPLIFIED, ensure_ascii=False, indent=1)
    assert read_texts(write(marked(whole, encoding), "a.json")) == SIMPLIFIED


def test_a_large_file_is_decided_from_a_sample_and_cut_as_ever(write, monkeypatch):
    monkeypatch.setattr(detect_encoding, "PIECES", 4)
    monkeypatch.setattr(detect_encoding, "PIECE_BYTES", 1000)
    lines = [f"{number} {text}" for number in range(40) for text in SIMPLIFIED]
    content = "\n".join(lines).encode("gb18030")
    path = write(content)
    assert encoding_of(path) == "gb18030"
    assert len(corpus_units([str(path)], unit_bytes=2000)) > 5
    assert read_texts(path, unit_bytes=2000) == lines
    # ASCII at the beginning, then a fault outside the sample.
    assert encoding_of(write(b"ascii\n" * 2000 + content)) == "gb18030"
    number = len(content[:4000].split(b"\n"))
    fault = content[:4000] + b"\xff\xff" + content[4000:]
    with pytest.raises(UserError, match=rf"not GB18030 .*a\.txt:{number}; "):
        read(write(fault), unit_bytes=2000)


def test_the_sample_is_bounded(write, monkeypatch):
    consumed = []
    start = detect_encoding._start
    monkeypatch.setattr(detect_encoding, "_start", lambda *options: consumed.append(start(*options)) or consumed[-1])
    for name, content in (("a.txt", b"line\n" * 2**20), ("a.txt.gz", PACK[".gz"](b"line\n" * 2**20))):
        consumed.clear()
        assert encoding_of(write(content, name)) == "utf-8"
        assert sum(map(len, consumed)) == 2**20


def test_a_unit_read_in_another_encoding_is_another_unit(write):
    path = write("\n".join(SIMPLIFIED).encode("gb18030"))
    [auto], [named], [other] = (
        corpus_units([str(path)], CorpusOptions(encoding=name)) for name in ("auto", "gb18030", "big5")
    )
    assert identity(auto) == identity(named) != identity(other)
