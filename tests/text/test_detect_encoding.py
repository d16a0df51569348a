"""Encodings are detected by byte order mark, as UTF-8, or by a detector that is sure; the documents stay the same."""

import itertools
import json
import random
from pathlib import Path

import pytest
from support.corpus_files import PACK, read, read_texts, sizes

from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.text import detect_encoding
from gpt2_flax.text.corpus import CorpusOptions, corpus_units, identity

SIMPLIFIED = [
    "今天天气非常好，我们决定到公园去散步，顺便买一些水果回家。",
    "这家饭店的服务很好，房间也很干净，下次还会再来；只是早餐的时间有一点短。",
    "昨天晚上看了一部电影，剧情非常精彩，演员的表演也令人印象深刻，推荐大家去看。",
    "新华社北京一月一日电，国务院总理在讲话中说，经济的发展离不开人民的努力。",
    "书的内容不错，可是印刷质量很差，有几页根本看不清楚，希望出版社能够改进。",
    "他在学校里学习数学和物理，毕业以后想当一名老师，把知识教给更多的孩子。",
    "小说的主人公是一个年轻的农民，为了生活来到了城市，经历了许多想不到的事情。",
]
TRADITIONAL = [
    "今天的天氣非常好，我們決定到公園去散步，順便買一些水果回家。",
    "這家飯店的服務很好，房間也很乾淨，下次還會再來；只是早餐的時間有一點短。",
    "昨天晚上看了一部電影，劇情非常精彩，演員的表演也令人印象深刻，推薦大家去看。",
    "書的內容不錯，可是印刷質量很差，有幾頁根本看不清楚，希望出版社能夠改進。",
    "他在學校裡學習數學和物理，畢業以後想當一名老師，把知識教給更多的孩子。",
    "小說的主人公是一個年輕的農民，為了生活來到了城市，經歷了許多想不到的事情。",
]
JAPANESE = [
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "何でも薄暗いじめじめした所でニャーニャー泣いていた事だけは記憶している。",
    "吾輩はここで始めて人間というものを見た。しかもあとで聞くとそれは書生という人間中で一番獰悪な種族であったそうだ。",
    "この書生というのは時々我々を捕えて煮て食うという話である。しかしその当時は何という考もなかったから別段恐しいとも思わなかった。",
]
KOREAN = [
    "대한민국의 모든 권력은 국민으로부터 나온다.",
    "오늘은 날씨가 좋아서 공원에서 산책을 하고 친구를 만나 이야기를 나누었다.",
    "서울의 지하철은 빠르고 편리하며 많은 사람들이 매일 이용한다.",
    "책을 읽는 것은 즐거운 일이고 새로운 지식을 얻을 수 있다.",
    "어제 저녁에는 가족과 함께 영화를 보았는데 배우들의 연기가 아주 훌륭해서 오래 기억에 남을 것 같다.",
]
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


def marked(text: str, encoding: str) -> bytes:
    """Encode with a byte order mark, which Python does not write for encodings that name the byte order."""
    return ("\ufeff" + text).encode(encoding) if encoding[-2:] in ("le", "be") else text.encode(encoding)


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
    monkeypatch.setattr(detect_encoding, "_PIECES", 4)
    monkeypatch.setattr(detect_encoding, "_PIECE_BYTES", 1000)
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
