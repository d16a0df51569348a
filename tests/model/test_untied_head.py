"""A head of its own, `model.tie_word_embeddings = false`: trained, read, written and used like one that is shared."""

import importlib
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from support.configs import changed
from support.rows import batches_of, rows
from support.weight_folders import as_tensors, random_weights

from gpt2_flax.checkpoint.huggingface import read_folder, to_state_dict
from gpt2_flax.checkpoint.source import Source, load_source, save_as_run
from gpt2_flax.checkpoint.weights import logits_of, model_from_weights, weights_of
from gpt2_flax.config.model import ModelConfig
from gpt2_flax.data.dataset import TokenDataset
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.export.transformers_folder import export_folder
from gpt2_flax.formats.uer import from_uer, read_uer
from gpt2_flax.formats.uer_config import to_uer_config
from gpt2_flax.formats.uer_export import to_uer, write_folder
from gpt2_flax.inference.decode import generate
from gpt2_flax.inference.evaluation import evaluate
from gpt2_flax.inference.per_document import evaluate_documents
from gpt2_flax.inference.sampling import Sampling
from gpt2_flax.model.decoding import decoder_of
from gpt2_flax.model.gpt2 import GPT2
from gpt2_flax.parallel.device_batches import device_batch
from gpt2_flax.parallel.mesh import MeshSizes, make_mesh
from gpt2_flax.tokenizers.tokenizer import load_tokenizer
from gpt2_flax.training.open_stage import check_fits
from gpt2_flax.training.optimizer import make_optimizer
from gpt2_flax.training.step import initial_state, make_train_step, state_layout

HEAD = "lm_head/embedding"
SIZES = {"n_positions": 32, "n_layer": 2, "n_head": 2, "n_embd": 32, "dtype": "float32"}


@pytest.fixture
def untied(config):
    """A run of a model with a head of its own."""
    size = TokenDataset(config.data.dataset).info.vocab_size
    return changed(config, model__vocab_size=size, model__tie_word_embeddings=False)


@pytest.fixture(scope="module")
def source(tokenizer_folder):
    size = load_tokenizer(tokenizer_folder).vocab_size
    model = ModelConfig(vocab_size=size, tie_word_embeddings=False, layer_norm_epsilon=1e-7, **SIZES)
    return Source("here", model, random_weights(model), tokenizer_folder)


def trained(config, shape, steps=2):
    """Losses, and weights at the start and the end, of training on a mesh of this shape."""
    sizes = MeshSizes(**dict(zip(("data", "fsdp", "tensor"), shape, strict=True)))
    mesh = make_mesh(sizes, jax.devices()[: math.prod(shape)])
    loader = batches_of(TokenDataset(config.data.dataset).train, config.data.seq_length, seed=0)
    n_rows, losses = config.data.global_batch_size, []
    with jax.set_mesh(mesh):
        layout = state_layout(config, mesh)
        state, step = initial_state(config, layout), make_train_step(config, layout, mesh)
        start = weights_of(state.model)
        for number in range(steps):
            batch = device_batch(mesh, n_rows, loader.batch, number * n_rows)
            state, metrics = step(state, batch)
            losses.append(float(metrics.loss))
    assert not np.asarray(state.model.lm_head.embedding[...])[config.model.vocab_size :].any()
    return losses, start, weights_of(state.model)


@pytest.mark.slow
def test_losses_are_the_same_on_eight_devices_and_the_head_goes_its_own_way(untied, capfd):
    untied = changed(untied, optimizer__warmup=0)
    expected, start, end = trained(untied, (1, 1, 1))
    np.testing.assert_allclose(trained(untied, (2, 2, 2))[0], expected, rtol=1e-5)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    assert expected[1] < expected[0]
    steps = {path: np.abs(end[path] - start[path]).max() for path in (HEAD, "wte/embedding")}
    assert min(steps.values()) > 1e-3
    assert start[HEAD].shape == start["wte/embedding"].shape
    assert not np.array_equal(start[HEAD], start["wte/embedding"])


@pytest.mark.slow
def test_all_else_is_drawn_as_in_a_model_whose_head_is_tied(untied):
    tied = untied.model.model_copy(update={"tie_word_embeddings": True})
    ours, theirs = (weights_of(GPT2(model, rngs=nnx.Rngs(3))) for model in (untied.model, tied))
    assert ours.keys() - theirs.keys() == {HEAD}
    for path, array in theirs.items():
        np.testing.assert_array_equal(array, ours[path], err_msg=path)
    assert ours[HEAD].std() == pytest.approx(untied.model.initializer_range, rel=0.1)
    assert sum(array.size for array in ours.values()) == untied.model.parameters


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("decayed", [False, True])
def test_the_optimizer_treats_the_head_as_an_embedding(untied, name, decayed):
    keys = {"name": name, "decay_embeddings": decayed, "weight_decay": 0.5, "warmup": 0, "max_grad_norm": 0.0}
    config = changed(untied, **{f"optimizer__{key}": value for key, value in keys.items()})
    tx, model = make_optimizer(config), model_from_weights(config.model, random_weights(config.model))
    update = jax.jit(tx.update)
    updates, _ = update(jax.tree.map(np.zeros_like, model), tx.init(model), model)
    weights, found, rate = weights_of(model), weights_of(updates), config.optimizer.learning_rate
    for path, share in ((HEAD, 1), ("wte/embedding", 1), ("wpe/embedding", 1 / 200 if name == "muon" else 1)):
        np.testing.assert_allclose(found[path], -rate * share * 0.5 * decayed * weights[path], rtol=1e-5, err_msg=path)
    gradients = model_from_weights(config.model, random_weights(config.model, seed=1))
    steps = weights_of(update(gradients, tx.init(model), model)[0])
    if not decayed:  # Adam's first step is the sign of the gradient
        np.testing.assert_allclose(np.abs(steps[HEAD]), rate, rtol=1e-4)


@pytest.mark.slow
def test_documents_are_evaluated_with_it(source, dataset_folder):
    model, mesh = model_from_weights(source.model, source.weights), make_mesh(MeshSizes(), jax.devices()[:1])
    split = TokenDataset(dataset_folder).validation
    with jax.set_mesh(mesh):
        each = evaluate_documents(model, split, 16, "stream", mesh, 8, None)
        whole = evaluate(model, rows(split, 16), mesh, 8)
    assert sum(found.nats for found in each) == pytest.approx(whole.nats, rel=1e-5)


@pytest.mark.slow
def test_a_run_of_one_is_saved_and_loaded_exactly(source, tmp_path):
    save_as_run(source, tmp_path / "run")
    again = load_source(tmp_path / "run")
    assert again.model == source.model
    for path, array in source.weights.items():
        np.testing.assert_array_equal(again.weights[path], array, err_msg=path)


def test_what_was_saved_before_there_was_the_key_is_tied(source):
    saved = source.model.model_dump()
    del saved["tie_word_embeddings"]
    assert ModelConfig.model_validate(saved).tie_word_embeddings


def test_a_run_does_not_start_from_a_model_whose_head_is_of_the_other_kind(untied):
    tied = untied.model.model_copy(update={"tie_word_embeddings": True})
    with pytest.raises(UserError, match=r"model\.tie_word_embeddings is false but true in init_from") as caught:
        check_fits(untied, tied)
    assert "set model.tie_word_embeddings = true" in str(caught.value)
    assert caught.value.exit_code == ExitCode.CONFIG
    check_fits(untied, untied.model)


# transformers


@pytest.mark.slow
def test_a_folder_of_transformers_comes_back_bit_for_bit_and_goes_on_as_there(source, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = {name: getattr(source.model, name) for name in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")}
    torch.manual_seed(0)
    config = transformers.GPT2Config(**sizes, initializer_range=0.6, tie_word_embeddings=False, bos_token_id=2)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    found, weights = read_folder(tmp_path / "theirs")
    assert not found.tie_word_embeddings
    expected = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    verification = export_folder(weights, found, load_tokenizer(source.tokenizer_folder), tmp_path / "ours", card="")
    assert verification.max_logit_difference <= 1e-5 * max(10, verification.max_logit)
    for again in (weights, read_folder(tmp_path / "ours")[1]):
        state_dict = to_state_dict(again)
        assert state_dict.keys() == expected.keys()
        assert all(np.array_equal(array, expected[name]) for name, array in state_dict.items())
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["tie_word_embeddings"] is False
    assert not transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").config.tie_word_embeddings
    prompt = torch.tensor([[2, 7, 9]])
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    text = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, 3:].tolist()
    ours = model_from_weights(found.model_copy(update={"dtype": "float32"}), weights)
    assert generate(decoder_of(ours), prompt.tolist(), -1, 12, Sampling(temperature=0.0)) == [text]


@pytest.mark.parametrize("format", ["bin", "gguf"])
def test_other_formats_hold_it_too(source, tmp_path, format):
    pytest.importorskip({"bin": "torch"}.get(format, format))
    tokenizer, out = load_tokenizer(source.tokenizer_folder), tmp_path / "out"
    export_folder(source.weights, source.model, tokenizer, out, card="", format=format, verify=False)
    if format == "gguf":
        import gguf

        tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(out / "model.gguf").tensors}
        head, words = tensors["output.weight"], tensors["token_embd.weight"]
    else:
        (out / "model.safetensors").unlink()
        (out / "SHA256SUMS").unlink()
        weights = read_folder(out)[1]
        head, words = weights[HEAD], weights["wte/embedding"]
    np.testing.assert_array_equal(head, source.weights[HEAD])
    np.testing.assert_array_equal(words, source.weights["wte/embedding"])


# UER-py


@pytest.mark.slow
def test_a_model_of_uer_is_read_and_goes_back(tmp_path):
    torch = pytest.importorskip("torch")
    from support.uer_model import trained

    model = trained(10, (60, 20, 2, 64, 4), tied=False)
    torch.save(model.state_dict(), tmp_path / "model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"heads_num": 4, "tie_weights": False}))
    config, weights = read_uer(tmp_path / "model.bin", tmp_path / "config.json")
    assert not config.tie_word_embeddings
    tokens = np.random.default_rng(1).integers(0, 60, (3, 20))
    with torch.inference_mode():
        expected = model(torch.from_numpy(tokens)).numpy()
    assert np.abs(logits_of(weights, config, tokens) - expected).max() < 1e-4
    back = {name: torch.from_numpy(array) for name, array in to_uer(weights, config).items()}
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(back[name], tensor, rtol=1e-6, atol=0)
    assert to_uer_config(config)["tie_weights"] is False


def test_a_folder_for_uer_is_compared_with_the_head_that_it_has(source, tmp_path):
    torch = pytest.importorskip("torch")
    compared = write_folder(source, tmp_path / "uer")
    assert compared.max_logit_difference < 1e-5 * max(10, compared.max_logit)
    saved = torch.load(tmp_path / "uer" / "model.bin", weights_only=True)
    np.testing.assert_array_equal(saved["target.lm.output_layer.weight"].numpy(), source.weights[HEAD])
    again, _ = read_uer(tmp_path / "uer" / "model.bin", tmp_path / "uer" / "uer_config.json")
    assert not again.tie_word_embeddings


def test_what_the_config_of_uer_says_goes_before_what_the_numbers_say(source):
    tied = source.model.model_copy(update={"tie_word_embeddings": True})
    shared = to_uer({path: array for path, array in source.weights.items() if path != HEAD}, tied)
    apart, heads = to_uer(source.weights, source.model), {"heads_num": 2}
    assert from_uer(as_tensors(shared), heads, "", "")[0].tie_word_embeddings
    assert not from_uer(as_tensors(shared), heads | {"tie_weights": False}, "", "")[0].tie_word_embeddings
    assert not from_uer(as_tensors(apart), heads, "", "")[0].tie_word_embeddings
    with pytest.raises(UserError, match=r"tie_weights is true but target\.lm\.output_layer\.weight differs from"):
        from_uer(as_tensors(apart), heads | {"tie_weight": True}, "", "")


@pytest.mark.parametrize(
    ("said", "flags", "tied"), [(False, [], False), (False, ["--tie_weights"], True), (True, [], True)]
)
def test_pretrain_ties_the_head_only_if_told_to_as_uer_does(tmp_path, monkeypatch, said, flags, tied):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    pretrain = importlib.import_module("pretrain")
    sizes = {"hidden_size": 32, "layers_num": 2, "heads_num": 4} | ({"tie_weights": True} if said else {})
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    needed = ["--config_path", str(tmp_path / "config.json"), "--output_model_path", "model.bin"]
    model = pretrain._model(pretrain._flags().parse([*needed, *flags]))
    assert model["tie_word_embeddings"] is tied
