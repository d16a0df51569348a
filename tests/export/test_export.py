"""An exported folder works in transformers as it is, says so with a number, and appears whole or not at all."""

import dataclasses
import hashlib
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from support.documents import blocks
from support.weight_folders import random_weights

from gpt2_flax.checkpoint.huggingface import read_folder
from gpt2_flax.config.model import ModelConfig
from gpt2_flax.config.parse import parse_config
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.export import transformers_folder, verify
from gpt2_flax.export.model_card import CardFacts, model_card
from gpt2_flax.export.publish import run_facts
from gpt2_flax.export.transformers_folder import MARKER, export_folder
from gpt2_flax.tokenizers.tokenizer import load_tokenizer
from gpt2_flax.tokenizers.train import train_sentencepiece, train_wordpiece

PROMPT = "这是很久之前的事情了"
TEXTS = [PROMPT, "The weather was fine, and so we went out.", "昨天下午我们去了公园。", "a quick brown fox, 3.14"] * 5
N_POSITIONS = 112  # above the max_length=100 of the published example


def config_for(tokenizer) -> ModelConfig:
    return ModelConfig(vocab_size=tokenizer.vocab_size, n_positions=N_POSITIONS, n_layer=2, n_head=2, n_embd=16)


def card_for(config: ModelConfig, wordpiece: bool) -> str:
    return model_card(CardFacts("a model", config, wordpiece, prompt=PROMPT))


@pytest.fixture(scope="module")
def wordpiece():
    return train_wordpiece(TEXTS, 120)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, wordpiece):
    """A folder with a WordPiece tokenizer and both weight files, and how it compared."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    config, output = config_for(wordpiece), tmp_path_factory.mktemp("export") / "wordpiece"
    card = card_for(config, True)
    return output, export_folder(random_weights(config), config, wordpiece, output, card=card, format="bin")


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def exported_sentencepiece(tmp_path_factory, request):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    tokenizer = train_sentencepiece(TEXTS, 305, request.param)
    config, output = config_for(tokenizer), tmp_path_factory.mktemp("export") / request.param
    export_folder(random_weights(config), config, tokenizer, output, card=card_for(config, False))
    return output


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        ({"name": "adamw"}, "| optimizer | AdamW, betas 0.9 and 0.95, weight decay 0.1 |"),
        ({"preset": "uer"}, "| optimizer | AdamW without bias correction, as in UER-py, betas 0.9 and 0.999,"),
        ({}, "| optimizer | Muon for matrices and AdamW for all else, betas"),
    ],
)
def test_the_card_names_the_optimizer_of_the_run(config, optimizer, words):
    config = parse_config(config.model_dump(exclude_none=True) | {"optimizer": optimizer}, "test")
    facts = run_facts(SimpleNamespace(step=3, metrics={}, hardware=None, averaged=()), config, {})
    assert words in model_card(CardFacts("a model", ModelConfig(vocab_size=300), False, PROMPT, **facts))


def test_the_card_says_how_the_model_grew_and_of_what_it_is_the_mean(config):
    def card(averaged=(), **growth):
        grown = parse_config(config.model_dump(exclude_none=True) | {"growth": growth}, "test")
        source = SimpleNamespace(step=3, metrics={}, hardware=None, averaged=averaged)
        facts = run_facts(source, grown, {})
        return model_card(CardFacts("a model", ModelConfig(vocab_size=300), False, PROMPT, **facts))

    line = "| growth | 1 of 2 layers, rows of 16 tokens in the first 3 steps |"
    assert line in card(until=0.5, n_layer=1)
    assert "growth" not in card()
    assert "| weights | mean of the checkpoints of steps 2, 1,000 |" in card(averaged=(2, 1000))
    assert "mean of" not in card()


# What transformers makes of it


def test_the_folder_holds_what_it_promises(exported):
    folder, verification = exported
    tokenizer_files = {"vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    weight_files = {"model.safetensors", "pytorch_model.bin"}
    others = {"config.json", "generation_config.json", "README.md", "SHA256SUMS"}
    assert {path.name for path in folder.iterdir()} == tokenizer_files | weight_files | others
    sums = dict(line.split("  ")[::-1] for line in (folder / MARKER).read_text().splitlines())
    expected = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    del expected[MARKER]
    assert sums == expected
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "all files can be read by the same people"
    assert verification.files == ("model.safetensors", "pytorch_model.bin")
    assert verification.max_logit_difference < 1e-4
    assert str(verification) in (folder / "README.md").read_text()


def test_what_was_exported_is_read_back_exactly(exported, wordpiece):
    config, weights = read_folder(exported[0])
    assert config == config_for(wordpiece)
    for path, array in random_weights(config).items():
        assert np.array_equal(weights[path], array), path
    assert load_tokenizer(exported[0]).fingerprint == wordpiece.fingerprint


def test_the_published_call_works(exported, silence):
    from transformers import BertTokenizer, GPT2LMHeadModel, TextGenerationPipeline

    tokenizer = BertTokenizer.from_pretrained(exported[0])
    model = GPT2LMHeadModel.from_pretrained(exported[0])
    assert set(tokenizer(PROMPT)) == {"input_ids", "attention_mask"}
    generate = TextGenerationPipeline(model, tokenizer)
    for options in ({}, {"truncation": True}):  # with which transformers 4.57 is silent too, as with `AutoTokenizer`
        text = generate(PROMPT, max_length=100, do_sample=True, **options)[0]["generated_text"]
        assert text.replace(" ", "").startswith(PROMPT)


def test_pipeline_of_the_folder_adds_no_end_of_document_and_no_blanks(exported, wordpiece, silence):
    from transformers import pipeline

    generate = pipeline("text-generation", str(exported[0]))
    ids = generate.tokenizer(PROMPT)["input_ids"]
    assert ids == [wordpiece.bos_id, *wordpiece.encode_batch([PROMPT])[0]]
    assert generate.tokenizer.decode(ids, skip_special_tokens=True) == PROMPT
    assert generate(PROMPT, max_length=20, do_sample=True)[0]["generated_text"].startswith(PROMPT)
    long = generate(PROMPT)[0]["generated_text"]  # goes on to the last position and stops there
    assert long.startswith(PROMPT)


@pytest.mark.slow
def test_sentencepiece_works_with_the_auto_classes(exported_sentencepiece, silence):
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    ours, theirs = load_tokenizer(exported_sentencepiece), AutoTokenizer.from_pretrained(exported_sentencepiece)
    for text, ids in zip(TEXTS, ours.encode_batch(TEXTS), strict=True):
        assert theirs(text)["input_ids"] == [ours.bos_id, *ids]
        assert theirs.decode(ids) == text
    model = AutoModelForCausalLM.from_pretrained(exported_sentencepiece)
    fixed = {
        "suppress_tokens": [ours.pad_id]
    }  # a random model generates padding tokens, and transformers warns of them
    assert model.generate(**theirs(PROMPT, return_tensors="pt"), **fixed).shape[1] <= N_POSITIONS
    generate = pipeline("text-generation", str(exported_sentencepiece))
    assert generate(PROMPT, max_length=100, do_sample=True, **fixed)[0]["generated_text"].startswith(PROMPT)


def test_both_weight_files_hold_the_same(exported):
    import torch
    from safetensors.torch import load_file

    bin_state = torch.load(exported[0] / "pytorch_model.bin", weights_only=True)
    state = load_file(exported[0] / "model.safetensors")
    assert bin_state.keys() == state.keys()
    assert "lm_head.weight" not in state
    assert all(torch.equal(bin_state[name], state[name]) and bin_state[name].is_contiguous() for name in state)
    assert (exported[0] / "pytorch_model.bin").stat().st_size < 2 * (exported[0] / "model.safetensors").stat().st_size


# Nothing or all


def export_one(output, tokenizer, **options):
    config = config_for(tokenizer)
    return export_folder(random_weights(config), config, tokenizer, output, card="# a model\n", **options)


def refusal(code: ExitCode, output, tokenizer, **options) -> str:
    before = sorted(output.parent.iterdir())
    with pytest.raises(UserError) as caught:
        export_one(output, tokenizer, **options)
    assert caught.value.exit_code == code
    assert sorted(output.parent.iterdir()) == before, "nothing was published and nothing left over"
    return str(caught.value)


def test_an_existing_output_is_refused_unless_it_is_ours_and_overwriting_was_asked(tmp_path, wordpiece):
    output = tmp_path / "out"
    export_one(output, wordpiece, verify=False)
    assert "--overwrite" in refusal(ExitCode.CANT_CREATE, output, wordpiece)
    export_one(output, wordpiece, verify=False, overwrite=True)
    (output / MARKER).unlink()
    assert "not ours" in refusal(ExitCode.CANT_CREATE, output, wordpiece, overwrite=True)
    assert (output / "config.json").exists()


def test_a_tokenizer_of_another_model_is_refused(tmp_path, wordpiece):
    config = config_for(wordpiece).model_copy(update={"vocab_size": wordpiece.vocab_size - 1})
    with pytest.raises(UserError, match="tokenizer has") as caught:
        export_folder(random_weights(config), config, wordpiece, tmp_path / "out", card="")
    assert caught.value.exit_code == ExitCode.DATA
    assert not (tmp_path / "out").exists()


def drop_a_tensor(state_dict):
    del state_dict["transformer.h.1.ln_2.bias"]


def add_a_tensor(state_dict):
    state_dict["transformer.h.2.ln_2.bias"] = state_dict["transformer.h.1.ln_2.bias"].copy()


def cut_a_tensor(state_dict):
    state_dict["transformer.wpe.weight"] = state_dict["transformer.wpe.weight"][:-1]


def change_a_number(state_dict):
    state_dict["transformer.h.1.attn.c_attn.bias"] = state_dict["transformer.h.1.attn.c_attn.bias"] + 1e-3


def spoil_a_number(state_dict):
    state_dict["transformer.ln_f.bias"] = state_dict["transformer.ln_f.bias"] * np.float32("nan")


@pytest.mark.slow
@pytest.mark.parametrize("fault", [drop_a_tensor, add_a_tensor, cut_a_tensor, change_a_number, spoil_a_number])
def test_a_folder_that_differs_from_the_model_is_not_published(tmp_path, wordpiece, monkeypatch, fault):
    pytest.importorskip("transformers")
    to_state_dict = transformers_folder.to_state_dict

    def faulty(weights):
        state_dict = to_state_dict(weights)
        fault(state_dict)
        return state_dict

    monkeypatch.setattr(transformers_folder, "to_state_dict", faulty)
    assert "the export is wrong" in refusal(ExitCode.BUG, tmp_path / "out", wordpiece)


@pytest.mark.slow
def test_a_tokenizer_that_differs_is_not_published(tmp_path, wordpiece, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(type(wordpiece), "encode_batch", lambda self, texts: [np.zeros(3, np.int32) for _ in texts])
    assert "AutoTokenizer gives other ids" in refusal(ExitCode.BUG, tmp_path / "out", wordpiece)


@pytest.mark.slow
def test_verification_shows_nothing_of_transformers(tmp_path, wordpiece, capfd):
    pytest.importorskip("transformers")
    capfd.readouterr()
    export_one(tmp_path / "out", wordpiece)
    assert capfd.readouterr() == ("", "")


def test_without_torch_the_folder_is_written_but_not_verified(tmp_path, wordpiece, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert export_one(tmp_path / "out", wordpiece) is None
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert "pip install 'gpt2_flax[export]'" in verify.NOT_VERIFIED
    assert "pip install" in refusal(ExitCode.USAGE, tmp_path / "other", wordpiece, format="bin")


@pytest.mark.multiprocess
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    # In its own process: the limit on file sizes cannot be lifted again. It stands for a disk that is full.
    code = """
import resource, signal, sys
from pathlib import Path
from gpt2_flax.errors import UserError
from gpt2_flax.tokenizers.train import train_wordpiece
from support.exports import TEXTS, export
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
tokenizer = train_wordpiece(TEXTS, 120)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    export(Path(sys.argv[1]) / "out", tokenizer)
except UserError as error:
    print(int(error.exit_code), error.what)
"""
    tests = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{int(ExitCode.IO)} weights could not be written\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.multiprocess
def test_reading_and_writing_folders_needs_neither_jax_nor_torch_to_import():
    code = """
import sys
import gpt2_flax.checkpoint.huggingface, gpt2_flax.export.model_card, gpt2_flax.export.transformers_folder
assert not {"jax", "flax", "torch", "transformers"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# The model card


def test_a_card_says_what_is_known():
    config = ModelConfig(vocab_size=21128, n_layer=12)
    facts = CardFacts(
        "a model",
        config,
        wordpiece=True,
        prompt='say "\u2028" 是',
        language="zh",
        license="mit",
        sources=("corpus.txt",),
        documents=2500,
        tokens=663005,
        parameters=102068736,
        seq_length=1024,
        steps=1000,
        batch_rows=64,
        validation_loss=3.0,
        bits_per_character=4.25,
    )
    card = model_card(facts)
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "language": "zh",
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gpt2"],
        "widget": [{"text": 'say "\u2028" 是'}],
    }
    for part in (
        "102,068,736",
        "2,500 documents",
        "65,536 tokens",
        "| 4.25 |",
        f"{math.exp(3):.4g}",
        "[SEP]",
        "corpus.txt",
    ):
        assert part in text
    for code in blocks(text, "python"):
        compile(code, "card", "exec")


def test_a_card_leaves_out_what_is_not_known():
    card = model_card(CardFacts("a model", ModelConfig(vocab_size=300), wordpiece=False, prompt=PROMPT))
    header = yaml.safe_load(card.split("---\n")[1])
    assert header.keys() == {"library_name", "pipeline_tag", "tags", "widget"}
    assert "None" not in card
    assert "BertTokenizer" not in card
    assert "Training data" not in card
    assert "loss" not in card


def test_a_card_says_what_a_model_does_behind_the_end_token():
    facts = CardFacts("a model", ModelConfig(vocab_size=300), wordpiece=True, prompt=PROMPT)
    card = model_card(facts)
    assert "as if a new document began" in card
    assert "data.prompt_separator" not in card
    card = model_card(dataclasses.replace(facts, prompt_separator=0.1))
    assert "as if a new document began" not in card
    assert "10% of the training segments had a `[SEP]` inside" in card
    card = model_card(dataclasses.replace(facts, prompt_separator=0.1, wordpiece=False))
    assert "[SEP]" not in card


def test_the_code_of_a_card_runs_in_its_folder(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(exported[0])
    text = (exported[0] / "README.md").read_text(encoding="utf-8")
    scope = {}
    for code in blocks(text, "python"):
        (tmp_path / "card.py").write_text(code, encoding="utf-8")
        scope = runpy.run_path(str(tmp_path / "card.py"), scope)
    lines = capsys.readouterr().out.replace(" ", "").splitlines()
    assert sum(line.startswith(PROMPT) for line in lines) == 2
