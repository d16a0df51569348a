"""Tests of all kinds of tokenizers, and of WordPiece and `tokenizer.json` against their references."""

import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tokenizer_texts import DATA, HOSTILE, TEXTS, UNICODE, ids_of, needs_data, real_lines
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.tokenizers.tokenizer import load_tokenizer
from gpt2_flax.tokenizers.tokenizer_json import tokenizer_spec
from gpt2_flax.tokenizers.train import train_sentencepiece, train_wordpiece
from gpt2_flax.tokenizers.wordpiece import WordPieceTokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="module")
def wordpiece():
    return train_wordpiece(TEXTS, 300)


@pytest.fixture(scope="module")
def byte_level_file(tmp_path_factory) -> Path:
    """A tokenizer.json like GPT-2's: no padding token, end-of-text on both sides."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.enable_truncation(5)
    path = tmp_path_factory.mktemp("byte-level") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def byte_level(byte_level_file):
    return load_tokenizer(byte_level_file)


@pytest.fixture(scope="module", params=["wordpiece", "cased", "bpe", "unigram", "char", "byte_level"])
def tokenizer(request):
    if request.param in ("wordpiece", "byte_level"):
        return request.getfixturevalue(request.param)
    if request.param == "cased":
        return train_wordpiece(TEXTS, 300, lowercase=False)
    return train_sentencepiece(TEXTS, 350, request.param)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder, model_max_length=64)
    return folder


@pytest.fixture(scope="module")
def exported(folder):
    """The tokenizer that `transformers` loads from the folder, which reads names of special tokens as text."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder, split_special_tokens=True, model_max_length=2**30)


@pytest.fixture(scope="module")
def vocabulary(wordpiece, tmp_path_factory) -> Path:
    """The published Chinese vocabulary if it is available, otherwise a small vocabulary trained here."""
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


# One interface for every kind.


@settings(max_examples=60)
@given(text=UNICODE)
def test_text_cannot_produce_a_special_id(tokenizer, text):
    special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    assert not special & set(ids_of(tokenizer, text + HOSTILE))


def test_special_ids_are_not_decoded(tokenizer):
    framed = [tokenizer.bos_id, *ids_of(tokenizer, "你好"), tokenizer.eos_id]
    assert tokenizer.decode(np.array(framed)) == "你好"


def test_ids_fit_the_vocabulary_and_an_empty_text_has_none(tokenizer):
    assert all(0 <= token < tokenizer.vocab_size for text in [*TEXTS, HOSTILE] for token in ids_of(tokenizer, text))
    assert ids_of(tokenizer, "") == []
    assert len(tokenizer.encode_batch([])) == 0


def test_texts_of_a_batch_do_not_touch_each_other(tokenizer):
    texts = ["", *TEXTS[:4], "", HOSTILE, ""]
    encoded = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in encoded] == [ids_of(tokenizer, text) for text in texts]
    assert encoded.lengths_B.tolist() == [len(ids) for ids in encoded]


def test_a_saved_tokenizer_is_the_same_when_loaded(tokenizer, folder):
    assert_same(load_tokenizer(folder), tokenizer)
    assert json.loads((folder / "tokenizer_config.json").read_bytes())["model_max_length"] == 64


def test_a_tokenizer_can_be_sent_to_another_process(tokenizer):
    sent = pickle.loads(pickle.dumps(tokenizer))
    assert type(sent) is type(tokenizer)
    assert_same(sent, tokenizer)


def assert_same(one, other):
    names = ("fingerprint", "vocab_size", "bos_id", "eos_id", "pad_id", "unk_id")
    assert [getattr(one, name) for name in names] == [getattr(other, name) for name in names]
    for text in [*TEXTS, HOSTILE]:
        assert ids_of(one, text) == ids_of(other, text)


@settings(max_examples=60)
@given(text=UNICODE)
def test_transformers_loads_a_saved_folder_with_the_same_ids(tokenizer, exported, text):
    assert exported(text)["input_ids"] == [tokenizer.bos_id, *ids_of(tokenizer, text)]


@needs_data
def test_transformers_loads_a_saved_folder_with_the_same_ids_of_real_text(tokenizer, exported):
    lines = real_lines(600)
    expected = [[tokenizer.bos_id, *ids] for ids in tokenizer.encode_batch(lines)]
    assert exported(lines)["input_ids"] == expected


def test_transformers_knows_the_special_tokens_of_a_saved_folder(tokenizer, exported):
    assert set(exported(TEXTS[0])) == {"input_ids", "attention_mask"}
    assert (exported.bos_token_id, exported.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert exported.pad_token_id == (tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id)


@pytest.mark.parametrize("text", [*TEXTS[:4], "鬱 今天鬱", "\n今 天"])
def test_transformers_decodes_alike_and_leaves_out_unknown_tokens(tokenizer, exported, text):
    ids = [*ids_of(tokenizer, text), tokenizer.eos_id]
    assert exported.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


# WordPiece.


@settings(max_examples=40)
@given(texts=st.lists(UNICODE, min_size=1, max_size=20))
def test_wordpiece_ids_are_those_of_transformers(loaded, reference, texts):
    expected = reference(texts, add_special_tokens=False)["input_ids"]
    assert [ids.tolist() for ids in loaded.encode_batch(texts)] == expected


@pytest.mark.parametrize("text", [HOSTILE, "x" * 100 + " " + "x" * 101, "a\u2028b", "ÀÉÎ", "𠀀a字b"])
def test_wordpiece_ids_are_those_of_transformers_on_known_traps(loaded, reference, text):
    assert ids_of(loaded, text) == reference.encode(text, add_special_tokens=False)


@needs_data
def test_wordpiece_ids_are_those_of_transformers_on_real_text(loaded, reference):
    lines = real_lines(800)
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


def test_blanks_behind_tokens_are_cut_off_as_transformers_does(tmp_path):
    tokens = [*SPECIAL, "今", "天", "##气", "a", "\tb", "\u2028", "\u3000"]
    behind = itertools.cycle([" ", "\t", "\u3000", " \t ", "\xa0", "\u2028", ""])
    lines = [token + (blank if token.strip() else "") for token, blank in zip(tokens, behind, strict=False)]
    content = "\n".join(lines) + "\n"
    (tmp_path / "vocab.txt").write_text(content, encoding="utf-8", newline="\n")
    ours, plain = load_tokenizer(tmp_path / "vocab.txt"), WordPieceTokenizer("\n".join(tokens).encode(), "plain")
    texts = ["今天 a", "b 今", "今 天 天气 aa"]
    ids = [row.tolist() for row in ours.encode_batch(texts)]
    assert ids == [row.tolist() for row in plain.encode_batch(texts)]
    assert not any(ours.unk_id in row for row in ids[:1])
    transformers = pytest.importorskip("transformers", "5.0")
    reference = transformers.BertTokenizer.from_pretrained(str(tmp_path))
    assert reference(texts, add_special_tokens=False)["input_ids"] == ids
    ours.save(tmp_path)
    assert (tmp_path / "vocab.txt").read_text(encoding="utf-8") == "\n".join(tokens) + "\n"
    again = load_tokenizer(tmp_path / "vocab.txt")
    assert again.fingerprint == ours.fingerprint
    for saved in (again, load_tokenizer(tmp_path / "tokenizer.json")):
        assert [row.tolist() for row in saved.encode_batch(texts)] == ids
    auto = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert auto(texts, add_special_tokens=False)["input_ids"] == ids


@needs_data
def test_the_published_chinese_vocabulary_has_its_known_ids():
    tokenizer = load_tokenizer(DATA / "google_zh_vocab.txt")
    assert tokenizer.vocab_size == 21128
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 100, 101, 102)


@pytest.mark.parametrize(
    ("content", "what", "line"),
    [
        (b"\xef\xbb\xbf[PAD]\n[UNK]\n[CLS]\n[SEP]\n", "byte order mark", ":1"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\na\nb\na\n", "'a' twice in the vocabulary, first in line 5", ":7"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\na\nb\na \n", "'a' twice in the vocabulary, first in line 5", ":7"),
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


# Files of any kind.


@settings(max_examples=60)
@given(texts=st.lists(UNICODE, max_size=8))
def test_ids_of_a_tokenizer_json_are_those_of_the_tokenizers_package(byte_level, byte_level_file, texts):
    package = Tokenizer.from_file(str(byte_level_file))
    package.no_truncation()
    package.encode_special_tokens = True
    expected = [package.encode(text, add_special_tokens=False).ids for text in texts]
    assert [ids.tolist() for ids in byte_level.encode_batch(texts)] == expected


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
