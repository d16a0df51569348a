"""A tokenizer that cannot be exported exactly is refused before a model is trained with it."""

import io
import json
import random

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from support.tokenizer_texts import TEXTS
from tokenizers import Tokenizer

from gpt2_flax import __main__ as cli
from gpt2_flax.data.prepare import prepare
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.text.corpus import corpus_units
from gpt2_flax.text.documents import CorpusOptions
from gpt2_flax.tokenizers import transformers_check as module
from gpt2_flax.tokenizers.ragged_ids import RaggedIds
from gpt2_flax.tokenizers.sentencepiece import SentencePieceTokenizer
from gpt2_flax.tokenizers.survey import sample_corpus
from gpt2_flax.tokenizers.tokenizer import load_tokenizer
from gpt2_flax.tokenizers.train import train_sentencepiece, train_wordpiece
from gpt2_flax.tokenizers.transformers_check import ODD_TEXTS, SAMPLE_CHARACTERS, SAMPLES, check_exported, spread
from gpt2_flax.tokenizers.wordpiece import WordPieceTokenizer


class Wrong(WordPieceTokenizer):
    """A tokenizer whose ids of texts with a mountain differ from the ids of its saved tokenizer.json."""

    def encode_batch(self, texts):
        return cut(texts, super().encode_batch(texts))

    def __reduce__(self):
        return Wrong, super().__reduce__()[1]


class Tied(SentencePieceTokenizer):
    """As `Wrong`, but a SentencePiece tokenizer, in which a few ties may be broken differently."""

    def encode_batch(self, texts):
        return cut(texts, super().encode_batch(texts))


def cut(texts, encoded):
    rows = [ids[:-1] if "山" in text else ids for text, ids in zip(texts, encoded, strict=True)]
    return RaggedIds.from_arrays(rows, 2**16)


@pytest.fixture(scope="module")
def vocabulary():
    return train_wordpiece([*TEXTS, "山河"] * 2, 300).vocabulary


@pytest.mark.parametrize("kind", ["wordpiece", "cased", "bpe", "unigram", "char"])
def test_tokenizers_made_here_pass(kind, capsys):
    tokenizer = (
        train_wordpiece(TEXTS, 300, lowercase=kind == "wordpiece")
        if kind in ("wordpiece", "cased")
        else train_sentencepiece(TEXTS, 350, kind)
    )
    check_exported(tokenizer, [*TEXTS, "[SEP] <s></s> [CLS]"], "here")
    assert capsys.readouterr().err == ""


def test_one_text_with_other_ids_is_enough_for_a_refusal(vocabulary):
    with pytest.raises(UserError, match=r"other ids .* for '\\u5c71\\u6cb3': here") as error:
        check_exported(Wrong(vocabulary, "test"), ["今天", "山河"], "here")
    assert error.value.exit_code == ExitCode.DATA
    check_exported(Wrong(vocabulary, "test"), ["今天"], "here")


def test_few_ties_of_sentencepiece_are_reported_and_more_are_refused(tmp_path, capsys):
    train_sentencepiece([*TEXTS, "山河"], 350).save(tmp_path)
    tied = Tied((tmp_path / "spiece.model").read_bytes(), "test")
    check_exported(tied, [*["今天"] * 98, "山河", "山"], "here")
    assert "warning: 2 of 100 sample texts get other ids from transformers" in capsys.readouterr().err
    with pytest.raises(UserError, match="other ids"):
        check_exported(tied, [*["今天"] * 97, "山河", "山", "山"], "here")
    assert not any("山" in text for text in ODD_TEXTS)


def test_a_panic_of_the_library_is_one_sentence(vocabulary, monkeypatch):
    class PanicException(BaseException):
        """The exception that pyo3 raises for a panic."""

    def panic(self, folder):
        raise PanicException("AddedVocabulary bad split")

    monkeypatch.setattr(WordPieceTokenizer, "save", panic)
    with pytest.raises(UserError, match=r"cannot be saved for transformers .'AddedVocabulary bad split'") as error:
        check_exported(WordPieceTokenizer(vocabulary, "test"), [], "here")
    assert error.value.exit_code == ExitCode.DATA

    def interrupted(self, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(WordPieceTokenizer, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check_exported(WordPieceTokenizer(vocabulary, "test"), [], "here")


def test_prepare_refuses_and_leaves_nothing(vocabulary, tmp_path):
    (tmp_path / "corpus.txt").write_text("今天天气很好\n一山河\n" * 200 + "好不好\n" * 5)
    with pytest.raises(UserError, match="other ids"):
        prepare([str(tmp_path / "corpus.txt")], Wrong(vocabulary, "test"), tmp_path / "out", unit_bytes=100)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.txt"]


@pytest.mark.parametrize("command", ["tokenizer", "prepare", "import-tokens"])
def test_commands_compare_before_they_publish(command, tmp_path, corpus, tokenizer_folder, monkeypatch, capsys):
    monkeypatch.setattr(module, "ODD_TEXTS", ("很久之前",))
    compare = module.differing_texts
    saved = lambda texts: [[5]] * len(texts)  # noqa: E731
    monkeypatch.setattr(module, "differing_texts", lambda one, other, samples: compare(one, saved, samples))
    options = {
        "tokenizer": (corpus, "--vocab-size", 100),
        "prepare": (corpus, "--tokenizer", tokenizer_folder),
        "import-tokens": (corpus, "--tokenizer", tokenizer_folder),
    }
    with pytest.raises(SystemExit) as ended:
        cli.main([command, *map(str, options[command]), "--output", str(tmp_path / "out")])
    assert ended.value.code == ExitCode.DATA
    assert "error: tokenizer gives other ids once it is saved for transformers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Samples.


def test_samples_come_from_the_whole_corpus_and_are_bounded(tmp_path):
    lines = [f"{index} " + "x" * 30 for index in range(5000)]
    (tmp_path / "corpus.txt").write_text("\n".join([*lines, "y" * 10_000]))
    for unit_bytes in (500, 5000, 50_000, None):
        units = corpus_units([str(tmp_path / "corpus.txt")], unit_bytes=unit_bytes)
        texts = spread(sample_corpus(units).texts)
        assert SAMPLES / 2 <= len(texts) <= 2 * SAMPLES
        numbers = [int(text.split()[0]) for text in texts if "x" in text]
        assert min(numbers) < 100
        assert max(numbers) > 4000
        assert len(set(numbers)) == len(numbers)
        assert max(map(len, texts)) <= SAMPLE_CHARACTERS
    assert spread(["a", "b" * 5000], 5) == ["a", "b" * SAMPLE_CHARACTERS]
    assert spread([]) == []


def test_what_cannot_be_read_is_left_to_what_reads_it_all(tmp_path):
    (tmp_path / "corpus.txt").write_bytes(b"\xff\n")
    assert sample_corpus(corpus_units([str(tmp_path / "corpus.txt")], CorpusOptions(on_error="stop"))).texts == []


# User-defined pieces of SentencePiece that its normalization would change.

OWN = ["\n", "\t", "\n\n", "ＡＢ", "<x>"]


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nfkc", "identity"])
@pytest.mark.parametrize("extra", [True, False])
@pytest.mark.parametrize("kind", ["bpe", "char", "unigram"])
def test_line_ends_that_are_pieces_are_exported_exactly(kind, rule, extra, tmp_path):
    file = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat\there", "今天天气很好,我们去公园吧。", "Ａ full wide ①"] * 30),
        model_writer=file,
        model_type=kind,
        vocab_size=60,
        hard_vocab_limit=False,
        normalization_rule_name=rule,
        remove_extra_whitespaces=extra,
        user_defined_symbols=OWN,
        minloglevel=2,
    )
    tokenizer = SentencePieceTokenizer(file.getvalue(), "test")
    tokenizer.save(tmp_path)
    package = SentencePieceProcessor(model_proto=file.getvalue())
    saved = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    draw = random.Random(0)
    pieces = [*OWN, "a", "t", "he", " ", "  ", "今天", "Ａ", "①", "\r", "。"]
    texts = ["".join(draw.choices(pieces, k=draw.randrange(12))) for _ in range(500)]
    texts = [text for text in texts if text.strip() not in ("", *OWN)]  # see sentencepiece.py for the exception
    for text in texts:
        assert saved.encode(text, add_special_tokens=False).ids == package.encode(text), text
    assert any("\n" in text for text in texts)
    check_exported(tokenizer, texts, "here")


def test_a_dataset_of_such_a_model_holds_its_ids(tmp_path):
    file = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=file, model_type="bpe", vocab_size=150, hard_vocab_limit=False,
        user_defined_symbols=["\n"], minloglevel=2,
    )  # fmt: skip
    (tmp_path / "own.model").write_bytes(file.getvalue())
    records = [json.dumps({"text": f"{text}\n{index}"}) for index, text in enumerate(TEXTS * 5)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(records))
    tokenizer = load_tokenizer(tmp_path / "own.model")
    info = prepare([str(tmp_path / "corpus.jsonl")], tokenizer, tmp_path / "out", validation_fraction=0.2)
    assert sum(shard.documents for shards in info.shards.values() for shard in shards) == len(records)
