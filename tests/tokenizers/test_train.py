"""Training tokenizers on a sample of a corpus."""

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tokenizer_texts import TEXTS, ids_of

from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.text.documents import Documents, Problem
from gpt2_flax.tokenizers.tokenizer import load_tokenizer
from gpt2_flax.tokenizers.train import measure, sample_documents, train_sentencepiece, train_wordpiece

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LINES = [f"{index:09d}" for index in range(4000)]


class Unit(NamedTuple):
    """Documents in memory, as a unit of a corpus."""

    texts: list[str]
    size: int = 10

    def batches(self, report):
        report(Problem("file", 1, "reason", skipped=True))
        half = len(self.texts) // 2
        yield Documents(self.texts[:half], 4)
        yield Documents(self.texts[half:], self.size - 4)


def sample(*units: list[str], training_bytes: int, held_bytes: int):
    return sample_documents([Unit(texts) for texts in units], lambda problem: None, training_bytes, held_bytes)


# Samples.


def test_a_sample_is_as_large_as_asked_and_what_is_held_is_not_trained_on():
    training, held = sample(LINES, training_bytes=9000, held_bytes=900)
    assert (len(training), len(held)) == (1000, 100)
    assert len({*training, *held}) == 1100
    assert {*training, *held} < {*LINES}


def test_a_small_corpus_is_used_whole():
    training, held = sample(LINES, training_bytes=9 * 3950, held_bytes=9 * 50)
    assert sorted(training) == LINES
    assert held == training[:50]
    training, held = sample(["a", "b"], training_bytes=10, held_bytes=10)
    assert sorted(training) == sorted(held) == ["a", "b"]
    assert sample([], training_bytes=10, held_bytes=10) == ([], [])


@given(
    texts=st.lists(st.text(st.sampled_from("ab汉"), min_size=1, max_size=9), max_size=40),
    cut=st.integers(0, 40),
    training_bytes=st.integers(1, 60),
    held_bytes=st.integers(1, 20),
    draw=st.randoms(use_true_random=False),
)
def test_a_sample_does_not_depend_on_order_or_units(texts, cut, training_bytes, held_bytes, draw):
    sizes = {"training_bytes": training_bytes, "held_bytes": held_bytes}
    expected = sample(texts, **sizes)
    shuffled = draw.sample(texts, len(texts))
    assert sample(shuffled[:cut], shuffled[cut:], **sizes) == expected
    n_bytes, trained, held = (sum(len(text.encode()) for text in part) for part in (texts, *expected))
    if n_bytes <= training_bytes + held_bytes:
        assert sorted(expected.training) == sorted(texts)
    else:
        assert trained <= training_bytes + held_bytes
        assert expected.training == expected.held or not {*expected.training} & {*expected.held}
    assert held >= min(held_bytes, trained)


def test_equal_documents_are_held_or_trained_on_together():
    training, held = sample(LINES * 2, training_bytes=9000, held_bytes=900)
    assert (len(training), len(held)) == (1000, 100)
    assert not {*training} & {*held}


def test_a_corpus_of_one_line_repeated_is_sampled():
    training, held = sample(["the same"] * 1000, training_bytes=80, held_bytes=8)
    assert training == held == ["the same"] * 11


def test_a_sample_reads_once_and_passes_problems_on():
    problems, read = [], []

    class Counting(Unit):
        def batches(self, report):
            read.append(self.texts)
            return super().batches(report)

    sample_documents([Counting(["a"]), Counting(["b"])], problems.append)
    assert read == [["a"], ["b"]]
    assert problems == [Problem("file", 1, "reason", skipped=True)] * 2


def test_coverage_counts_characters_a_token_and_the_share_of_unknown_ones():
    wordpiece = train_wordpiece(TEXTS, 300)
    assert measure(wordpiece, ["今天罕"]) == (1.0, 1 / 3)
    assert measure(wordpiece, ["\n", "今"]) == (2.0, 0.0)
    assert measure(wordpiece, []) == (0.0, 0.0)


# WordPiece.


def test_trained_wordpiece_starts_with_special_tokens_and_frequent_characters(tmp_path):
    tokenizer = train_wordpiece(["的的的的 banana banana 一一 once 罕"], 100)
    tokenizer.save(tmp_path)
    tokens = (tmp_path / "vocab.txt").read_text().splitlines()
    assert tokens[:5] == SPECIAL
    assert tokens[5:10] == ["##a", "##n", "的", "b", "一"]
    assert tokens[10:] == ["##an", "##ana", "##anana", "banana"]
    assert tokenizer.decode(ids_of(tokenizer, "banana bana")) == "banana bana"
    assert ids_of(tokenizer, "罕") == [tokenizer.unk_id]


def test_wordpiece_can_be_made_of_characters_alone():
    tokenizer = train_wordpiece(["的的的的 banana banana 一一"], 100, merges=False)
    assert tokenizer.vocab_size == 10
    assert tokenizer.decode(ids_of(tokenizer, "banana")) == "banana"


def test_wordpiece_counts_pairs_that_overlap_themselves(tmp_path):
    # In "aaaa", "##a" and "##a" are neighbours twice, but are joined only once.
    train_wordpiece(["aaaa"] * 3 + ["baab"] * 2, 100).save(tmp_path)
    tokens = (tmp_path / "vocab.txt").read_text().splitlines()
    assert tokens[5:] == ["##a", "a", "##b", "b", "##aa", "##aaa", "aaaa", "##aab", "baab"]


def test_trained_wordpiece_keeps_to_its_size_and_does_not_depend_on_order():
    sizes = [train_wordpiece(TEXTS, size).vocab_size for size in (10, 60, 100_000)]
    assert sizes[:2] == [10, 60]
    assert sizes[2] < 1000
    assert train_wordpiece(TEXTS[::-1], 150).fingerprint == train_wordpiece(TEXTS, 150).fingerprint


# SentencePiece.


@pytest.mark.parametrize("model_type", ["bpe", "unigram", "char"])
def test_sentencepiece_training_gives_the_same_model_each_time(model_type):
    first, second = (train_sentencepiece(TEXTS, 350, model_type) for _ in range(2))
    assert first.fingerprint == second.fingerprint


def test_a_character_model_takes_the_most_frequent_characters_and_bytes_for_the_others():
    tokenizer = train_sentencepiece(TEXTS, 264, "char")
    assert tokenizer.vocab_size == 264
    assert len(ids_of(tokenizer, "eeee")) == 4
    assert tokenizer.decode(ids_of(tokenizer, "罕 今天")) == "罕 今天"
    assert train_sentencepiece(TEXTS, 50_000, "char").vocab_size < 400


def test_a_vocabulary_that_does_not_suit_the_text_says_which_size_would():
    with pytest.raises(UserError, match=r"take at most \d+") as error:
        train_sentencepiece(TEXTS, 50_000)
    assert error.value.exit_code == ExitCode.DATA
    with pytest.raises(UserError, match=r"take more than \d+"):
        train_sentencepiece(TEXTS, 270)


@pytest.mark.parametrize("model_type", ["bpe", "unigram", "char"])
def test_a_vocabulary_without_room_for_a_character_is_refused(model_type):
    with pytest.raises(UserError, match="take more than 260"):
        train_sentencepiece(TEXTS, 260, model_type)


@pytest.mark.parametrize("train", [train_wordpiece, train_sentencepiece])
def test_training_on_no_text_is_an_error_and_errors_of_the_corpus_arrive(train):
    with pytest.raises(UserError, match="no text"):
        train([], 300)

    def damaged():
        yield "text"
        raise UserError(ExitCode.DATA, "not UTF-8", "file.txt:7", "fix it")

    with pytest.raises(UserError, match=r"file\.txt:7"):
        train(damaged(), 300)


def test_a_trained_vocabulary_can_be_loaded(tmp_path):
    for name, tokenizer in {"a": train_wordpiece(TEXTS, 100), "b": train_sentencepiece(TEXTS, 350, "char")}.items():
        (tmp_path / name).mkdir()
        tokenizer.save(tmp_path / name)
        assert load_tokenizer(tmp_path / name).fingerprint == tokenizer.fingerprint
