"""What transformers generates from an exported folder: as many tokens as asked, in batches too, without a warning."""

import json

import pytest
from support.weight_folders import random_weights
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gpt2_flax.checkpoint.huggingface import to_hf_config
from gpt2_flax.config.model import ModelConfig
from gpt2_flax.export.transformers_folder import export_folder
from gpt2_flax.tokenizers.tokenizer import load_tokenizer
from gpt2_flax.tokenizers.train import train_sentencepiece, train_wordpiece

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from transformers import AutoTokenizer, BertTokenizer, GPT2LMHeadModel, TextGenerationPipeline, pipeline

PROMPT = "这是很久之前的事情了"
TEXTS = [PROMPT, "The weather was fine, and so we went out.", "昨天下午我们去了公园。"] * 5
PROMPTS = [PROMPT, "昨天", "The weather was fine", PROMPT + PROMPT]
MANY, FEW = 512, 40  # positions


def byte_level(folder):
    """A tokenizer like GPT-2's: one special token, none for padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder / "tokenizer.json")


@pytest.fixture(scope="module", params=["wordpiece", "sentencepiece", "byte_level"])
def tokenizer(request, tmp_path_factory):
    if request.param == "byte_level":
        return byte_level(tmp_path_factory.mktemp("byte_level"))
    return train_wordpiece(TEXTS, 120) if request.param == "wordpiece" else train_sentencepiece(TEXTS, 305, "bpe")


def export(tokenizer, n_positions, output):
    config = ModelConfig(vocab_size=tokenizer.vocab_size, n_positions=n_positions, n_layer=1, n_head=2, n_embd=16)
    export_folder(random_weights(config), config, tokenizer, output, card="", verify=False)
    return output


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    return export(tokenizer, MANY, tmp_path_factory.mktemp("export") / "many")


def generators(folder):
    """Functions from prompt and options to all ids, by name: the ways in which a folder is used."""
    model, auto = GPT2LMHeadModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizers = {"auto": auto} | ({"bert": BertTokenizer.from_pretrained(folder)} if "[CLS]" in auto.vocab else {})
    # A random model says all tokens; without these two, every text is as long as it may be.
    fixed = {"suppress_tokens": sorted({auto.eos_token_id, auto.pad_token_id}), "do_sample": True}

    def of_model(chosen):
        return lambda prompt, **options: model.generate(**chosen(prompt, return_tensors="pt"), **fixed, **options)[0]

    def of_pipeline(made):
        return lambda prompt, **options: made(prompt, return_tensors=True, **fixed, **options)[0]["generated_token_ids"]

    ways = {f"generate {name}": of_model(chosen) for name, chosen in tokenizers.items()}
    ways |= {f"class {name}": of_pipeline(TextGenerationPipeline(model, one)) for name, one in tokenizers.items()}
    return ways | {"pipeline": of_pipeline(pipeline("text-generation", str(folder)))}, tokenizers


VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))


@pytest.mark.slow
@pytest.mark.skipif((5, 0) <= VERSION < (5, 20), reason="`pipeline` prefers its default to `max_length`, and warns")
def test_a_length_is_obeyed_and_nothing_is_warned_of(tmp_path, silence):
    ways, tokenizers = generators(export(train_wordpiece(TEXTS, 120), MANY, tmp_path / "many"))
    for way, generate in ways.items():
        start = len(tokenizers["bert" if way.endswith("bert") else "auto"](PROMPT)["input_ids"])
        assert len(generate(PROMPT, max_new_tokens=7)) == start + 7, way
        if not way.startswith("generate"):  # which wants a length to be given
            assert start < len(generate(PROMPT)) <= MANY, way
        # `pipeline` of 4.57 obeys its own default rather than `max_length`, and its class wants to hear of truncation.
        if way != "pipeline" or VERSION >= (5, 0):
            options = {} if way.startswith("generate") else {"truncation": True}
            assert len(generate(PROMPT, max_length=60, **options)) == 60, way
    made = pipeline("text-generation", str(tmp_path / "many"), max_new_tokens=7, suppress_tokens=[0, 3])
    assert len(made(PROMPT, return_tensors=True)[0]["generated_token_ids"]) == start + 7


@pytest.mark.slow
def test_a_model_of_few_positions_stops_at_the_last(tmp_path):
    ways, _ = generators(export(train_wordpiece(TEXTS, 120), FEW, tmp_path / "few"))
    for way, generate in ways.items():
        assert len(generate(PROMPT)) == FEW, way
        assert len(generate(PROMPT, max_length=20)) == 20, way


@pytest.mark.slow
def test_a_batch_is_continued_as_each_of_its_prompts(folder, silence):
    model, tokenizer = GPT2LMHeadModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        for _ in range(8):  # with nothing but the model, and no padding
            row = torch.tensor([ids])
            ids.append(model(row, attention_mask=torch.ones_like(row)).logits[0, -1].argmax().item())
            if ids[-1] == tokenizer.eos_token_id:
                break
        expected.append(tokenizer.decode(ids, skip_special_tokens=True))
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    assert batch["attention_mask"].min() == 0, "prompts of different lengths"
    found = model.generate(**batch, max_new_tokens=8, do_sample=False)
    assert tokenizer.batch_decode(found, skip_special_tokens=True) == expected
    generate = pipeline("text-generation", str(folder), batch_size=len(PROMPTS))
    found = generate(PROMPTS, max_new_tokens=8, top_k=1, do_sample=True, return_tensors=True)
    found = [text["generated_token_ids"] for (text,) in found]
    assert tokenizer.batch_decode(found, skip_special_tokens=True) == expected


def test_one_prompt_is_continued_without_a_warning_of_padding(folder, silence):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    fixed = {"max_new_tokens": 4, "suppress_tokens": sorted({tokenizer.eos_token_id, tokenizer.pad_token_id})}
    ids = GPT2LMHeadModel.from_pretrained(folder).generate(**tokenizer(PROMPT, return_tensors="pt"), **fixed)[0]
    assert tokenizer.decode(ids, skip_special_tokens=True).startswith(PROMPT)
    assert pipeline("text-generation", str(folder))(PROMPT, **fixed)[0]["generated_text"].startswith(PROMPT)


def test_all_files_pad_with_one_token(folder, tokenizer):
    in_config, used = (
        json.loads((folder / name).read_bytes())["pad_token_id"] for name in ("config.json", "generation_config.json")
    )
    assert in_config == tokenizer.pad_id
    assert to_hf_config(ModelConfig(vocab_size=9), 1, 2, 2)["pad_token_id"] is None, "no warning of every end"
    expected = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
    assert (used, AutoTokenizer.from_pretrained(folder).pad_token_id) == (expected, expected)
