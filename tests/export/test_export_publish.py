"""A run is published with what is known of it, and proved on its own texts."""

import dataclasses
import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from support.configs import changed
from support.documents import blocks
from support.weight_folders import random_weights

from gpt2_flax.checkpoint.source import Source
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.export import publish as publish_module
from gpt2_flax.export import transformers_folder, verify
from gpt2_flax.export.model_card import CardFacts, model_card
from gpt2_flax.export.publish import publish
from gpt2_flax.tokenizers.sentencepiece import SentencePieceTokenizer
from gpt2_flax.tokenizers.tokenizer import load_tokenizer
from gpt2_flax.tokenizers.train import train_sentencepiece
from gpt2_flax.tokenizers.transformers_check import ODD_TEXTS

PROMPT = "这是很久之前的事情了"
METRICS = {"train/loss": 3.5, "validation/loss": 3.25, "validation/bits_per_character": 4.75}


@pytest.fixture
def source(config, tokenizer_folder):
    size = load_tokenizer(tokenizer_folder).vocab_size
    config = changed(config, training__prompts=[PROMPT], model__vocab_size=size)
    return Source("a run", config.model, random_weights(config.model), tokenizer_folder, config, 6, METRICS)


def card_of(folder) -> tuple[dict, str]:
    _, header, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(header), text


@pytest.mark.slow
def test_a_run_is_published_with_all_that_is_known(source, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "more.md").write_text("## Thanks\n\nTo 所有人.\n\n", encoding="utf-8")
    verification = publish(
        source,
        tmp_path / "out",
        dtype="bfloat16",
        card_extra=tmp_path / "more.md",
        name="A model",
        language="zh",
        license="mit",
        datasets=("someone/corpus",),
        hardware="one small computer",
        prompt=None,
    )
    header, text = card_of(tmp_path / "out")
    assert header == {
        "language": "zh",
        "license": "mit",
        "datasets": ["someone/corpus"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gpt2"],
        "widget": [{"text": PROMPT}],
    }
    for part in (
        "stored for `transformers`, in bfloat16",
        "| steps | 6 |",
        "| tokens trained on | 1,536 |",
        "| hardware | one small computer |",
        "| training loss | 3.5 |",
        "| validation bits per character | 4.75 |",
        " documents, ",
        "\n## Thanks\n\nTo 所有人.\n\n## Checked\n",
        str(verification),
    ):
        assert part in text
    assert verification.texts > 30, "documents that were kept from training, too"
    assert verification.new_tokens > 0
    assert f"token ids of {verification.texts} texts are the same" in text


@pytest.mark.slow
def test_a_run_without_its_dataset_is_published_without_its_counts(source, tmp_path):
    pytest.importorskip("transformers")
    gone = changed(source.config, data__dataset=str(tmp_path / "gone"))
    verification = publish(dataclasses.replace(source, config=gone), tmp_path / "out", name="A model")
    assert verification.texts == len(ODD_TEXTS)
    assert "## Training data" not in card_of(tmp_path / "out")[1]


@pytest.mark.slow
def test_the_run_says_what_it_was_trained_on(source, tmp_path):
    trained = dataclasses.replace(source, hardware="8 x TPU v5 lite")
    publish(trained, tmp_path / "out", name="A model")
    assert "| hardware | 8 x TPU v5 lite |" in card_of(tmp_path / "out")[1]


def test_samples_are_spread_over_the_validation_documents(source, dataset_folder, tokenizer_folder, corpus, tmp_path):
    tokenizer = load_tokenizer(tokenizer_folder)
    datasets = Mixture(source.config.data.datasets).datasets
    split = next(iter(datasets.values())).validation
    texts = publish_module.sample_texts(datasets, tokenizer)
    assert len(texts) == split.n_documents < 200
    assert set(texts) <= set(corpus.read_text(encoding="utf-8").splitlines())
    other = train_sentencepiece([PROMPT, *ODD_TEXTS], 345, "bpe")
    assert publish_module.sample_texts(datasets, other) == [], "ids of another vocabulary"


def test_a_dataset_that_was_damaged_since_does_not_keep_a_model_from_being_published(
    source, dataset_folder, tokenizer_folder, tmp_path
):
    shutil.copytree(dataset_folder, tmp_path / "dataset")
    (offsets,) = (tmp_path / "dataset" / "validation").glob("offsets-*.bin")
    offsets.write_bytes(b"\xff" * offsets.stat().st_size)
    damaged = Mixture({str(tmp_path / "dataset"): 1.0}).datasets
    assert publish_module.sample_texts(damaged, load_tokenizer(tokenizer_folder)) == []


@pytest.mark.slow
@pytest.mark.parametrize("n_positions", [1, 2, 3])
def test_a_model_of_few_positions_is_published_too(source, tmp_path, n_positions):
    pytest.importorskip("transformers")
    model = source.model.model_copy(update={"n_positions": n_positions})
    few = dataclasses.replace(source, model=model, weights=random_weights(model), config=None)
    verification = publish(few, tmp_path / "out", name="A model", prompt="")
    assert verification.new_tokens == 2 * (n_positions // 2)


@pytest.mark.slow
def test_a_byte_order_mark_of_the_section_is_no_part_of_it(source, tmp_path):
    (tmp_path / "more.md").write_bytes(b"\xef\xbb\xbf## More")
    publish(source, tmp_path / "out", card_extra=tmp_path / "more.md", name="A model")
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "\n## More" in card
    assert "\ufeff" not in card


@pytest.mark.parametrize(
    ("content", "code"), [(None, ExitCode.NO_INPUT), (b"\xff\xfe", ExitCode.DATA)], ids=["missing", "not UTF-8"]
)
def test_a_section_that_cannot_be_read_is_refused_before_anything_is_done(source, tmp_path, content, code):
    if content is not None:
        (tmp_path / "more.md").write_bytes(content)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"more\.md") as caught:
        publish(source, tmp_path / "out", card_extra=tmp_path / "more.md", name="A model")
    assert caught.value.exit_code == code
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
@pytest.mark.parametrize("format", ["safetensors", "gguf"])
def test_the_code_of_the_card_runs_in_the_folder(source, tmp_path, monkeypatch, capsys, format):
    pytest.importorskip("transformers")
    if format == "gguf":
        pytest.importorskip("gguf")
    model = source.model.model_copy(update={"n_positions": 112})  # above the length that the card asks for
    source = dataclasses.replace(source, model=model, weights=random_weights(model))
    publish(source, tmp_path / "out", format=format, name="A model")
    monkeypatch.chdir(tmp_path / "out")
    text, scope = card_of(tmp_path / "out")[1], {}
    for code in blocks(text, "python"):
        (tmp_path / "card.py").write_text(code, encoding="utf-8")
        scope = runpy.run_path(str(tmp_path / "card.py"), scope)
    lines = capsys.readouterr().out.replace(" ", "").splitlines()
    assert sum(line.startswith(PROMPT) for line in lines) == 2
    assert ("model.gguf" in text) == (format == "gguf")


@pytest.mark.parametrize("prompt", ["it's $HOME", 'a "word" \\ 这是'])
def test_a_shell_command_of_the_card_holds_its_prompt_as_one_word(source, prompt):
    card = model_card(CardFacts("a model", source.model, wordpiece=False, prompt=prompt, gguf=True))
    arguments = shlex.split(re.search("^llama-completion .*", card, re.MULTILINE)[0])
    assert arguments[-2:] == ["-p", prompt]
    card = model_card(CardFacts("a model", source.model, wordpiece=True, bos_id=2, prompt=prompt, gguf=True))
    arguments = shlex.split(re.search("^curl .*", card, re.MULTILINE)[0])
    assert json.loads(arguments[-1])["prompt"] == [2, prompt]


@pytest.mark.slow
def test_the_card_says_what_llama_cpp_does_otherwise(source, tmp_path):
    pytest.importorskip("gguf")
    publish(source, tmp_path / "out", format="gguf", name="A model")
    text = card_of(tmp_path / "out")[1]
    assert "puts `[SEP]`, the end of a document, behind a prompt that is a text" in text
    assert f"{load_tokenizer(source.tokenizer_folder).bos_id} is `[CLS]`" in text
    sizes = ((256, False), (1024, False), (100, True))
    for n_positions, warned in sizes:  # llama.cpp ends with an assertion at a last position that is no multiple of 256
        model = source.model.model_copy(update={"n_positions": n_positions})
        card = model_card(CardFacts("a model", model, wordpiece=False, prompt=PROMPT, gguf=True))
        assert (f"The model has {n_positions} positions" in card) == warned
        assert f"-n {min(100, n_positions // 2)} " in card


# What generates otherwise, or reads texts otherwise, is not published


def refused(source, output) -> str:
    with pytest.raises(UserError) as caught:
        publish(source, output, name="A model")
    assert caught.value.exit_code == ExitCode.BUG
    assert not output.exists()
    return str(caught.value)


@pytest.mark.slow
def test_a_folder_that_generates_other_tokens_is_not_published(source, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    faultless = transformers_folder.generation_config
    faulty = lambda *arguments: faultless(*arguments) | {"repetition_penalty": 3.0}  # noqa: E731
    monkeypatch.setattr(transformers_folder, "generation_config", faulty)
    assert "greedy continuation" in refused(source, tmp_path / "out")


@pytest.mark.slow
def test_a_tokenizer_that_differs_on_a_document_is_not_published(source, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    encode_batch = type(load_tokenizer(source.tokenizer_folder)).encode_batch

    def faulty(self, texts):
        return [ids[:-1] if text == "山河" else ids for text, ids in zip(texts, encode_batch(self, texts), strict=True)]

    monkeypatch.setattr(publish_module, "sample_texts", lambda datasets, tokenizer: ["一", "山河"])
    monkeypatch.setattr(type(load_tokenizer(source.tokenizer_folder)), "encode_batch", faulty)
    assert "AutoTokenizer gives other ids for '\\u5c71\\u6cb3'" in refused(source, tmp_path / "out")


@pytest.mark.slow
def test_where_two_tokens_are_as_likely_either_may_come_first(source, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    publish(source, tmp_path / "out", name="A model")
    tokenizer = load_tokenizer(source.tokenizer_folder)
    ours = verify.our_results(source.weights, source.model, tokenizer, "float32", [PROMPT])
    model = verify.load_model(tmp_path / "out", "model.safetensors")
    _, same = verify.compare_model(model, ours, tmp_path)
    assert same == len(ours.continuations[0])
    other = [[*ours.continuations[0][:2], *((np.array(ours.continuations[0][2:]) + 1) % 5).tolist()]]
    tied = [[*ours.leads[0][:2], 1e-7, *ours.leads[0][3:]]]
    changed_ours = ours._replace(continuations=other, leads=tied)
    assert verify.compare_model(model, changed_ours, tmp_path)[1] == 2
    with pytest.raises(UserError, match="greedy continuation"):
        verify.compare_model(model, changed_ours._replace(leads=ours.leads), tmp_path)


@pytest.mark.slow
def test_what_torch_computes_first_is_not_what_counts(source, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    publish(source, tmp_path / "out", name="A model")
    tokenizer = load_tokenizer(source.tokenizer_folder)
    ours = verify.our_results(source.weights, source.model, tokenizer, "float32", [PROMPT])
    calls_that_are_off = 1

    def less_exact_at_first(model, inputs, output):
        nonlocal calls_that_are_off
        calls_that_are_off -= 1
        if calls_that_are_off >= 0:
            output.logits += 1e-3

    model = verify.load_model(tmp_path / "out", "model.safetensors")
    model.register_forward_hook(less_exact_at_first)
    difference, _ = verify.compare_model(model, ours, tmp_path)
    assert difference < 1e-5
    calls_that_are_off = 2
    with pytest.raises(UserError, match="logits differ by 1"):
        verify.compare_model(model, ours, tmp_path)


def test_ties_of_sentencepiece_are_told_but_few_of_them_are_allowed(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = train_sentencepiece([PROMPT, *ODD_TEXTS], 345, "unigram")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)

    class Other(SentencePieceTokenizer):
        wrong = 1

        def encode_batch(self, texts):
            encoded = list(super().encode_batch(texts))
            return encoded[: -self.wrong] + [ids[:-1] for ids in encoded[-self.wrong :]]

    other = Other((tmp_path / "spiece.model").read_bytes(), tmp_path)
    texts = [PROMPT] * 100
    assert verify.compare_tokenizers(tokenizer, theirs, texts, tmp_path) == 0
    assert verify.compare_tokenizers(other, theirs, texts, tmp_path) == 1
    other.wrong = 3
    with pytest.raises(UserError, match="AutoTokenizer gives other ids"):
        verify.compare_tokenizers(other, theirs, texts, tmp_path)


def test_texts_that_hold_names_of_special_tokens_are_compared_as_text(tmp_path, tokenizer_folder):
    transformers = pytest.importorskip("transformers")
    shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(Path(tmp_path / "tokenizer"))
    texts = ["这是[SEP]之前的[CLS]"]
    assert verify.compare_tokenizers(load_tokenizer(tokenizer_folder), theirs, texts, tmp_path) == 0


def test_a_vocabulary_of_one_token_goes_on_with_it():
    logits_of = lambda tokens_BT: np.zeros((*tokens_BT.shape, 1))  # noqa: E731
    continuations, leads = verify.continue_greedily(logits_of, [[0], [0, 0]], 6, 3, 0)
    assert continuations == [[0], [0]]
    assert leads == [[0.0] * 3] * 2
