"""Types, shards and file formats of an exported folder: the same model in each, and rounded no more than was asked."""

import json
import logging
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.exports import LOWER, TEXTS, config_for, export
from support.weight_folders import random_weights

from gpt2_flax.checkpoint.huggingface import read_folder, to_state_dict
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.export import weight_files
from gpt2_flax.export.transformers_folder import export_folder
from gpt2_flax.export.weight_files import shard_size
from gpt2_flax.tokenizers.train import train_wordpiece


@pytest.fixture(scope="module")
def wordpiece():
    return train_wordpiece(TEXTS, 120)


# Types


@pytest.mark.slow
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


@pytest.mark.slow
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
