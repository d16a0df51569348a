"""Models of UER-py and TencentPretrain: the same logits here, and the same tensors when they go back."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from support.weight_folders import as_tensors, configs, random_weights
from support.weight_folders import write_folder as write_transformers_folder

from gpt2_flax import __main__ as cli
from gpt2_flax.checkpoint.source import Source, load_source
from gpt2_flax.checkpoint.weights import model_from_weights
from gpt2_flax.config.model import ModelConfig
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.formats import uer
from gpt2_flax.formats.uer import read_uer
from gpt2_flax.formats.uer_config import to_uer_config
from gpt2_flax.formats.uer_export import to_uer, write_folder
from gpt2_flax.tokenizers.tokenizer import load_tokenizer

torch = pytest.importorskip("torch")
from support.uer_model import trained  # noqa: E402 -- needs torch

SIZES = (60, 20, 2, 64, 4)  # vocabulary, positions, layers, width, heads
HEADS = {"heads_num": 4}


@pytest.fixture(scope="module")
def model():
    return trained(60, SIZES)


@pytest.fixture
def state_dict(model):
    return {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}


@pytest.fixture
def file(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "model.bin-60")
    return tmp_path / "model.bin-60"


def uer_config(tmp_path, **values):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(HEADS | values))
    return path


def from_uer(state_dict, uer_config):
    return uer.from_uer(as_tensors(state_dict), uer_config, "state dict", "UER config")


def difference(model, config, weights):
    tokens = np.random.default_rng(1).integers(0, SIZES[0], (3, SIZES[1]))
    with torch.inference_mode():
        theirs = model(torch.from_numpy(tokens)).numpy()
    ours = model_from_weights(config.model_copy(update={"dtype": "float32"}), weights)
    return float(np.abs(theirs - jax.jit(lambda model: model(tokens))(ours)).max())


@pytest.mark.slow
def test_logits_are_theirs_and_renaming_alone_is_not_enough(model, state_dict):
    config, weights = from_uer(state_dict, HEADS)
    exact = difference(model, config, weights)
    assert exact < 1e-4
    gains = {path: array * np.sqrt(64 / 63) if path.endswith("scale") else array for path, array in weights.items()}
    assert difference(model, config, gains) > 10 * exact
    epsilon = config.model_copy(update={"layer_norm_epsilon": 1e-5})
    assert difference(model, epsilon, gains) > 1e-2
    assert difference(model, epsilon, weights) > 10 * exact


@pytest.mark.slow
def test_sizes_come_from_shapes_and_the_rest_from_the_config(file, tmp_path):
    config, weights = read_uer(file, uer_config(tmp_path, dropout=0.2, tie_weights=True, embedding=["word", "pos"]))
    assert (config.vocab_size, config.n_positions, config.n_layer, config.n_embd, config.n_head) == SIZES
    assert (config.layer_norm_epsilon, config.embd_pdrop, config.attn_pdrop, config.resid_pdrop) == (
        1e-7,
        0.2,
        0.2,
        0.2,
    )
    assert read_uer(file)[0].n_head == 1
    assert all(array.dtype == np.float32 and array.flags.c_contiguous for array in weights.values())


@pytest.mark.slow
def test_their_own_config_reads_back(file, tmp_path):
    config, _ = read_uer(file, uer_config(tmp_path))
    (tmp_path / "back.json").write_text(json.dumps(to_uer_config(config)))
    assert read_uer(file, tmp_path / "back.json")[0] == config


@pytest.mark.slow
def test_there_and_back_is_exact(model, state_dict):
    config, weights = from_uer(state_dict, HEADS)
    back = to_uer(weights, config)
    assert back.keys() == state_dict.keys()
    for name, array in back.items():
        assert array.flags.c_contiguous
        np.testing.assert_allclose(array, state_dict[name], rtol=1e-6, atol=0)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in back.items()}, strict=True)


@settings(max_examples=30)
@given(configs())
def test_any_model_goes_there_and_comes_back(config):
    if config.n_embd == 1:
        return  # their layer norm divides by n - 1
    weights = random_weights(config)
    found, again = from_uer(to_uer(weights, config), {"heads_num": config.n_head})
    assert (found.n_layer, found.n_embd, found.n_positions) == (config.n_layer, config.n_embd, config.n_positions)
    assert found.tie_word_embeddings == config.tie_word_embeddings
    assert again.keys() == weights.keys()
    for path, array in weights.items():
        np.testing.assert_allclose(again[path], array, rtol=1e-6, atol=0, err_msg=path)


@pytest.mark.slow
def test_old_names_files_before_torch_1_6_and_float16_are_read(state_dict, tmp_path):
    old = {
        "embedding.word_embedding.weight": state_dict.pop("embedding.word.embedding.weight"),
        "embedding.position_embedding.weight": state_dict.pop("embedding.pos.embedding.weight"),
        "target.output_layer.weight": state_dict.pop("target.lm.output_layer.weight"),
    }
    tensors = {name: torch.from_numpy(array).half() for name, array in (state_dict | old).items()}
    torch.save(tensors, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    config, weights = read_uer(tmp_path / "old.bin")
    assert config.n_layer == 2
    np.testing.assert_array_equal(weights["wte/embedding"], old["target.output_layer.weight"].astype(np.float16))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("encoder.layer_norm.beta"), "encoder.layer_norm.beta missing, (64,) expected"),
        (lambda d: d.update({"encoder.transformer.0.extra": np.zeros(3, np.float32)}), "'encoder.transformer.0.extra'"),
        (lambda d: d.update({"encoder.layer_norm.beta": np.zeros(3, np.float32)}), "(3,), (64,) expected"),
        (lambda d: d.update({"encoder.layer_norm.beta": np.zeros(64, np.int64)}), "'int64', float32"),
        (lambda d: d.update({"target.lm.output_layer.bias": np.zeros(60, np.float32)}), "output_layer.bias' (60,) not"),
        (lambda d: d.pop("encoder.transformer.1.feed_forward.linear_1.weight"), "linear_1.weight missing, (256, 64)"),
        (lambda d: d.pop("embedding.pos.embedding.weight"), "no embedding.pos.embedding.weight with two axes"),
        (lambda d: d.pop("target.lm.output_layer.weight"), '{"tie_weights": true}'),
        (lambda d: d.update({"embedding.word_embedding.weight": np.zeros(1)}), "stands there twice"),
        (lambda d: [d.pop(name) for name in list(d) if ".transformer." in name], "n_layer"),
    ],
)
def test_tensors_that_do_not_fit_are_named(state_dict, change, said):
    change(state_dict)
    with pytest.raises(UserError) as caught:
        from_uer(state_dict, HEADS)
    assert said in str(caught.value)
    assert caught.value.exit_code == ExitCode.DATA
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"layernorm_positioning": "post"}, "layernorm_positioning"),
        ({"tie_weights": "no"}, "tie_weights 'no' is not supported"),
        ({"target": ["mlm"]}, "target"),
        ({"parameter_sharing": 1}, "parameter_sharing"),
        ({"heads_num": 5}, "not a multiple"),
        ({"heads_num": "4"}, "n_head"),
        ({"layers_num": 12}, "n_layer is 12 by the config but 2"),
        ({"max_seq_length": 1024}, "n_positions is 1024"),
        ({"hidden_size": 64, "emb_size": 128}, "emb_size 128"),
        ({"hidden_size": 64, "feedforward_size": 64}, "feedforward_size 64"),
        ({"nonsense": 1}, "unknown field 'nonsense'"),
    ],
)
def test_a_config_of_another_model_is_refused_by_field(file, tmp_path, values, said):
    with pytest.raises(UserError) as caught:
        read_uer(file, uer_config(tmp_path, **values))
    assert said in str(caught.value)
    assert "config.json" in str(caught.value)


@pytest.mark.slow
def test_heads_that_cannot_be_told_are_asked_for(state_dict):
    narrow = to_uer(random_weights(small := ModelConfig(vocab_size=9, n_embd=12, n_head=3, n_layer=1)), small)
    with pytest.raises(UserError, match="heads_num") as caught:
        from_uer(narrow, {})
    assert caught.value.exit_code == ExitCode.USAGE


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(UserError, match="file not found"):
        read_uer(tmp_path / "none.bin")
    (tmp_path / "text.bin").write_text("no tensors")
    with pytest.raises(UserError, match="damaged or unsafe"):
        read_uer(tmp_path / "text.bin")
    torch.save({"a": object()}, tmp_path / "unsafe.bin")
    with pytest.raises(UserError, match="damaged or unsafe"):
        read_uer(tmp_path / "unsafe.bin")
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "vast.bin")
    with pytest.raises(UserError, match=r"'a' \(1000000, 1000000\) is larger than the file"):
        read_uer(tmp_path / "vast.bin")


# Commands


@pytest.fixture
def vocabulary(tmp_path):
    """A BERT vocabulary of as many tokens as the model has rows."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*special, *(chr(0x4E00 + i) for i in range(SIZES[0] - len(special)))]) + "\n")
    return path


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return ended.value.code


@pytest.mark.slow
def test_import_says_how_exact_it_is_and_makes_a_run(file, vocabulary, tmp_path, capsys):
    options = ("--tokenizer", vocabulary, "--uer-config", uer_config(tmp_path))
    assert run("import", file, tmp_path / "run", *options) == 0
    said = capsys.readouterr().out
    assert "logits of 40 tokens are those of UER-py within" in said
    assert float(said.split()[-1]) < 1e-4
    source = load_source(tmp_path / "run")
    assert (source.model, source.step) == (read_uer(file, options[-1])[0], 0)
    assert run("generate", tmp_path / "run", "--prompt", "一丁", "--max-new-tokens", 2) == 0


@pytest.mark.slow
def test_a_file_needs_a_vocabulary_and_a_folder_no_uer_config(file, tmp_path, capsys, vocabulary):
    assert run("import", file, tmp_path / "run") == ExitCode.USAGE
    assert "--tokenizer vocab.txt" in capsys.readouterr().err
    assert run("generate", file, "--prompt", "一") == ExitCode.USAGE
    (tmp_path / "config.json").write_text("{}")  # makes it a folder of a model
    assert run("import", tmp_path, tmp_path / "run", "--uer-config", vocabulary) == ExitCode.USAGE
    assert run("import", file, tmp_path / "run", "--tokenizer", vocabulary, "--uer-config", vocabulary) == ExitCode.DATA
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_convert_there_and_back(model, file, vocabulary, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    options = ("--tokenizer", vocabulary, "--uer-config", uer_config(tmp_path))
    assert run("convert", file, tmp_path / "hf", "--format", "bin", *options) == 0
    tokens = torch.randint(0, SIZES[0], (2, 20), generator=torch.Generator().manual_seed(0))
    for safetensors in (True, False):
        theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf", use_safetensors=safetensors)
        with torch.inference_mode():
            assert (theirs(tokens).logits - model(tokens)).abs().max() < 1e-4
    assert run("convert", tmp_path / "hf", tmp_path / "back", "--format", "uer") == 0
    assert "those of UER-py within" in capsys.readouterr().out.splitlines()[-1]
    back = torch.load(tmp_path / "back" / "model.bin", weights_only=True)
    model.load_state_dict(back, strict=True)
    for name, tensor in torch.load(file, weights_only=True).items():
        torch.testing.assert_close(back[name], tensor, rtol=1e-6, atol=1e-6)
    assert (tmp_path / "back" / "vocab.txt").read_bytes() == vocabulary.read_bytes()
    again = ("--tokenizer", tmp_path / "back" / "vocab.txt", "--uer-config", tmp_path / "back" / "uer_config.json")
    assert run("import", tmp_path / "back" / "model.bin", tmp_path / "run", *again) == 0
    assert run("convert", tmp_path / "run", tmp_path / "back", "--format", "uer") == ExitCode.CANT_CREATE


@pytest.mark.slow
def test_a_run_of_another_epsilon_goes_to_uer_with_a_word_about_it(config, tokenizer_folder, tmp_path, capsys):
    small = config.model.with_vocab_size(load_tokenizer(tokenizer_folder).vocab_size)
    source = Source("here", small, random_weights(small), tokenizer_folder)
    compared = write_folder(source, tmp_path / "uer")
    assert "layer_norm_epsilon is 1e-05 here, where 1e-07 is nearest to UER-py" in str(compared)
    exact = dataclasses.replace(source, model=small.model_copy(update={"layer_norm_epsilon": 1e-7}))
    assert "epsilon" not in str(again := write_folder(exact, tmp_path / "uer", overwrite=True))
    assert again.max_logit_difference < 1e-5 * max(10, again.max_logit)
    saved = torch.load(tmp_path / "uer" / "model.bin", weights_only=True)
    head, words = saved["target.lm.output_layer.weight"], saved["embedding.word.embedding.weight"]
    assert head.data_ptr() == words.data_ptr()


@pytest.mark.slow
def test_numbers_that_are_not_finite_are_refused(state_dict, vocabulary, tmp_path, capsys):
    state_dict["encoder.layer_norm.gamma"][3] = np.nan
    torch.save({name: torch.from_numpy(array) for name, array in state_dict.items()}, tmp_path / "nan.bin")
    assert run("import", tmp_path / "nan.bin", tmp_path / "run", "--tokenizer", vocabulary) == ExitCode.DATA
    assert "1 of the 64 numbers of encoder.layer_norm.gamma are NaN or infinite" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["embedding.word.embedding.weight", "target.lm.output_layer.weight"])
@pytest.mark.parametrize("tied", [{}, {"tie_weights": True}, {"tie_weights": False}])
def test_embeddings_that_are_not_finite_are_refused_by_name(state_dict, name, tied):
    state_dict[name] = state_dict[name].copy()
    state_dict[name][5] = np.inf
    with pytest.raises(UserError, match=f"64 of the 3840 numbers of {name} are NaN or infinite"):
        from_uer(state_dict, HEADS | tied)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_left_out(model, state_dict, prefix, tmp_path):
    torch.save({prefix + name: torch.from_numpy(array) for name, array in state_dict.items()}, tmp_path / "model.bin")
    config, weights = read_uer(tmp_path / "model.bin", uer_config(tmp_path))
    assert difference(model, config, weights) < 1e-4


def test_a_folder_without_tokenizer_gets_one(vocabulary, tmp_path):
    write_transformers_folder(
        tmp_path / "hf", ModelConfig(vocab_size=60, n_positions=12, n_layer=1, n_head=3, n_embd=12)
    )
    assert run("import", tmp_path / "hf", tmp_path / "run") != 0
    assert run("import", tmp_path / "hf", tmp_path / "run", "--tokenizer", vocabulary) == 0


@pytest.mark.slow
def test_the_model_card_of_what_was_not_trained_here_does_not_say_so(file, vocabulary, tmp_path):
    options = ("--tokenizer", vocabulary, "--uer-config", uer_config(tmp_path))
    assert run("convert", file, tmp_path / "hf", "--language", "zh", *options) == 0
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    assert "converted by gpt2_flax" in card
    assert "pre-trained with" not in card
