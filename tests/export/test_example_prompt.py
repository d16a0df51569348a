"""The prompt of a model card is what somebody chose, else a clean beginning of a text, and never empty."""

import dataclasses
import json
import re

import pytest
import yaml
from support.configs import changed
from support.weight_folders import random_weights

from gpt2_flax.checkpoint.source import Source
from gpt2_flax.config.model import ModelConfig
from gpt2_flax.export.example import example_prompt
from gpt2_flax.export.publish import publish
from gpt2_flax.tokenizers.tokenizer import load_tokenizer
from gpt2_flax.tokenizers.train import train_sentencepiece, train_wordpiece

CHINESE, ENGLISH = "这是很久之前的事情了", "Once upon a time"


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([CHINESE] * 5, 60)


def test_what_somebody_chose_comes_first_unless_it_is_blank(tokenizer):
    assert example_prompt(["今天", "昨天"], ["明天"], tokenizer, 1024) == "今天"
    assert example_prompt([None, "", " \n\t\u3000", "昨天 "], ["明天"], tokenizer, 1024) == "昨天 "
    assert example_prompt([None, ""], ["明天"], tokenizer, 1024) == "明天"


FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
GERMANY = "\U0001f1e9\U0001f1ea"
THUMB = "\U0001f44d\U0001f3fd"


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["昨天下午我们去了公园，看见一只大鸟飞过山河，大家都说好。"], "昨天下午我们去了公园，看见一只大鸟飞过山"),
        (["The weather was fine, and so we went out."], "The weather was"),
        (["  two\n\nlines \u2028 and\u3000more "], "two lines and more"),
        (["x" * 19 + "e\u0301" + "y" * 9], "x" * 19),
        (["字" * 19 + GERMANY + "字"], "字" * 19),
        (["字" * 19 + THUMB + "字"], "字" * 19),
        (["각" * 19 + "\u1100\u1161\u11a8" + "각"], "각" * 19),
        (["क" * 18 + "\u0915\u094d\u0937" + "क" * 3], "क" * 18),
        (["", " \n", "——……", "\ufffd字", "\u202e字", "a\0b", FAMILY, "e" + "\u0301" * 30, "昨天"], "昨天"),
        (['"quoted": `code` | #'], '"quoted": `code` | #'),
    ],
)
def test_a_beginning_is_whole_words_or_whole_characters_on_one_line(tokenizer, texts, expected):
    assert example_prompt([], texts, tokenizer, 1024) == expected


def test_a_model_of_few_positions_has_room_for_it(tokenizer):
    assert example_prompt([], ["昨天下午我们去了公园"], tokenizer, 16) == "昨天下午"
    assert example_prompt([], [], tokenizer, 1) == "这"


def test_without_any_text_the_vocabulary_says_which_language(tokenizer):
    assert example_prompt([], [], tokenizer, 1024) == CHINESE
    assert example_prompt([], [], train_wordpiece([ENGLISH] * 5, 60), 1024) == ENGLISH
    assert example_prompt([], [], train_sentencepiece([ENGLISH] * 5, 280, "bpe"), 1024) == ENGLISH
    assert example_prompt([], [], train_sentencepiece([CHINESE] * 5, 280, "bpe"), 1024) == CHINESE


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [None, "", "  "])
@pytest.mark.parametrize("dataset", [True, False])
def test_every_card_has_a_widget_and_the_same_prompt_in_its_examples(
    config, tokenizer_folder, corpus, tmp_path, prompt, dataset
):
    config = changed(config, training__prompts=[""], model__vocab_size=load_tokenizer(tokenizer_folder).vocab_size)
    source = Source("a run", config.model, random_weights(config.model), tokenizer_folder, config, 6, {})
    if not dataset:
        source = dataclasses.replace(source, config=None)
    publish(source, tmp_path / "out", name="A model", prompt=prompt)
    _, header, text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    ((_, widget),) = (entry for entry in yaml.safe_load(header)["widget"][0].items())
    assert widget.strip()
    lines = corpus.read_text(encoding="utf-8").splitlines()
    assert any(line.startswith(widget) for line in lines) if dataset else CHINESE.startswith(widget)
    shown = [json.loads(found) for found in re.findall(r'generate\(("[^\n]*?"), ', text)]
    assert shown == [widget, widget]


@pytest.mark.parametrize(
    ("n_positions", "length"), [(1024, "max_new_tokens=100"), (100, "max_length=100, truncation=True")]
)
def test_the_example_asks_for_a_length_of_which_transformers_does_not_warn(n_positions, length):
    from gpt2_flax.export.model_card import CardFacts, model_card

    card = model_card(CardFacts("a model", ModelConfig(vocab_size=300, n_positions=n_positions), True, CHINESE))
    assert card.count(f'"{CHINESE}", {length}, do_sample=True') == 2
