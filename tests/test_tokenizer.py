import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.text.corpus import corpus_units
from gpt2_flax.text.fast import tokenizer_spec
from gpt2_flax.text.tokenizer import load_tokenizer
from gpt2_flax.text.train_tokenizer import measure, sample_documents, train_sentencepiece, train_wordpiece

DATA = Path(__file__).parents[2] / "shared" / "data"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXTS = [
    "今天天气很好,我们去公园吧。今天晚上再说，好不好？",
    "The quick brown fox jumps over the lazy dog; the dog sleeps.",
    "新华社北京１２月３１日电 GPT-2 模型 iPhone 15 Pro,2024年。",
    "naïve café déjà vu — “引号”……《书名》· 你好 world!",
] * 5
HOSTILE = "[CLS]你[SEP] [PAD][UNK] <s>x</s> <unk><pad> <|endoftext|> [MASK]"
UNICODE = st.text(
    st.one_of(
        st.characters(codec="utf-8"),
        st.sampled_from("的一是不了 thequickbrown,.!?，。　１２３éï[]#\t\n\u2028\ufeff\u200b\x00"),
        st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF),
    ),
    max_size=60,
)


@pytest.fixture(scope="module")
def wordpiece():
    return train_wordpiece(TEXTS, 300)


@pytest.fixture(scope="module")
def bpe():
    return train_sentencepiece(TEXTS, 420)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A tokenizer.json like GPT-2's: no padding token, end-of-text on both sides."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.enable_truncation(5)
    path = tmp_path_factory.mktemp("byte-level") / "tokenizer.json"
    tokenizer.save(str(path))
    return load_tokenizer(path)


@pytest.fixture(params=["wordpiece", "bpe", "byte_level"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def vocabulary(wordpiece, tmp_path_factory) -> Path:
    """The published Chinese vocabulary where it is at hand, else a small one of our own."""
    if (path := DATA / "google_zh_vocab.txt").is_file():
        return path
    folder = tmp_path_factory.mktemp("vocabulary")
    wordpiece.save(folder)
    return folder / "vocab.txt"


@pytest.fixture(scope="module")
def loaded(vocabulary):
    return load_tokenizer(vocabulary)


@pytest.fixture(scope="module")
def reference(vocabulary):
    transformers = pytest.importorskip("transformers")
    ids = {token: index for index, token in enumerate(vocabulary.read_bytes().decode().split("\n")[:-1])}
    try:
        return transformers.BertTokenizer(ids, split_special_tokens=True)
    except TypeError:  # before 5.0 it took the file
        return transformers.BertTokenizer(str(vocabulary), split_special_tokens=True)


def ids_of(tokenizer, text: str) -> list[int]:
    (ids,) = tokenizer.encode_batch([text])
    assert ids.dtype == np.int32
    return ids.tolist()


# One interface for every kind.


def test_text_cannot_produce_a_special_id(tokenizer):
    special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    assert not special & set(ids_of(tokenizer, HOSTILE))


def test_special_ids_are_not_decoded(tokenizer):
    framed = [tokenizer.bos_id, *ids_of(tokenizer, "你好"), tokenizer.eos_id]
    assert tokenizer.decode(np.array(framed)) == "你好"


def test_ids_fit_the_vocabulary_and_an_empty_text_has_none(tokenizer):
    assert all(0 <= token < tokenizer.vocab_size for text in [*TEXTS, HOSTILE] for token in ids_of(tokenizer, text))
    assert ids_of(tokenizer, "") == []
    assert tokenizer.encode_batch([]) == []


def test_a_saved_tokenizer_is_the_same_when_loaded(tokenizer, tmp_path):
    tokenizer.save(tmp_path, model_max_length=64)
    loaded = load_tokenizer(tmp_path)
    names = ("fingerprint", "vocab_size", "bos_id", "eos_id", "pad_id", "unk_id")
    assert [getattr(loaded, name) for name in names] == [getattr(tokenizer, name) for name in names]
    for text in [*TEXTS, HOSTILE]:
        assert ids_of(loaded, text) == ids_of(tokenizer, text)
    assert json.loads((tmp_path / "tokenizer_config.json").read_bytes())["model_max_length"] == 64


def test_transformers_loads_a_saved_folder_with_the_same_ids(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert loaded(text)["input_ids"] == [tokenizer.bos_id, *ids_of(tokenizer, text)]
    assert set(loaded(TEXTS[0])) == {"input_ids", "attention_mask"}
    assert (loaded.bos_token_id, loaded.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert loaded.pad_token_id == tokenizer.pad_id
    decoded = loaded.decode([*ids_of(tokenizer, TEXTS[0]), tokenizer.eos_id], skip_special_tokens=True)
    assert decoded == tokenizer.decode(ids_of(tokenizer, TEXTS[0]))


# WordPiece.


@settings(max_examples=40)
@given(texts=st.lists(UNICODE, min_size=1, max_size=20))
def test_wordpiece_ids_are_those_of_transformers(loaded, reference, texts):
    expected = reference(texts, add_special_tokens=False)["input_ids"]
    assert [ids.tolist() for ids in loaded.encode_batch(texts)] == expected


@pytest.mark.parametrize("text", [HOSTILE, "x" * 100 + " " + "x" * 101, "a\u2028b", "ÀÉÎ", "𠀀a字b"])
def test_wordpiece_ids_are_those_of_transformers_on_known_traps(loaded, reference, text):
    assert ids_of(loaded, text) == reference.encode(text, add_special_tokens=False)


@pytest.mark.skipif(not DATA.is_dir(), reason="needs real text")
def test_wordpiece_ids_are_those_of_transformers_on_real_text(loaded, reference):
    lines = (DATA / "CLUECorpusSmall_sampled.txt").read_bytes().decode().split("\n")[:400]
    expected = reference(lines, add_special_tokens=False)["input_ids"]
    assert [ids.tolist() for ids in loaded.encode_batch(lines)] == expected


def test_decoded_chinese_has_no_blanks_and_english_keeps_them(wordpiece):
    text = "今天 the dog 很好,the fox jumps。"
    assert wordpiece.decode(ids_of(wordpiece, text)) == "今天the dog很好, the fox jumps。"


def test_lower_casing_can_be_turned_off_and_is_remembered(tmp_path):
    cased = train_wordpiece(["The Dog"] * 3, 100, lowercase=False)
    cased.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.decode(ids_of(loaded, "The Dog")) == "The Dog"
    assert loaded.fingerprint == cased.fingerprint
    assert load_tokenizer(tmp_path / "vocab.txt", lowercase=True).fingerprint != cased.fingerprint


def test_a_vocabulary_is_split_on_line_feeds_only_and_copied_byte_for_byte(tmp_path):
    content = "\n".join([*SPECIAL, "a", "\u2028", "", "b"]).encode() + b"\n"
    (tmp_path / "vocab.txt").write_bytes(content)
    tokenizer = load_tokenizer(tmp_path / "vocab.txt")
    assert tokenizer.vocab_size == 9
    assert ids_of(tokenizer, "b a") == [8, 5]
    tokenizer.save(tmp_path)
    assert (tmp_path / "vocab.txt").read_bytes() == content


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the published vocabulary")
def test_the_published_chinese_vocabulary_has_its_known_ids():
    tokenizer = load_tokenizer(DATA / "google_zh_vocab.txt")
    assert tokenizer.vocab_size == 21128
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 100, 101, 102)


@pytest.mark.parametrize(
    ("content", "what", "line"),
    [
        (b"\xef\xbb\xbf[PAD]\n[UNK]\n[CLS]\n[SEP]\n", "byte order mark", ":1"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\na\nb\na\n", "'a' twice in the vocabulary, first in line 5", ":7"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n\xff\n", "0xFF", ":5"),
        (b"[PAD]\r\n[UNK]\r\n[CLS]\r\n[SEP]\r\n", "carriage return", ":1"),
        (b"[PAD]\n[UNK]\n[SEP]\n\n\n", "twice", ":5"),
        (b"[PAD]\n[SEP]\na\n", r"vocabulary without \[UNK\] \[CLS\]", ""),
        (b"", "vocabulary without", ""),
    ],
)
def test_a_doubtful_vocabulary_is_refused_with_its_line(tmp_path, content, what, line):
    path = tmp_path / "vocab.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=what) as error:
        load_tokenizer(path)
    assert error.value.exit_code == ExitCode.DATA
    assert error.value.where == f"{path}{line}"


def test_trained_wordpiece_starts_with_special_tokens_and_frequent_characters(tmp_path):
    tokenizer = train_wordpiece(["的的的的 banana banana 一一 once 罕"], 100)
    tokenizer.save(tmp_path)
    tokens = (tmp_path / "vocab.txt").read_text().splitlines()
    assert tokens[:5] == SPECIAL
    assert tokens[5:10] == ["##a", "##n", "的", "b", "一"]
    assert tokens[10:] == ["##an", "##ana", "##anana", "banana"]
    assert tokenizer.decode(ids_of(tokenizer, "banana bana")) == "banana bana"
    assert ids_of(tokenizer, "罕") == [tokenizer.unk_id]


def test_trained_wordpiece_keeps_to_its_size_and_does_not_depend_on_order():
    sizes = [train_wordpiece(TEXTS, size).vocab_size for size in (10, 60, 100_000)]
    assert sizes[:2] == [10, 60]
    assert sizes[2] < 1000
    assert train_wordpiece(TEXTS[::-1], 150).fingerprint == train_wordpiece(TEXTS, 150).fingerprint


# SentencePiece.


@settings(max_examples=300)
@given(text=UNICODE)
def test_sentencepiece_round_trips_any_text(bpe, text):
    assume("▁" not in text)  # what SentencePiece itself writes for a blank
    assert bpe.decode(ids_of(bpe, text)) == text


@settings(max_examples=300)
@given(text=UNICODE)
def test_exported_bpe_gives_the_ids_of_sentencepiece(bpe, exported_bpe, text):
    assert exported_bpe.encode(text, add_special_tokens=False) == ids_of(bpe, text)


@pytest.fixture(scope="module")
def exported_bpe(bpe, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bpe")
    bpe.save(folder)
    return transformers.AutoTokenizer.from_pretrained(folder, split_special_tokens=True)


@pytest.mark.skipif(not DATA.is_dir(), reason="needs real text")
@pytest.mark.parametrize(("model_type", "vocab_size", "differing"), [("bpe", 4000, 0), ("unigram", 4000, 2)])
def test_exported_sentencepiece_gives_the_same_ids_on_real_text(tmp_path, model_type, vocab_size, differing):
    transformers = pytest.importorskip("transformers")
    lines = (DATA / "CLUECorpusSmall_sampled.txt").read_bytes().decode().split("\n")[:500]
    tokenizer = train_sentencepiece(lines, vocab_size, model_type)
    tokenizer.save(tmp_path)
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path)(lines, add_special_tokens=False)["input_ids"]
    ids = [row.tolist() for row in tokenizer.encode_batch(lines)]
    # Unigram may break ties between repeated characters another way.
    assert sum(ours != theirs for ours, theirs in zip(ids, exported, strict=True)) <= differing


@pytest.mark.skipif(not DATA.is_dir(), reason="needs a published model")
def test_a_published_model_is_read_and_exported(tmp_path):
    tokenizer = load_tokenizer(DATA / "cluecorpussmall_spm.model")
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2, 3)
    tokenizer.save(tmp_path)
    transformers = pytest.importorskip("transformers")
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path)
    lines = (DATA / "CLUECorpusSmall_sampled.txt").read_bytes().decode().split("\n")[:200]
    theirs = exported(lines, add_special_tokens=False)["input_ids"]
    same = [ours.tolist() == ids for ours, ids in zip(tokenizer.encode_batch(lines), theirs, strict=True)]
    assert sum(same) >= 198


def test_sentencepiece_training_gives_the_same_model_each_time(bpe):
    assert train_sentencepiece(TEXTS, 420).fingerprint == bpe.fingerprint


def test_a_vocabulary_that_does_not_suit_the_text_says_which_size_would():
    with pytest.raises(UserError, match=r"take at most \d+") as error:
        train_sentencepiece(TEXTS, 50_000)
    assert error.value.exit_code == ExitCode.DATA
    with pytest.raises(UserError, match=r"take more than \d+"):
        train_sentencepiece(TEXTS, 270)


@pytest.mark.parametrize("train", [train_wordpiece, train_sentencepiece])
def test_training_on_no_text_is_an_error_and_errors_of_the_corpus_arrive(train):
    with pytest.raises(UserError, match="no text"):
        train([], 100)

    def damaged():
        yield "text"
        raise UserError(ExitCode.DATA, "not UTF-8", "file.txt:7", "mend it")

    with pytest.raises(UserError, match=r"file\.txt:7"):
        train(damaged(), 100)


# Files of any kind.


def saved(folder: Path, tokenizer: Tokenizer) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_a_model_that_holds_its_special_tokens_as_pieces_does_not_let_them_out(tmp_path):
    pieces = {token: index for index, token in enumerate(["<s>", "</s>", "<unk>", "a"])}
    backend = Tokenizer(models.WordLevel(pieces, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<s>", "</s>", "<unk>"])
    tokenizer = load_tokenizer(saved(tmp_path, backend))
    assert ids_of(tokenizer, "a <s> a </s>") == [3, 3]


def test_a_tokenizer_without_begin_and_end_is_refused(tmp_path):
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(UserError, match="without begin and end of document") as error:
        load_tokenizer(saved(tmp_path, backend))
    assert error.value.exit_code == ExitCode.DATA


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\x00garbage", b"[" * 100_000, b'{"added_tokens": 5}'])
def test_a_damaged_file_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path)
    assert error.value.exit_code == ExitCode.DATA
    assert str(tmp_path / name) in error.value.where


def test_a_path_without_a_tokenizer_says_what_to_give(tmp_path):
    expected = {tmp_path: ExitCode.NO_INPUT, tmp_path / "missing": ExitCode.NO_INPUT, Path(__file__): ExitCode.DATA}
    for path, code in expected.items():
        with pytest.raises(UserError, match=r"give a vocab\.txt") as error:
            load_tokenizer(path)
        assert error.value.exit_code == code


def test_the_fingerprint_does_not_depend_on_the_layout_of_the_file(byte_level, tmp_path):
    byte_level.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()), indent=None, sort_keys=True))
    assert load_tokenizer(path).fingerprint == byte_level.fingerprint
    spec = json.loads(path.read_bytes())
    spec["model"]["vocab"]["!"], spec["model"]["vocab"]['"'] = spec["model"]["vocab"]['"'], spec["model"]["vocab"]["!"]
    path.write_text(json.dumps(spec))
    assert load_tokenizer(path).fingerprint != byte_level.fingerprint


def test_a_tokenizer_spec_is_what_the_library_writes():
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    assert tokenizer_spec(backend)["model"]["vocab"] == {"a": 0}


# Samples.


def test_a_sample_is_about_as_large_as_asked_and_the_same_each_time(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{index:09d}\n" for index in range(4000)))
    units = corpus_units([str(path)], unit_bytes=1000)
    assert len(list(sample_documents(units, 10**9))) == 4000
    sample = list(sample_documents(units, 10_000))
    assert 850 < len(sample) < 1150
    assert sample == list(sample_documents(corpus_units([str(path)]), 10_000))


def test_coverage_counts_characters_a_token_and_the_share_of_unknown_ones(wordpiece):
    coverage = measure(wordpiece, ["今天罕"])
    assert (coverage.characters_per_token, coverage.unknown_rate) == (1.0, 1 / 3)
