"""The table gives the ids of its tokenizer for any text."""

import pickle
import random
import tempfile
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers

from gpt2_flax.tokenizers import bert_table, wordpiece
from gpt2_flax.tokenizers.bert_table import BertTable
from gpt2_flax.tokenizers.ragged_ids import RaggedIds
from gpt2_flax.tokenizers.wordpiece import WordPieceTokenizer

DATA = Path(__file__).parents[3] / "shared" / "data"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "then", "GPT", "hello", "##llo", "##ing", "aa", "aba", "##ba", "12", "20", "かな", "##カナ", "##\u302e"]
ALPHABET = "abcdefghinopstuz今天气很好中文字一。，！.,!'-#012１２éÉσςΣıfＡａ𠀀한\u0301\u0327"
JAMO = [chr(unit) for unit in (*range(0x1100, 0x1113), *range(0x1161, 0x1176), *range(0x11A8, 0x11C3))]
SMALL = [*dict.fromkeys([*SPECIAL, *WORDS, *ALPHABET, *JAMO, *(f"##{piece}" for piece in (*ALPHABET, *JAMO))])]

# Neighbours of surrogates, ends of planes, blanks of all kinds, characters that are removed, marks in and out of order,
# characters that become several or other characters, full-width and private characters, Hangul as syllables and jamo.
HARD_CHARACTERS = (
    "\ud7ff\ue000\uf8ff\ufffc\ufffd\ufffe\uffff\U0001fffe\U0002fa1d\U000e0001\U000f0000\U0010ffff"
    "\t\n\v\f\r\x1c\x1f \x85\xa0\u1680\u180e\u2000\u2028\u2029\u202f\u205f\u3000\ufeff"
    "\x00\x07\x7f\xad\u200b\u200d\u2060"
    "\u0300\u0301\u0316\u0327\u0345\u0591\u05b0\u0e38\u0f71\u20dd\u302a\u302e\u302f\u3099\ufe0f\ufe20\U0001d165\U0001d16d"
    "İıßſÅǅΐΣςσẞﬃŉ≠≮`\u037e\u0387\u1fef\u2126\u212a\u2329\u0958\u0b48\u0f43\ufb1d\ufb2c\U0001d15e\U0001d1bb豈﨎更"
    "＇－Ａ１！～￥ｶﾞ가각힣\u1100\u1161\u11a8\ua960\ud7b0かがガー々〇〆・…—“”·¥€©™①⑴㈱㍿⼀⺀😀🇨🇳👍🏽𝒜𠀀𪛖𮯠\U00031350"
)
HARD_WORDS = (
    *SPECIAL, "##a", "a", "aa", "then", "hello", "GPT-2", "don't", "1929年", "ΑΣ", "ΑΣ.", "naïve", "E\u0301\u0327",
    "a\u0327\u0301中", "中\u302e\u0301文", "=\u0338\u302e", "한국어", "\u1112\u1161\u11ab", "かな", "が", "👩‍👩‍👧",
    "x" * 101, "今天天气很好", "。。。", "——", "\r\n", "  ",
)  # fmt: skip
TEXTS = st.lists(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]),
        st.sampled_from(HARD_CHARACTERS),
        st.sampled_from(HARD_WORDS),
        st.sampled_from(SMALL),
    ),
    max_size=60,
).map("".join)

published = pytest.mark.skipif(not DATA.is_dir(), reason="needs the published vocabulary")
every_tokenizer = pytest.mark.parametrize("lowercase", [True, False], ids=["uncased", "cased"])
every_vocabulary = pytest.mark.parametrize("name", ["small", pytest.param("published", marks=published)])


def vocabulary(name: str) -> tuple[str, ...]:
    path = DATA / "google_zh_vocab.txt"
    return tuple(SMALL if name == "small" else path.read_bytes().decode().removesuffix("\n").split("\n"))


@cache
def backend_of(tokens: tuple[str, ...], lowercase: bool) -> Tokenizer:
    """Return the tokenizer that the `tokenizers` library makes from the vocabulary."""
    tokenizer = WordPieceTokenizer("\n".join(tokens).encode(), "vocab.txt", lowercase)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        backend = Tokenizer.from_file(f"{folder}/tokenizer.json")
    backend.encode_special_tokens = True
    return backend


@cache
def table_of(tokens: tuple[str, ...], lowercase: bool) -> BertTable:
    return BertTable(backend_of(tokens, lowercase), len(tokens))


@cache
def transformers_of(tokens: tuple[str, ...], lowercase: bool):
    transformers = pytest.importorskip("transformers")
    ids = {token: index for index, token in enumerate(tokens)}
    return transformers.BertTokenizer(ids, do_lower_case=lowercase, split_special_tokens=True)


def rows(encoded: RaggedIds) -> list[list[int]]:
    return [row.tolist() for row in encoded]


def expected_rows(tokens: tuple[str, ...], lowercase: bool, texts: list[str]) -> list[list[int]]:
    encodings = backend_of(tokens, lowercase).encode_batch(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def assert_same(tokens: tuple[str, ...], lowercase: bool, texts: list[str]) -> None:
    assert rows(table_of(tokens, lowercase).encode(texts)) == expected_rows(tokens, lowercase, texts)


# Any text.


@pytest.mark.slow
@every_tokenizer
@every_vocabulary
@settings(max_examples=100)
@given(texts=st.lists(TEXTS, max_size=8))
def test_ids_are_those_of_tokenizers_and_transformers(name, lowercase, texts):
    tokens = vocabulary(name)
    assert_same(tokens, lowercase, texts)
    if texts:
        theirs = transformers_of(tokens, lowercase)(texts, add_special_tokens=False)["input_ids"]
        assert rows(table_of(tokens, lowercase).encode(texts)) == theirs


@pytest.mark.slow
@every_tokenizer
@every_vocabulary
def test_every_character_of_the_first_plane_gives_the_same_ids_alone_and_between_others(name, lowercase):
    tokens = vocabulary(name)
    for start in range(0, 0x10000, 0x1000):
        characters = [chr(unit) for unit in range(start, start + 0x1000) if not 0xD800 <= unit < 0xE000]
        texts = [text for c in characters for text in (c, f"a{c}b", f"中{c}文")]
        assert_same(tokens, lowercase, texts)


@pytest.mark.slow
def test_every_character_of_the_other_planes_gives_the_same_ids_alone_and_between_others():
    tokens = tuple(SMALL)
    for start in range(0x10000, 0x110000, 0x100):
        block = "".join(map(chr, range(start, start + 0x100)))
        # Most characters are unassigned, which the tokenizer takes as letters, or private, which it drops. A block of
        # such characters is one word with its neighbours; reading one of them differently would give more tokens.
        whole = expected_rows(tokens, True, [f"a{block}b"])
        if whole in ([[tokens.index("[UNK]")]], expected_rows(tokens, True, ["ab"])):
            texts = [f"a{block}b中{block}文"]
        else:
            texts = [text for c in block for text in (c, f"a{c}b", f"中{c}文")]
        assert_same(tokens, True, texts)


@pytest.mark.slow
@every_tokenizer
@pytest.mark.parametrize("hard", [*HARD_CHARACTERS, *HARD_WORDS], ids=ascii)
def test_hard_characters_give_the_same_ids_beside_each_other(lowercase, hard):
    texts = [
        between.join(f"{beside}{hard}{beside}" for beside in HARD_CHARACTERS) for between in ("\n", "中", "a\u0301,")
    ]
    assert_same(tuple(SMALL), lowercase, texts)


@pytest.mark.slow
@published
@every_tokenizer
@pytest.mark.parametrize("name", ["CLUECorpusSmall_sampled.txt", "news-commentary-v13-en-zh_sampled.txt"])
def test_real_text_gives_the_same_ids(name, lowercase):
    lines = (DATA / name).read_bytes().decode().split("\n")[:600]
    assert_same(vocabulary("published"), lowercase, lines)
    assert_same(vocabulary("published"), lowercase, ["\n".join(lines)])


def test_text_cannot_produce_a_special_id():
    encoded = table_of(tuple(SMALL), True).encode(["[CLS]你[SEP] [PAD][MASK]"])
    assert not {0, 2, 3, 4} & set(encoded.ids_T.tolist())


# Any vocabulary.


@pytest.mark.slow
@pytest.mark.parametrize("size", [2**16 - 2, 2**16, 2**16 + 1])
def test_ids_and_markers_that_do_not_fit_two_bytes(size):
    filler = (f"[unused{index}]" for index in range(size - len(SPECIAL) - 4))
    tokens = (*SPECIAL, "中", *filler, "a", "##b", "文")
    encoded = table_of(tokens, True).encode(["中文ab abb ", "文"])
    assert rows(encoded) == [[5, size - 1, size - 3, size - 2, size - 3, size - 2, size - 2], [size - 1]]
    assert encoded.ids_T.dtype == (np.uint16 if size <= 2**16 else np.uint32)
    assert_same(tokens, True, [*HARD_WORDS, HARD_CHARACTERS])


@pytest.mark.parametrize(
    "tokens",
    [
        tuple(SPECIAL),  # all is unknown, so that no id can part two runs
        (*SPECIAL, "中", "##a", "b", "##b"),
        (*SPECIAL, "other", "aa", "a中a", "##中", "##中a", "。a"),
        ("a", "中", "文", *SPECIAL),  # the unknown token has nearly the largest id
    ],
    ids=["only-special", "without-a", "words-across", "unknown-last"],
)
def test_vocabularies_that_do_not_tell_words_apart(tokens):
    characters = [
        chr(unit) for unit in chain(range(0x400), range(0x2000, 0x2100), range(0x2F00, 0x3100), range(0xFE00, 0x10000))
    ]
    assert_same(tokens, True, [text for c in characters for text in (f"a{c}a", f"中{c}文")])
    assert_same(tokens, True, [*HARD_WORDS, HARD_CHARACTERS])


def test_characters_that_become_parts_of_two_words_do_not_stand_alone():
    backend = Tokenizer.from_str(backend_of(tuple(SMALL), True).to_str())
    replaced = {"①": "t,h", "②": "t h", "③": ",t", "④": "h,", "⑤": ",t,", "⑥": " ", "⑦": ",", "⑧": ""}
    replaced |= {"⑨": " aab ", "⑩": "t ", "⑪": " h"}
    steps = [normalizers.Replace(old, new) for old, new in replaced.items()]
    backend.normalizer = normalizers.Sequence([*steps, backend.normalizer])
    texts = [f"{a}{c}{b}" for c in replaced for a in ("", "a", "中", "then") for b in ("", "a", "文", "e", c)]
    expected = [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]
    assert rows(BertTable(backend, len(SMALL)).encode(texts)) == expected


def test_a_run_may_become_more_tokens_than_it_has_units():
    texts = ["한국어 각", "a한b中각각。각", "각", "", "中각"]
    assert max(map(len, expected_rows(tuple(SMALL), True, texts))) > max(map(len, texts))
    assert_same(tuple(SMALL), True, texts)
    assert_same(tuple(SMALL), True, [*texts, "今天"] * 50)


# Batches.


@pytest.fixture
def table():
    """A table that knows no runs."""
    return BertTable(backend_of(tuple(SMALL), True), len(SMALL))


def test_line_feeds_empty_texts_and_no_texts():
    texts = ["", "\n", "中\n文", "a\nb\n", "", "a", "b", "\n\n𠀀\na", ""]
    assert_same(tuple(SMALL), True, texts)
    encoded = table_of(tuple(SMALL), True).encode([])
    assert (len(encoded), encoded.ids_T.dtype, encoded.ids_T.shape) == (0, np.uint16, (0,))
    assert rows(table_of(tuple(SMALL), True).encode(("", ""))) == [[], []]


@pytest.mark.parametrize("limit", ["GROUP_CHARACTERS", "KNOWN_RUNS", "KNOWN_CHARACTERS"])
@pytest.mark.parametrize("value", [1, 20, 300])
def test_small_limits_change_no_ids(monkeypatch, limit, value):
    monkeypatch.setattr(bert_table, limit, value)
    draw = random.Random(0)
    pieces = [*SMALL, *HARD_WORDS, " ", "中"]
    for _ in range(20):
        assert_same(tuple(SMALL), True, ["".join(draw.choices(pieces, k=draw.randrange(40))) for _ in range(30)])


def test_what_is_kept_of_runs_stays_bounded(table, monkeypatch):
    monkeypatch.setattr(bert_table, "KNOWN_RUNS", 1000)
    monkeypatch.setattr(bert_table, "KNOWN_CHARACTERS", 20_000)
    most = 0
    for start in range(0, 30_000, 500):
        table.encode([" ".join(f"a{number}" for number in range(start, start + 500))])
        assert len(table._numbers) <= 1500
        most = max(most, len(table._numbers))
        assert len(table._bounds) == len(table._numbers) + 1
    assert most > 1000  # they are kept at all
    for number in range(20):
        table.encode([f"{number}" + "x" * 5000])
        assert sum(map(len, table._numbers)) <= 20_000 + 2 * 5002


class Watched:
    """A backend that records the texts it encodes; an interrupted one raises KeyboardInterrupt."""

    def __init__(self):
        self.backend, self.asked, self.interrupted = backend_of(tuple(SMALL), True), [], False

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def encode_batch_fast(self, texts, **options):
        if self.interrupted:
            raise KeyboardInterrupt
        self.asked.extend(texts)
        return self.backend.encode_batch_fast(texts, **options)


def test_known_runs_are_not_asked_for_again():
    backend = Watched()
    table = BertTable(backend, len(SMALL))
    backend.asked.clear()
    table.encode(["hello then hello", "中文hello。"])
    assert [sorted(text.split(text[-1])) for text in backend.asked] == [["", "hello", "then"]]
    assert rows(table.encode(["then中hello"])) == expected_rows(tuple(SMALL), True, ["then中hello"])
    assert len(backend.asked) == 1


def test_an_interruption_while_a_run_is_asked_for_leaves_no_wrong_id():
    backend = Watched()
    table = BertTable(backend, len(SMALL))
    backend.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        table.encode(["hello then"])
    backend.interrupted = False
    texts = ["the hello", "then the"]
    assert rows(table.encode(texts)) == expected_rows(tuple(SMALL), True, texts)


def test_a_lone_surrogate_is_an_error():
    with pytest.raises(UnicodeEncodeError):
        table_of(tuple(SMALL), True).encode(["a\ud800"])


# The tokenizer that uses it.


@pytest.fixture
def tokenizer():
    return WordPieceTokenizer("\n".join(SMALL).encode(), Path("vocab.txt"))


def test_a_tokenizer_makes_its_table_once_the_texts_are_many(tokenizer, monkeypatch):
    monkeypatch.setattr(wordpiece, "TABLE_PAYS_AFTER", 30)
    made = []
    monkeypatch.setattr(wordpiece, "BertTable", lambda *args: made.append(args) or BertTable(*args))
    texts = ["今天 hello 中文。", "thenaba"]
    expected = expected_rows(tuple(SMALL), True, texts)
    assert rows(tokenizer.encode_batch(texts)) == expected
    assert not made
    for _ in range(2):
        assert rows(tokenizer.encode_batch(texts)) == expected
    assert len(made) == 1


@pytest.mark.slow
def test_a_tokenizer_can_be_sent_to_another_process(tokenizer):
    cased = WordPieceTokenizer("\n".join(SMALL).encode(), Path("vocab.txt"), lowercase=False)
    cased.encode_batch(["今天" * wordpiece.TABLE_PAYS_AFTER])
    for original in (tokenizer, cased):
        content = pickle.dumps(original)
        copy = pickle.loads(content)
        assert copy.fingerprint == original.fingerprint
        assert rows(copy.encode_batch(["GPT the"])) == rows(original.encode_batch(["GPT the"]))
        assert len(content) < 10_000  # the vocabulary, no table
