"""Types, shards and file formats of an exported folder: the same model in each, and rounded no more than was asked."""

import json
import logging
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from weight_folders import random_weights

from gpt2_flax.checkpoint.huggingface import read_folder, to_state_dict
from gpt2_flax.config import ModelConfig
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.export import weight_files
from gpt2_flax.export.gguf import GGUF
from gpt2_flax.export.transformers_folder import export_folder
from gpt2_flax.export.weight_files import shard_size
from gpt2_flax.text.fast import read_fast_tokenizer
from gpt2_flax.text.train_tokenizer import train_sentencepiece, train_wordpiece

TEXTS = [
    "这是很久之前的事情了",
    "The weather was fine, and so we went out.",
    "昨天下午我们去了公园。",
    "3.14 foxes",
] * 5
LOWER = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@pytest.fixture(scope="module")
def wordpiece():
    return train_wordpiece(TEXTS, 120)


@pytest.fixture(scope="module")
def bpe():
    return train_sentencepiece(TEXTS, 305, "bpe")


@pytest.fixture(scope="module")
def unigram():
    return train_sentencepiece(TEXTS, 305, "unigram")


def config_for(tokenizer, surplus: int = 0) -> ModelConfig:
    size = tokenizer.vocab_size + surplus
    return ModelConfig(vocab_size=size, n_positions=40, n_layer=2, n_head=2, n_embd=16)


def export(output, tokenizer, **options):
    config = config_for(tokenizer)
    options = {"card": "# a model\n", "verify": False} | options
    return export_folder(random_weights(config), config, tokenizer, output, **options)


# Types


@pytest.mark.parametrize("dtype", LOWER)
def test_a_lower_precision_holds_the_nearest_numbers_and_is_compared_with_them(tmp_path, wordpiece, dtype):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    verification = export(tmp_path / "out", wordpiece, dtype=dtype, format="bin", verify=True)
    assert verification.max_logit_difference < 1e-4, "of the same, rounded weights"
    assert 1e-4 < verification.rounding < 1, "what rounding itself did"
    assert f"rounding the weights to {dtype}, before all this, changed logits by at most" in str(verification)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == (dtype, dtype)
    expected = to_state_dict(random_weights(config_for(wordpiece)))
    for name, array in load_file(tmp_path / "out" / "model.safetensors").items():
        assert array.dtype == LOWER[dtype]
        assert np.array_equal(array, expected[name].astype(LOWER[dtype]))
    for name, tensor in torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True).items():
        assert str(tensor.dtype) == f"torch.{dtype}"
        assert np.array_equal(tensor.float().numpy(), expected[name].astype(LOWER[dtype]).astype(np.float32))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert str(model.dtype) == f"torch.{dtype}"
    _, weights = read_folder(tmp_path / "out")
    for path, array in random_weights(config_for(wordpiece)).items():
        assert np.array_equal(weights[path], array.astype(LOWER[dtype]).astype(np.float32))


def test_a_number_that_float16_cannot_hold_is_refused(tmp_path, wordpiece):
    config, weights = config_for(wordpiece), random_weights(config_for(wordpiece))
    weights["h/mlp/c_fc/bias"][1, 3] = 70000.0
    with pytest.raises(UserError, match=r"h\.1\.mlp\.c_fc\.bias holds numbers too large for float16") as caught:
        export_folder(weights, config, wordpiece, tmp_path / "out", card="", dtype="float16", verify=False)
    assert caught.value.exit_code == ExitCode.DATA
    assert list(tmp_path.iterdir()) == []
    export_folder(weights, config, wordpiece, tmp_path / "out", card="", dtype="bfloat16", verify=False)


# Shards


def test_shards_stay_below_the_size_and_are_one_model(tmp_path, wordpiece, caplog):
    transformers = pytest.importorskip("transformers")
    limit = 6000
    verification = export(tmp_path / "out", wordpiece, max_shard_size=limit, verify=True)
    assert verification.files == ("model.safetensors.index.json",)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert not (tmp_path / "out" / "model.safetensors").exists()
    total, seen = 0, set()
    for shard in shards:
        tensors = load_file(tmp_path / "out" / shard)
        size = sum(array.nbytes for array in tensors.values())
        assert size <= limit or len(tensors) == 1
        assert {name for name in index["weight_map"] if index["weight_map"][name] == shard} == tensors.keys()
        total, seen = total + size, seen | tensors.keys()
    weights = random_weights(config_for(wordpiece))
    assert index["metadata"] == {
        "total_size": total,
        "total_parameters": sum(array.size for array in weights.values()),
    }
    for path, array in read_folder(tmp_path / "out")[1].items():
        assert np.array_equal(array, weights[path])
    sums = (tmp_path / "out" / "SHA256SUMS").read_text()
    assert all(shard in sums for shard in [*shards, "model.safetensors.index.json"])
    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    transformers.utils.logging.disable_propagation()
    assert [record for record in caplog.records if record.name.startswith("transformers")] == []


def test_a_damaged_shard_and_a_damaged_index_are_noticed(tmp_path, wordpiece):
    export(tmp_path / "out", wordpiece, max_shard_size=20000)
    index = tmp_path / "out" / "model.safetensors.index.json"
    whole = index.read_bytes()
    index.write_bytes(whole + b" ")
    with pytest.raises(UserError, match="sha256 differs"):
        read_folder(tmp_path / "out")
    index.write_bytes(whole)
    shard = tmp_path / "out" / "model-00002-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="sha256 differs"):
        read_folder(tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2 * 10**9), ("1.5 mb", 1500000), ("300KiB", 300 * 1024), ("7", 7), ("1GiB", 2**30)]
)
def test_sizes_are_understood(text, size):
    assert shard_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "2 XB", "0", "1e9", "nanGB", "2GB\n3"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match="not a size") as caught:
        shard_size(text)
    assert caught.value.exit_code == ExitCode.USAGE


def test_what_the_disk_changed_is_noticed(tmp_path, wordpiece, monkeypatch):
    save_file = weight_files.save_file

    def failing(tensors, path, metadata):
        save_file(tensors, path, metadata)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(weight_files, "save_file", failing)
    with pytest.raises(UserError, match="what was written differs from the model") as caught:
        export(tmp_path / "out", wordpiece, verify=True)
    assert caught.value.exit_code == ExitCode.IO
    assert list(tmp_path.iterdir()) == []


# Memory


@pytest.mark.parametrize(
    ("format", "dtype", "times"),
    [
        ("safetensors", "float32", 0.1),
        ("safetensors", "bfloat16", 0.6),
        ("bin", "float32", 1.1),
        ("gguf", "float32", 0.4),
        ("gguf", "float16", 0.9),
    ],
)
def test_with_the_weights_an_export_takes_at_most_twice_their_memory(tmp_path, wordpiece, format, dtype, times):
    pytest.importorskip({"bin": "torch", "gguf": "gguf"}.get(format, "safetensors"))
    config = config_for(wordpiece).model_copy(update={"n_embd": 256, "n_layer": 8})
    weights = random_weights(config)
    # The first call of a library takes memory of its own.
    export(tmp_path / "small", wordpiece, format=format, dtype=dtype)
    tracemalloc.start()
    export_folder(weights, config, wordpiece, tmp_path / "out", card="", format=format, dtype=dtype, verify=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < times * sum(array.nbytes for array in weights.values())


# GGUF


def gguf_of(folder):
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(folder / GGUF)
    return {name: field.contents() for name, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


@pytest.mark.parametrize("dtype", ["float32", *LOWER])
def test_gguf_holds_the_model_and_says_how_large_it_is(tmp_path, wordpiece, dtype):
    pytest.importorskip("gguf")
    export(tmp_path / "out", wordpiece, format="gguf", dtype=dtype)
    fields, tensors = gguf_of(tmp_path / "out")
    assert {name: fields[name] for name in fields if name.startswith(("gpt2.", "general."))} == {
        "general.architecture": "gpt2",
        "general.name": "out",
        "general.file_type": {"float32": 0, "float16": 1, "bfloat16": 32}[dtype],
        "gpt2.vocab_size": wordpiece.vocab_size,
        "gpt2.context_length": 40,
        "gpt2.embedding_length": 16,
        "gpt2.block_count": 2,
        "gpt2.feed_forward_length": 64,
        "gpt2.attention.head_count": 2,
        "gpt2.attention.layer_norm_epsilon": pytest.approx(1e-5),
    }
    theirs = load_file(tmp_path / "out" / "model.safetensors")
    assert len(tensors) == len(theirs) == 4 + 2 * 12
    pairs = {
        "token_embd.weight": theirs["transformer.wte.weight"],
        "position_embd.weight": theirs["transformer.wpe.weight"],
        "output_norm.bias": theirs["transformer.ln_f.bias"],
        "blk.1.attn_qkv.weight": theirs["transformer.h.1.attn.c_attn.weight"].T,
        "blk.1.attn_output.weight": theirs["transformer.h.1.attn.c_proj.weight"].T,
        "blk.0.ffn_up.weight": theirs["transformer.h.0.mlp.c_fc.weight"].T,
        "blk.0.ffn_down.weight": theirs["transformer.h.0.mlp.c_proj.weight"].T,
        "blk.0.ffn_norm.weight": theirs["transformer.h.0.ln_2.weight"],
    }
    for name, array in pairs.items():
        data = tensors[name].data
        matrix = array.ndim == 2 and name != "position_embd.weight"
        assert (
            tensors[name].tensor_type.name
            == {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype if matrix else "float32"]
        )
        data = data.view(ml_dtypes.bfloat16) if matrix and dtype == "bfloat16" else data
        assert np.array_equal(data.astype(np.float32), array.astype(np.float32)), name


def test_gguf_gives_the_logits_of_the_safetensors(tmp_path, wordpiece):
    """By way of the reader in transformers, which is not ours."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate", reason="transformers reads GGUF with it")
    export(tmp_path / "out", wordpiece, format="gguf")
    tokens = torch.arange(20)[None] % wordpiece.vocab_size
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")  # it cannot read n_positions from GGUF
    logits = [
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out", config=config, **options).eval()(tokens).logits
        for options in ({}, {"gguf_file": GGUF})
    ]
    assert torch.equal(*logits)


def test_gguf_of_wordpiece_marks_words_and_puts_nothing_behind_a_prompt(tmp_path, wordpiece):
    pytest.importorskip("gguf")
    config = config_for(wordpiece, surplus=3)
    options = {"card": "", "format": "gguf", "verify": False}
    export_folder(random_weights(config), config, wordpiece, tmp_path / "out", **options)
    fields, tensors = gguf_of(tmp_path / "out")
    assert tensors["token_embd.weight"].shape.tolist() == [16, wordpiece.vocab_size + 3]
    lines = (tmp_path / "out" / "vocab.txt").read_bytes().decode().removesuffix("\n").split("\n")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == config.vocab_size
    for line, token in zip(lines, tokens, strict=False):
        special = line in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
        assert token == (line if special else line[2:] if line.startswith("##") else "▁" + line)
        assert types[tokens.index(token)] == (3 if special else 1)
    assert types[-3:] == [5, 5, 5]
    assert len(set(tokens)) == len(tokens)
    expected = {
        "model": "bert",
        "bos_token_id": wordpiece.bos_id,
        "eos_token_id": wordpiece.eos_id,
        "seperator_token_id": wordpiece.eos_id,
        "padding_token_id": wordpiece.pad_id,
        "unknown_token_id": wordpiece.unk_id,
        "add_bos_token": True,
        "add_eos_token": False,
        "add_sep_token": False,
    }
    assert {name: fields[f"tokenizer.ggml.{name}"] for name in expected} == expected


@pytest.mark.parametrize(("kind", "model"), [("bpe", "llama"), ("unigram", "t5")])
def test_gguf_of_sentencepiece_has_its_pieces_scores_and_types(tmp_path, request, kind, model):
    pytest.importorskip("gguf")
    from sentencepiece import SentencePieceProcessor

    tokenizer = request.getfixturevalue(kind)
    export(tmp_path / "out", tokenizer, format="gguf")
    fields, _ = gguf_of(tmp_path / "out")
    processor = SentencePieceProcessor(model_file=str(tmp_path / "out" / "spiece.model"))
    ids = range(processor.get_piece_size())
    assert fields["tokenizer.ggml.model"] == model
    assert fields["tokenizer.ggml.tokens"] == [processor.id_to_piece(index) for index in ids]
    assert np.allclose(fields["tokenizer.ggml.scores"], [processor.get_score(index) for index in ids])
    types = fields["tokenizer.ggml.token_type"]
    assert [types[index] == 6 for index in ids] == [processor.is_byte(index) for index in ids]
    assert [types[index] == 3 for index in ids] == [processor.is_control(index) for index in ids]
    assert types[tokenizer.unk_id] == 2
    assert fields["tokenizer.ggml.add_space_prefix"] is False


def byte_level_tokenizer(folder):
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    backend.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    backend.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_gguf_of_byte_level_bpe_has_its_merges(tmp_path):
    pytest.importorskip("gguf")
    file = byte_level_tokenizer(tmp_path)
    tokenizer = read_fast_tokenizer(file)
    export(tmp_path / "out", tokenizer, format="gguf", verify=True)
    fields, _ = gguf_of(tmp_path / "out")
    model = json.loads(file.read_text())["model"]
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert fields["tokenizer.ggml.merges"] == [" ".join(merge) for merge in model["merges"]]
    assert fields["tokenizer.ggml.tokens"][-1] == "<|endoftext|>"
    assert fields["tokenizer.ggml.token_type"][-1] == 3


def test_gguf_refuses_a_tokenizer_that_it_does_not_know(tmp_path, wordpiece):
    pytest.importorskip("gguf")
    wordpiece.save(tmp_path)
    tokenizer = read_fast_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="GGUF has no tokenizer of this kind") as caught:
        export(tmp_path / "out", tokenizer, format="gguf")
    assert caught.value.exit_code == ExitCode.USAGE
    assert not (tmp_path / "out").exists()


def test_without_the_package_gguf_is_refused_before_anything_is_done(tmp_path, wordpiece, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"gpt2_flax\[gguf\]"):
        export(tmp_path / "out", wordpiece, format="gguf")
    assert list(tmp_path.iterdir()) == []


def test_gguf_and_safetensors_are_written_without_torch():
    code = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
import tempfile, pathlib
from test_export_formats import TEXTS, export, train_wordpiece
with tempfile.TemporaryDirectory() as folder:
    assert export(pathlib.Path(folder) / "out", train_wordpiece(TEXTS, 120), format="gguf", verify=True) is None
    assert (pathlib.Path(folder) / "out" / "model.gguf").stat().st_size > 10000
"""
    pytest.importorskip("gguf")
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
