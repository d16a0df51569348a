"""Exports of a tiny model with random weights."""

import ml_dtypes
import numpy as np
from support.weight_folders import random_weights

from gpt2_flax.config.model import ModelConfig
from gpt2_flax.export.transformers_folder import export_folder

TEXTS = [
    "这是很久之前的事情了",
    "The weather was fine, and so we went out.",
    "昨天下午我们去了公园。",
    "3.14 foxes",
] * 5
LOWER = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def config_for(tokenizer, surplus: int = 0) -> ModelConfig:
    size = tokenizer.vocab_size + surplus
    return ModelConfig(vocab_size=size, n_positions=40, n_layer=2, n_head=2, n_embd=16)


def export(output, tokenizer, **options):
    config = config_for(tokenizer)
    options = {"card": "# a model\n", "verify": False} | options
    return export_folder(random_weights(config), config, tokenizer, output, **options)
