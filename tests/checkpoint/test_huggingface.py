"""GPT-2 under the names of transformers: exact both ways, equal in loss and gradients."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from safetensors.numpy import save_file
from support.weight_folders import CONFIG, configs, from_state_dict, random_weights, write_folder

from gpt2_flax.checkpoint.huggingface import from_hf_config, read_folder, to_hf_config, to_state_dict
from gpt2_flax.errors import UserError


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].dtype == np.float32
        assert np.array_equal(found[path], array), path


@settings(max_examples=40)
@given(configs())
def test_names_and_config_round_trip_exactly(config):
    weights = random_weights(config)
    state_dict = to_state_dict(weights)
    assert len(state_dict) == 4 + 12 * config.n_layer + (not config.tie_word_embeddings)
    assert all(array.flags.c_contiguous and array.ndim <= 2 for array in state_dict.values())
    assert_same(from_state_dict(state_dict, config), weights)
    values = json.loads(json.dumps(to_hf_config(config, 1, 2, None)))
    assert from_hf_config(values, "config.json") == config


def test_names_may_lack_the_prefix_and_masks_are_left_out():
    weights = random_weights(CONFIG)
    state_dict = {name.removeprefix("transformer."): array for name, array in to_state_dict(weights).items()}
    state_dict |= {"h.0.attn.bias": np.tril(np.ones((1, 1, 12, 12), bool)), "h.1.attn.masked_bias": np.float32(-1e4)}
    assert_same(from_state_dict(state_dict, CONFIG), weights)


def test_a_stored_head_must_equal_the_embedding_if_it_is_tied():
    weights = random_weights(CONFIG)
    state_dict = to_state_dict(weights)
    tied = state_dict | {"lm_head.weight": state_dict["transformer.wte.weight"].copy()}
    assert_same(from_state_dict(tied, CONFIG), weights)
    with pytest.raises(UserError, match=r"is true but lm_head\.weight differs from wte\.weight by up to 1\.0e\+00"):
        from_state_dict(tied | {"lm_head.weight": tied["lm_head.weight"] + 1}, CONFIG)


def test_a_head_is_its_own_if_the_config_says_so_whatever_its_numbers(tmp_path):
    folder = write_folder(tmp_path, tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"tie_word_embeddings is false but lm_head\.weight is missing"):
        read_folder(folder)
    weights = random_weights(CONFIG)
    weights["lm_head/embedding"] = weights["wte/embedding"].copy()
    save_file(to_state_dict(weights), folder / "model.safetensors")
    config, found = read_folder(folder)
    assert not config.tie_word_embeddings
    assert_same(found, weights)


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


# What transformers says of the same weights


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_logits_loss_and_gradients_equal_those_of_transformers(tied):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    import jax
    import jax.numpy as jnp

    from gpt2_flax.checkpoint.weights import model_from_weights, weights_of

    config = CONFIG.model_copy(update={"tie_word_embeddings": tied})
    weights = random_weights(config)
    tokens_BT = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (3, CONFIG.n_positions))

    def mean_loss(model):
        logits_BTV = model(jnp.asarray(tokens_BT))
        log_probs_BTV = jax.nn.log_softmax(logits_BTV)
        return -jnp.take_along_axis(log_probs_BTV[:, :-1], tokens_BT[:, 1:, None], -1).mean(), logits_BTV

    model = model_from_weights(config, weights)
    (loss, logits_BTV), gradient = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(model)

    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**to_hf_config(config, 1, 2, 0))).eval()
    state_dict = {name: torch.from_numpy(array) for name, array in to_state_dict(weights).items()}
    missing, unexpected = theirs.load_state_dict(state_dict, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if tied else [], [])
    their_output = theirs(torch.from_numpy(tokens_BT), labels=torch.from_numpy(tokens_BT))
    their_output.loss.backward()

    np.testing.assert_allclose(logits_BTV, their_output.logits.detach().numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(loss, their_output.loss.item(), rtol=1e-5)
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
