"""Folders of others are read without trusting them: whatever is wrong is one sentence, and nothing of it is run."""

import json
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.weight_folders import CONFIG, random_weights, write_folder

from gpt2_flax.checkpoint.checksums import write_sums
from gpt2_flax.checkpoint.huggingface import read_folder, to_state_dict
from gpt2_flax.errors import ExitCode, UserError


def write_shards(folder: Path) -> dict[str, str]:
    """A good folder of two shards; returns its weight_map."""
    write_folder(folder)
    (folder / "model.safetensors").unlink()
    items = list(to_state_dict(random_weights(CONFIG)).items())
    weight_map = {}
    for shard, part in (("one.safetensors", items[:7]), ("two.safetensors", items[7:])):
        save_file(dict(part), folder / shard)
        weight_map |= {name: shard for name, _ in part}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def refusal(folder: Path, code: ExitCode = ExitCode.DATA) -> str:
    with pytest.raises(UserError) as caught:
        read_folder(folder)
    assert caught.value.exit_code == code
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_config_may_begin_with_a_byte_order_mark(tmp_path, encoding):
    config = write_folder(tmp_path) / "config.json"
    plain, weights = read_folder(tmp_path)
    config.write_text(config.read_text(encoding="utf-8"), encoding=encoding)
    assert read_folder(tmp_path)[0] == plain
    assert weights.keys() == random_weights(CONFIG).keys()


def test_what_is_missing_is_named(tmp_path):
    assert "folder not found" in refusal(tmp_path / "none", ExitCode.NO_INPUT)
    assert "no config.json" in refusal(tmp_path, ExitCode.NO_INPUT)
    write_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "no weights" in refusal(tmp_path, ExitCode.NO_INPUT)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "llama"),
        ("model_type", None),
        ("activation_function", "relu"),
        ("activation_function", ["gelu_new"]),
        ("n_inner", 13),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
        ("quantization_config", {"bits": 4}),
        ("n_layer", "2"),
        ("n_layer", -1),
        ("n_layer", 10**9),
        ("n_layer", 2.5),
        ("vocab_size", None),
        ("vocab_size", 10**4000),
        ("n_embd", 2**40 * 3),
        ("n_head", 5),
        ("embd_pdrop", 1.0),
        ("embd_pdrop", float("nan")),
        ("layer_norm_epsilon", float("inf")),
    ],
)
def test_a_config_that_we_do_not_compute_is_refused_by_field(tmp_path, field, value):
    message = refusal(write_folder(tmp_path, **{field: value}))
    assert field in message


def test_harmless_fields_and_the_other_name_of_gelu_are_accepted(tmp_path):
    write_folder(tmp_path, n_inner=48, activation_function="gelu_pytorch_tanh", reorder_and_upcast_attn=True, n_ctx=9)
    assert read_folder(tmp_path)[0].n_embd == 12


OF_2019 = {
    "attn_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "finetuning_task": None,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "n_ctx": 12,
    "n_embd": 12,
    "n_head": 3,
    "n_layer": 2,
    "num_labels": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "pruned_heads": {},
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "token_ids",
    "summary_use_proj": True,
    "torchscript": False,
}


@pytest.mark.parametrize("sizes", [{"n_positions": 12, "vocab_size": 50}, {"vocab_size_or_config_json_file": 50}])
def test_a_config_of_2019_without_model_type_is_read(tmp_path, sizes):
    write_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(OF_2019 | sizes))
    config, weights = read_folder(tmp_path)
    assert (config.vocab_size, config.n_positions, config.n_layer, config.n_head) == (50, 12, 2, 3)
    for path, array in weights.items():
        np.testing.assert_array_equal(array, random_weights(CONFIG)[path])


@pytest.mark.parametrize("other", [{"afn": "gelu"}, {"dff": 48}, {"model_type": None}, {"activation_function": "relu"}])
def test_a_config_without_model_type_of_another_model_is_refused(tmp_path, other):
    write_folder(tmp_path)
    values = OF_2019 | {"n_positions": 12, "vocab_size": 50} | other
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert "not supported" in refusal(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({name: values[name] for name in values if name != "n_head"}))
    assert "model_type" in refusal(tmp_path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_left_out(tmp_path, prefix):
    tensors = {prefix + name: array for name, array in to_state_dict(random_weights(CONFIG)).items()}
    save_file(tensors, write_folder(tmp_path) / "model.safetensors")
    for path, array in read_folder(tmp_path)[1].items():
        np.testing.assert_array_equal(array, random_weights(CONFIG)[path])
    first = next(iter(tensors))
    save_file(tensors | {"wte.weight": tensors.pop(first)}, tmp_path / "model.safetensors")
    assert "tensors do not fit the model" in refusal(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, dtype, value):
    state_dict = {name: array.astype(dtype) for name, array in to_state_dict(random_weights(CONFIG)).items()}
    state_dict["transformer.h.1.mlp.c_fc.bias"][[3, 40]] = value
    save_file(state_dict, write_folder(tmp_path) / "model.safetensors")
    assert "2 of the 48 numbers of h.1.mlp.c_fc.bias are NaN or infinite" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["transformer.wte.weight", "lm_head.weight"])
def test_a_tied_head_that_is_not_finite_is_refused_by_name(tmp_path, name):
    state_dict = to_state_dict(random_weights(CONFIG))
    state_dict["lm_head.weight"] = state_dict["transformer.wte.weight"].copy()
    state_dict[name][7, 2] = np.nan
    save_file(state_dict, write_folder(tmp_path) / "model.safetensors")
    assert f"1 of the 600 numbers of {name.removeprefix('transformer.')}" in refusal(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "null", '{"n_layer": 1, "n_layer": 2}', "[" * 100_000, "\ud800", "9" * 5000, " " * 2**21]
)
def test_a_damaged_config_is_refused(tmp_path, text):
    write_folder(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert "config.json" in refusal(tmp_path)


def test_a_safetensors_file_cut_anywhere_is_refused(tmp_path):
    path = write_folder(tmp_path) / "model.safetensors"
    data = path.read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    for length in (0, 4, 8, 9, header // 2, header - 1, header, header + 1, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        assert "model.safetensors" in refusal(tmp_path)
    path.write_bytes(data + b"\0")
    assert "model.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("size", [2**24 + 1, 2**40, 2**64 - 1])
def test_a_huge_header_is_refused_unread(tmp_path, size):
    path = write_folder(tmp_path) / "model.safetensors"
    path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])
    assert f"header of {size} bytes" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("transformer.ln_f.bias"), "ln_f.bias missing, (12,) expected"),
        (lambda d: d.update({"transformer.h.2.ln_1.bias": np.zeros(12, np.float32)}), "'h.2.ln_1.bias' (12,) not exp"),
        (lambda d: d.update({"evil\n": np.zeros(1, np.float32)}), r"'evil\n' (1,) not expected"),
        (lambda d: d.update({"transformer.ln_f.bias": np.zeros((3, 4), np.float32)}), "(3, 4), (12,) expected"),
        (lambda d: d.update({"transformer.ln_f.bias": np.zeros(12, np.int64)}), "float32, float16 or bfloat16"),
        (lambda d: d.update({"ln_f.bias": np.zeros(12, np.float32)}), "twice"),
        (lambda d: d.update({"lm_head.weight": np.zeros((50, 12), np.float32)}), "lm_head.weight differs"),
        (lambda d: d.update({f"x{i}": np.zeros(1, np.float32) for i in range(10_000)}), "10028 tensors"),
    ],
)
def test_other_tensors_than_the_config_says_are_refused(tmp_path, change, said):
    state_dict = to_state_dict(random_weights(CONFIG))
    change(state_dict)
    save_file(state_dict, write_folder(tmp_path) / "model.safetensors")
    assert said in refusal(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../good/one.safetensors", "/etc/passwd", "a/b", "..", ".", "", "gone", "one\0", "..\\one", 3, None, ["one"]],
)
def test_an_index_that_names_anything_but_a_file_beside_it_is_refused(tmp_path, name):
    (tmp_path / "good").mkdir()
    write_shards(tmp_path / "good")
    weight_map = write_shards(tmp_path / "bad")
    write_index(tmp_path / "bad", dict.fromkeys(weight_map, "one.safetensors") | {"transformer.wte.weight": name})
    assert "index.json" in refusal(tmp_path / "bad")


def test_an_index_must_say_what_its_shards_hold(tmp_path):
    weight_map = write_shards(tmp_path)
    read_folder(tmp_path)
    for wrong in (
        weight_map | {"extra": "one.safetensors"},
        weight_map | {"transformer.wte.weight": "two.safetensors"},
        {name: shard for name, shard in weight_map.items() if shard == "one.safetensors"},
        dict(list(weight_map.items())[1:]),
        {},
        [],
        None,
    ):
        write_index(tmp_path, wrong)
        assert refusal(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_bytes(b" " * (16 * 2**20 + 1))
    assert "more than 16,777,216 bytes" in refusal(tmp_path)


def test_a_shard_may_not_be_a_link(tmp_path):
    (tmp_path / "good").mkdir()
    write_shards(tmp_path / "good")
    write_shards(tmp_path / "bad")
    (tmp_path / "bad" / "two.safetensors").unlink()
    (tmp_path / "bad" / "two.safetensors").symlink_to(tmp_path / "good" / "two.safetensors")
    assert "not a plain file" in refusal(tmp_path / "bad")


def test_a_flipped_bit_is_found_where_there_are_checksums(tmp_path):
    path = write_folder(tmp_path) / "model.safetensors"
    write_sums(tmp_path)
    read_folder(tmp_path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert "sha256 differs" in refusal(tmp_path)


class Evil:
    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    torch = pytest.importorskip("torch")
    path, proof = write_folder(tmp_path / "model") / "pytorch_model.bin", tmp_path / "proof"
    (path.parent / "model.safetensors").unlink()
    torch.save({"wte.weight": Evil(proof)}, path)
    assert "unsafe PyTorch file" in refusal(path.parent)
    path.write_bytes(f"cposix\nmkdir\n(S'{proof}'\ntR.".encode())
    assert "unsafe PyTorch file" in refusal(path.parent)
    assert not proof.exists()


def test_a_damaged_pytorch_file_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    path = write_folder(tmp_path) / "pytorch_model.bin"
    (tmp_path / "model.safetensors").unlink()
    state_dict = {name: torch.from_numpy(array) for name, array in to_state_dict(random_weights(CONFIG)).items()}
    torch.save(state_dict, path)
    read_folder(tmp_path)
    data = path.read_bytes()
    for length in (0, 4, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        assert "pytorch_model.bin" in refusal(tmp_path)
    for wrong in ([1], {"wte.weight": 3}, {3: torch.zeros(1)}, state_dict | {"transformer.ln_f.bias": torch.zeros(2)}):
        torch.save(wrong, path)
        assert refusal(tmp_path)
    # one element shown as a tensor of 2**40: the shape is refused before anything that large is made
    torch.save(state_dict | {"transformer.wte.weight": torch.zeros(1).expand(2**20, 2**20)}, path)
    assert "wte.weight' (1048576, 1048576) is larger than the file" in refusal(tmp_path)


def test_without_torch_a_pytorch_file_is_refused_with_a_way_out(tmp_path, monkeypatch):
    write_folder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install 'gpt2_flax[export]'" in refusal(tmp_path, ExitCode.USAGE)


def test_shapes_are_compared_before_data_is_read(tmp_path):
    write_folder(tmp_path, n_layer=3)
    message = refusal(tmp_path)
    assert "h.2.attn.c_attn.bias missing" in message


def test_a_pytorch_file_in_shards_is_read_and_its_index_is_checked(tmp_path):
    torch = pytest.importorskip("torch")
    write_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    items = [(name, torch.from_numpy(array)) for name, array in to_state_dict(random_weights(CONFIG)).items()]
    weight_map = {}
    for shard, part in (("pytorch_model-1.bin", items[:9]), ("pytorch_model-2.bin", items[9:])):
        torch.save(dict(part), tmp_path / shard)
        weight_map |= {name: shard for name, _ in part}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    for path, array in read_folder(tmp_path)[1].items():
        np.testing.assert_array_equal(array, random_weights(CONFIG)[path])
    index.write_text(json.dumps({"weight_map": weight_map | {items[0][0]: "pytorch_model-2.bin"}}))
    assert "2 names differ between index and shards" in refusal(tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map | {items[0][0]: "../pytorch_model-2.bin"}}))
    assert "not a plain file name" in refusal(tmp_path)
