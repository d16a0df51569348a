"""Evaluation document by document adds up to that of the whole, whatever rows the documents lie in."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from support.encoded_texts import SIMPLIFIED

from gpt2_flax import __main__ as cli
from gpt2_flax.checkpoint.source import Source, save_as_run
from gpt2_flax.checkpoint.weights import weights_of
from gpt2_flax.config.model import ModelConfig
from gpt2_flax.data.dataset import TokenDataset
from gpt2_flax.data.prepare import prepare
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.inference.evaluate import evaluate_source
from gpt2_flax.model.gpt2 import GPT2
from gpt2_flax.text import documents
from gpt2_flax.text.documents import CorpusOptions
from gpt2_flax.tokenizers.tokenizer import load_tokenizer

OPTIONS = CorpusOptions()


def make_source(tokenizer_folder, **changes):
    vocab_size = load_tokenizer(tokenizer_folder).vocab_size
    dropouts = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    sizes = {"vocab_size": vocab_size, "n_positions": 32, "n_layer": 2, "n_head": 2, "n_embd": 32}
    config = ModelConfig(**sizes | dropouts | changes, initializer_range=0.3, dtype="float32")
    model = jax.jit(lambda: GPT2(config, rngs=nnx.Rngs(1)))()
    weights = {path: np.asarray(value) for path, value in weights_of(model).items()}
    return Source("a test", config, weights, tokenizer_folder)


@pytest.fixture(scope="module")
def source(tokenizer_folder):
    return make_source(tokenizer_folder)


def each(source, data, output, seq_length=16, part=None, options=OPTIONS):
    """The whole, and the lines of the file."""
    found = evaluate_source(source, str(data), seq_length, 8, 0, options, part, output)
    return found, [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def assert_adds_up(lines, whole):
    assert sum(line["tokens"] for line in lines) == whole.tokens
    nats = sum(line["loss"] * line["tokens"] for line in lines)
    assert nats == pytest.approx(whole.nats, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("across", [False, True])
def test_documents_of_a_text_add_up_to_it(tokenizer_folder, corpus, tmp_path, across):
    source = make_source(tokenizer_folder, attend_across_documents=across)
    whole = evaluate_source(source, str(corpus), 16, 8, 0, OPTIONS)
    found, lines = each(source, corpus, tmp_path / "documents.jsonl")
    assert_adds_up(lines, whole)
    assert found.nats == pytest.approx(whole.nats, rel=1e-5)
    assert (found.tokens, found.correct, found.characters) == (whole.tokens, whole.correct, whole.characters)
    texts = corpus.read_text(encoding="utf-8").splitlines()
    assert [line["characters"] for line in lines] == [len(text) for text in texts]
    assert [line["index"] for line in lines] == list(range(len(texts)))
    assert {line["data"] for line in lines} == {str(corpus)}
    for line in lines:
        assert line["perplexity"] == pytest.approx(math.exp(line["loss"]))
        bits = line["loss"] * line["tokens"] / math.log(2)
        assert line["bits_per_character"] == pytest.approx(bits / line["characters"])


@pytest.mark.slow
def test_a_document_has_the_loss_that_it_has_alone(source, tmp_path):
    texts = ["这是很久之前的事情了", "我们在北京看见一只大鸟", "好", "山河人说好天水火木金土日月年时书车马" * 3]
    (tmp_path / "all.txt").write_text("\n".join(texts), encoding="utf-8")
    for seq_length in (32, 7):
        _, lines = each(source, tmp_path / "all.txt", tmp_path / f"{seq_length}.jsonl", seq_length)
        for number, text in enumerate(texts[:3]):
            (tmp_path / "one.txt").write_text(text, encoding="utf-8")
            alone = evaluate_source(source, str(tmp_path / "one.txt"), 32, 8, 0, OPTIONS)
            assert lines[number]["tokens"] == alone.tokens == len(text) + 1
            if seq_length == 32 and number < 2:  # wholly in the first row
                assert lines[number]["loss"] == pytest.approx(alone.loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["train", "validation"])
def test_either_split_of_a_dataset_is_evaluated(source, dataset_folder, tmp_path, part):
    whole = evaluate_source(source, str(dataset_folder), 16, 8, 0, OPTIONS, part)
    split = getattr(TokenDataset(dataset_folder), part)
    assert whole.tokens == split.n_tokens - split.n_documents
    found, lines = each(source, dataset_folder, tmp_path / "documents.jsonl", part=part)
    assert_adds_up(lines, whole)
    assert [line["tokens"] for line in lines] == [len(ids) - 1 for ids in split.documents()]
    assert {line["characters"] for line in lines} == {line["bits_per_character"] for line in lines} == {None}
    assert found.bits_per_character == pytest.approx(whole.bits_per_character, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["best_fit", "document"])
def test_documents_are_found_in_rows_of_any_packing(config, dataset_folder, source, tmp_path, packing):
    run = config.model_copy(update={"data": config.data.model_copy(update={"packing": packing})})
    of_run = Source("a test", source.model, source.weights, source.tokenizer_folder, run)
    whole = evaluate_source(of_run, None, 16, 8, 0, OPTIONS)
    evaluate_source(of_run, None, 16, 8, 0, OPTIONS, per_document=tmp_path / "documents.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "documents.jsonl").read_text().splitlines()]
    assert_adds_up(lines, whole)
    if packing == "best_fit":
        documents = TokenDataset(dataset_folder).validation.documents()
        assert [line["tokens"] for line in lines] == [len(ids) - 1 for ids in documents]


def test_long_documents_and_those_without_tokens_are_counted_as_they_were_prepared(source, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "SLICE_CHARACTERS", 20)
    monkeypatch.setattr(documents, "BATCH_CHARACTERS", 30)
    texts = ["这是很久之前的事情了" * 9, "\u0001", "好", "我们" * 40, "\u0001\u0002"]
    (tmp_path / "all.txt").write_text("\n".join(texts), encoding="utf-8")
    _, lines = each(source, tmp_path / "all.txt", tmp_path / "documents.jsonl")
    assert [line["characters"] for line in lines] == [90, 1, 80]
    assert [line["tokens"] for line in lines] == [91, 2, 81]


def test_json_lines_are_documents_too(source, tmp_path):
    records = [{"text": "这是\n很久"}, {"text": "好"}]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    _, lines = each(source, tmp_path / "all.jsonl", tmp_path / "documents.jsonl")
    assert [line["characters"] for line in lines] == [5, 1]


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16"])
def test_a_text_in_any_encoding_is_the_same_text(source, corpus, tmp_path, capsys, encoding):
    # In fluent Chinese: the detector of GB18030 is not sure of a text of 40 characters in circles.
    text = "\n".join(SIMPLIFIED)
    found = []
    for name in ("utf-8", encoding):
        (tmp_path / f"{name}.txt").write_text(text, encoding=name)
        found.append(each(source, tmp_path / f"{name}.txt", tmp_path / f"{name}.jsonl"))
    (whole, lines), (again, lines_again) = found
    assert again == whole
    assert [line["loss"] for line in lines] == [line["loss"] for line in lines_again]
    assert "read 1 file as" in capsys.readouterr().out


def test_what_makes_no_sense_is_refused(source, corpus, dataset_folder, tmp_path):
    there = tmp_path / "there.jsonl"
    there.touch()
    refused = [
        ({"data": str(corpus), "split_name": "train"}, ExitCode.USAGE, "--split is for datasets"),
        ({"data": str(corpus), "per_document": there}, ExitCode.CANT_CREATE, "output exists"),
        (
            {"data": str(corpus), "per_document": there, "n_batches": 1},
            ExitCode.USAGE,
            "--per-document reads everything",
        ),
    ]
    for arguments, code, what in refused:
        with pytest.raises(UserError, match=what) as error:
            evaluate_source(source, **{"seq_length": 16, "n_rows": 8, "n_batches": 0, "options": OPTIONS} | arguments)
        assert error.value.exit_code == code


@pytest.mark.slow
def test_the_command_writes_the_file_and_prints_the_whole(source, tokenizer_folder, corpus, tmp_path, capsys):
    save_as_run(source, tmp_path / "run")
    prepare([str(corpus)], load_tokenizer(tokenizer_folder), tmp_path / "data", validation_fraction=0.2)
    output = tmp_path / "documents.jsonl"
    arguments = ["evaluate", str(tmp_path / "run"), "--data", str(tmp_path / "data"), "--split", "train"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--per-document", str(output)])
    assert ended.value.code == 0
    tokens = sum(json.loads(line)["tokens"] for line in Path(output).read_text().splitlines())
    assert f"tokens {tokens:,}\n" in capsys.readouterr().out
