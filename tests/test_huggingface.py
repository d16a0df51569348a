"""GPT-2 under the names of transformers: exact both ways, equal in loss and gradients, and safe to read."""

import json
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from gpt2_flax.checkpoint.checksums import write_sums
from gpt2_flax.checkpoint.huggingface import (
    TABLE,
    from_hf_config,
    from_state_dict,
    read_folder,
    to_hf_config,
    to_state_dict,
)
from gpt2_flax.config import ModelConfig
from gpt2_flax.errors import ExitCode, UserError

CONFIG = ModelConfig(vocab_size=50, n_positions=12, n_layer=2, n_head=3, n_embd=12, dtype="float32")


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    sizes = {"3": 3, "V": config.vocab_size, "N": config.n_positions, "D": config.n_embd, "H": config.n_head}
    sizes |= {"K": config.head_size, "F": 4 * config.n_embd}
    rng, weights = np.random.default_rng(seed), {}
    for entry in TABLE:
        shape = [config.n_layer] if entry.path.startswith("h/") else []
        shape += [sizes[axis] for axis in entry.axes.replace(" ", "")]
        weights[entry.path] = 0.3 * rng.standard_normal(shape, np.float32) + (entry.path.endswith("scale"))
    return weights


def write_folder(folder: Path, config: ModelConfig = CONFIG, **changes: object) -> Path:
    """A good folder, but for `changes` to config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_hf_config(config, 1, 2, 0) | changes))
    save_file(to_state_dict(random_weights(config)), folder / "model.safetensors")
    return folder


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


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].dtype == np.float32
        assert np.array_equal(found[path], array), path


@st.composite
def configs(draw):
    heads, size = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    sizes = {field: draw(st.integers(1, 9)) for field in ("vocab_size", "n_positions", "n_layer")}
    rates = {field: draw(st.sampled_from([0.0, 0.1])) for field in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
    return ModelConfig(**sizes, **rates, n_head=heads, n_embd=heads * size, layer_norm_epsilon=draw(st.floats(1e-9, 1)))


@settings(deadline=None, max_examples=40)
@given(configs())
def test_names_and_config_round_trip_exactly(config):
    weights = random_weights(config)
    state_dict = to_state_dict(weights)
    assert len(state_dict) == 4 + 12 * config.n_layer
    assert all(array.flags.c_contiguous and array.ndim <= 2 for array in state_dict.values())
    assert_same(from_state_dict(state_dict, config), weights)
    values = json.loads(json.dumps(to_hf_config(config, 1, 2, None)))
    assert from_hf_config(values, "config.json") == config


def test_names_may_lack_the_prefix_and_masks_are_left_out():
    weights = random_weights(CONFIG)
    state_dict = {name.removeprefix("transformer."): array for name, array in to_state_dict(weights).items()}
    state_dict |= {"h.0.attn.bias": np.tril(np.ones((1, 1, 12, 12), bool)), "h.1.attn.masked_bias": np.float32(-1e4)}
    assert_same(from_state_dict(state_dict, CONFIG), weights)


def test_a_stored_head_must_equal_the_embedding():
    weights = random_weights(CONFIG)
    state_dict = to_state_dict(weights)
    tied = state_dict | {"lm_head.weight": state_dict["transformer.wte.weight"].copy()}
    assert_same(from_state_dict(tied, CONFIG), weights)
    with pytest.raises(UserError, match="untied heads are not supported yet"):
        from_state_dict(tied | {"lm_head.weight": tied["lm_head.weight"] + 1}, CONFIG)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_becomes_float32(tmp_path, dtype):
    write_folder(tmp_path)
    halves = {name: a.astype(dtype) for name, a in to_state_dict(random_weights(CONFIG)).items()}
    save_file(halves, tmp_path / "model.safetensors")
    _, weights = read_folder(tmp_path)
    assert_same(weights, from_state_dict({name: a.astype(np.float32) for name, a in halves.items()}, CONFIG))


def test_all_misfits_are_counted_and_the_first_five_named_with_shapes():
    state_dict = to_state_dict(random_weights(CONFIG))
    for name in [name for name in state_dict if name.startswith("transformer.h.1.")]:
        state_dict[name.replace(".1.", ".7.")] = state_dict.pop(name)
    state_dict["transformer.h.0.attn.c_attn.bias"] = np.zeros(3, np.float32)
    with pytest.raises(UserError) as caught:
        from_state_dict(state_dict, CONFIG)
    message = str(caught.value)
    assert "h.0.attn.c_attn.bias (3,), (36,) expected" in message
    assert "h.1.attn.c_attn.bias missing, (36,) expected" in message
    assert "and 20 more" in message


def test_shapes_are_compared_before_data_is_read(tmp_path):
    write_folder(tmp_path, n_layer=3)
    message = refusal(tmp_path)
    assert "h.2.attn.c_attn.bias missing" in message


# What transformers says of the same weights


def test_loss_and_gradients_equal_those_of_transformers():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    import jax
    import jax.numpy as jnp

    from gpt2_flax.checkpoint.weights import model_from_weights, weights_of

    weights = random_weights(CONFIG)
    tokens_BT = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (3, CONFIG.n_positions))

    def mean_loss(model):
        log_probs_BTV = jax.nn.log_softmax(model(jnp.asarray(tokens_BT)))
        return -jnp.take_along_axis(log_probs_BTV[:, :-1], tokens_BT[:, 1:, None], -1).mean()

    loss, gradient = jax.jit(jax.value_and_grad(mean_loss))(model_from_weights(CONFIG, weights))

    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**to_hf_config(CONFIG, 1, 2, 0))).eval()
    state_dict = {name: torch.from_numpy(array) for name, array in to_state_dict(weights).items()}
    missing, unexpected = theirs.load_state_dict(state_dict, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    their_loss = theirs(torch.from_numpy(tokens_BT), labels=torch.from_numpy(tokens_BT)).loss
    their_loss.backward()

    np.testing.assert_allclose(loss, their_loss.item(), rtol=1e-5)
    our_gradients = to_state_dict(weights_of(gradient))
    their_gradients = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    assert our_gradients.keys() == their_gradients.keys()
    for name, expected in their_gradients.items():
        difference = np.abs(our_gradients[name] - expected).max()
        assert difference <= 1e-5 * np.abs(expected).max(), name


@pytest.fixture(scope="module")
def their_model():
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**to_hf_config(CONFIG, 1, 2, 0)))


@pytest.mark.parametrize("form", ["one file", "shards", "torch"])
def test_a_folder_saved_by_transformers_is_read_exactly(tmp_path, their_model, form):
    import torch

    their_model.save_pretrained(tmp_path, max_shard_size="4KB" if form == "shards" else "1GB")
    if form == "torch":
        (tmp_path / "model.safetensors").unlink()
        torch.save(their_model.state_dict(), tmp_path / "pytorch_model.bin")
    assert (tmp_path / "model.safetensors.index.json").exists() == (form == "shards")
    config, weights = read_folder(tmp_path)
    assert config.model_copy(update={"dtype": "float32"}) == CONFIG
    expected = {name: tensor.numpy() for name, tensor in their_model.state_dict().items()}
    for name, array in to_state_dict(weights).items():
        assert np.array_equal(array, expected[name]), name


# Damaged and hostile folders


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
    assert field in message or "impossible size" in message


def test_harmless_fields_and_the_other_name_of_gelu_are_accepted(tmp_path):
    write_folder(tmp_path, n_inner=48, activation_function="gelu_pytorch_tanh", reorder_and_upcast_attn=True, n_ctx=9)
    assert read_folder(tmp_path)[0].n_embd == 12


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
        (lambda d: d.update({"lm_head.weight": np.zeros((50, 12), np.float32)}), "untied heads"),
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
    assert "larger than" in refusal(tmp_path)


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
    assert "wte.weight (1048576, 1048576), (50, 12) expected" in refusal(tmp_path)


def test_without_torch_a_pytorch_file_is_refused_with_a_way_out(tmp_path, monkeypatch):
    write_folder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install 'gpt2_flax[export]'" in refusal(tmp_path, ExitCode.USAGE)
