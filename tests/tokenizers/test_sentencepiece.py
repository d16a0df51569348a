"""SentencePiece tokenizers and their exported folders give the ids of the `sentencepiece` package."""

import io
import unicodedata

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from support.tokenizer_texts import DATA, NAMES, TEXTS, UNICODE, ids_of, needs_data, real_lines

from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.tokenizers.sentencepiece import SentencePieceTokenizer
from gpt2_flax.tokenizers.tokenizer import load_tokenizer
from gpt2_flax.tokenizers.train import train_sentencepiece

# Repetitions longer than any piece, with tied segmentations.
REPEATED = ["好" * count + "啊" * (count % 7) + "今天" * (count % 3) for count in range(1, 120)]
OTHERS = ["Việt が ぱ", "a<sb<sc<sd<se>>"] * 5  # pieces that normalization makes, and a part of "<s>"
OWN = "<|user|>"
LLAMA = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "user_defined_symbols": [OWN],
    "split_by_unicode_script": False,
}
T5 = {
    "model_type": "unigram",
    "normalization_rule_name": "nmt_nfkc",
    "character_coverage": 1.0,
    "pad_id": 0,
    "eos_id": 1,
    "unk_id": 2,
    "bos_id": -1,
    "user_defined_symbols": [OWN, "天e"],
}
CHARACTERS = {"model_type": "char", "byte_fallback": False, "remove_extra_whitespaces": True}  # the rest as LLAMA


def trained(**options) -> SentencePieceTokenizer:
    """Return a model trained by the `sentencepiece` package with these options."""
    model = io.BytesIO()
    lines = iter([*TEXTS, *REPEATED, *OTHERS])
    SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, minloglevel=2, **options)
    return SentencePieceTokenizer(model.getvalue(), "test")


def may_join(character: str) -> bool:
    """Return whether a character may form a cluster with its neighbours."""
    category = unicodedata.category(character)
    return category[0] == "M" or category in ("Cf", "Sk", "Lm") or (category == "Lo" and not "一" <= character <= "鿿")


def processor_of(tokenizer, folder) -> SentencePieceProcessor:
    tokenizer.save(folder)
    return SentencePieceProcessor(model_file=str(folder / "spiece.model"))


def exported(tokenizer, folder):
    """Save a tokenizer and load it with AutoTokenizer, which reads names of special tokens as text."""
    transformers = pytest.importorskip("transformers")
    tokenizer.save(folder)
    return transformers.AutoTokenizer.from_pretrained(folder, split_special_tokens=True)


@pytest.fixture(scope="module", params=["bpe", "unigram", "char"])
def ours(request):
    """A model trained here."""
    return train_sentencepiece([*TEXTS, *REPEATED], 380, request.param)


@pytest.fixture(scope="module")
def package(ours, tmp_path_factory):
    return processor_of(ours, tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def folder(ours, tmp_path_factory):
    return exported(ours, tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module", params=["llama", "characters", "t5"])
def theirs(request):
    """A model with the options of a published model."""
    options = {"llama": LLAMA, "characters": LLAMA | CHARACTERS, "t5": T5}[request.param]
    return trained(**options, vocab_size={"llama": 430, "characters": 110, "t5": 132}[request.param])


@pytest.fixture(scope="module")
def their_package(theirs, tmp_path_factory):
    return processor_of(theirs, tmp_path_factory.mktemp("their-package"))


@pytest.fixture(scope="module")
def their_folder(theirs, tmp_path_factory):
    kind = "t5" if theirs.bos_id == theirs.eos_id else "llama"
    return exported(theirs, tmp_path_factory.mktemp(kind))


# Ids equal the ids of the package.


@pytest.mark.slow
@settings(max_examples=150)
@given(texts=st.lists(UNICODE, max_size=8))
def test_ids_are_those_of_the_package(ours, package, texts):
    assert [ids.tolist() for ids in ours.encode_batch(texts)] == [package.encode(text) for text in texts]


@settings(max_examples=50)
@given(texts=st.lists(UNICODE, max_size=8))
def test_ids_of_a_given_model_are_those_of_the_package(theirs, their_package, texts):
    assert [ids.tolist() for ids in theirs.encode_batch(texts)] == [their_package.encode(text) for text in texts]


@needs_data
def test_ids_are_those_of_the_package_on_real_text(ours, package):
    lines = real_lines(1000)
    assert [ids.tolist() for ids in ours.encode_batch(lines)] == package.encode(lines)


@settings(max_examples=150)
@given(text=UNICODE)
def test_any_text_comes_back(ours, text):
    assume("▁" not in text)  # what SentencePiece itself writes for a blank
    assert ours.decode(ids_of(ours, text)) == text


# The ids of exported folders do too.


@settings(max_examples=150)
@given(text=UNICODE)
@example(" ".join(NAMES) + "".join(NAMES))
def test_exported_ids_are_those_of_sentencepiece(ours, folder, text):
    assert folder.encode(text, add_special_tokens=False) == ids_of(ours, text)


def test_exported_ids_are_those_of_sentencepiece_where_segmentations_are_tied(ours, folder):
    texts = [*REPEATED, "".join(REPEATED)]
    assert folder(texts, add_special_tokens=False)["input_ids"] == [ids.tolist() for ids in ours.encode_batch(texts)]


@needs_data
def test_exported_ids_are_those_of_sentencepiece_on_real_text(ours, folder):
    lines = real_lines(1000)
    texts = [*lines, "\n".join(lines)]
    assert folder(texts, add_special_tokens=False)["input_ids"] == [ids.tolist() for ids in ours.encode_batch(texts)]


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_models_of_real_text_are_exported_exactly(tmp_path, model_type):
    lines = real_lines(600)
    tokenizer = train_sentencepiece(lines, 3500, model_type)
    theirs = exported(tokenizer, tmp_path)([*lines, "\n".join(lines)], add_special_tokens=False)["input_ids"]
    assert theirs == [ids.tolist() for ids in tokenizer.encode_batch([*lines, "\n".join(lines)])]


@settings(max_examples=100)
@given(text=UNICODE)
@example(f" {OWN} a  {OWN}b{OWN}{OWN} ")
@example("天e今天e")
@example("x<s>")
@example("▁ a ▁")
@example("  ")
def test_exported_ids_of_a_given_model_are_those_of_sentencepiece(theirs, their_folder, text):
    assume(text != OWN)  # see sentencepiece.py for the exceptions
    if "t5" in their_folder.name_or_path:
        assume(not any(map(may_join, text)))
    assert their_folder.encode(text, add_special_tokens=False) == ids_of(theirs, text)


def test_accents_on_their_own_are_composed_as_in_sentencepiece(theirs, their_folder):
    for text in ("Tiếng Việt", "한국어는", "が ぱ", "déjà Å"):
        apart = unicodedata.normalize("NFD", text)
        assert their_folder.encode(apart, add_special_tokens=False) == ids_of(theirs, apart)


def test_exported_folders_decode_alike(theirs, their_folder):
    for text in [*TEXTS, "  a  b ", "▁ a", OWN, f"a {OWN} b"]:
        ids = ids_of(theirs, text)
        assert their_folder.decode([theirs.bos_id, *ids], skip_special_tokens=True) == theirs.decode(ids)


@pytest.fixture(scope="module")
def published():
    if not (path := DATA / "cluecorpussmall_spm.model").is_file():
        pytest.skip("needs a published model")
    return load_tokenizer(path)


def test_a_published_model_is_read(published):
    assert (published.pad_id, published.unk_id, published.bos_id, published.eos_id) == (0, 1, 2, 3)
    lines, package = real_lines(1000), SentencePieceProcessor(model_file=str(DATA / "cluecorpussmall_spm.model"))
    assert [ids.tolist() for ids in published.encode_batch(lines)] == package.encode(lines)


@pytest.mark.slow
def test_a_published_unigram_is_exported_but_for_ties(published, tmp_path):
    lines = real_lines(1000)
    theirs = exported(published, tmp_path)(lines, add_special_tokens=False)["input_ids"]
    differing = [ours.tolist() != ids for ours, ids in zip(published.encode_batch(lines), theirs, strict=True)]
    assert sum(differing) <= 1


# What a model must have.


def test_a_model_without_a_begin_of_document_uses_its_end():
    tokenizer = trained(**T5, vocab_size=132)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == (1, 1, 0, 2)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"eos_id": -1}, "without end of document"),
        ({"model_type": "word"}, "unknown kind"),
        ({"treat_whitespace_as_suffix": True}, "unknown kind"),
    ],
)
def test_a_model_that_does_not_suit_is_refused(options, what):
    with pytest.raises(UserError, match=what) as error:
        trained(**{"model_type": "bpe", "vocab_size": 180, "hard_vocab_limit": False} | options)
    assert (error.value.exit_code, error.value.where) == (ExitCode.DATA, "test")
