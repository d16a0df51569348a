"""Checkpoints of nanoGPT: the same logits here as a torch model with its names computes."""

import json
import math

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from gpt2_flax import __main__ as cli
from gpt2_flax.checkpoint.source import load_source
from gpt2_flax.checkpoint.tensor_files import read_torch
from gpt2_flax.checkpoint.weights import model_from_weights
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.formats.nanogpt import read_content

torch = pytest.importorskip("torch")

VOCABULARY, LENGTH, LAYERS, HEADS, WIDTH = 70, 12, 2, 3, 24


class Attention(torch.nn.Module):
    def __init__(self, bias: bool):
        super().__init__()
        self.c_attn = torch.nn.Linear(WIDTH, 3 * WIDTH, bias=bias)
        self.c_proj = torch.nn.Linear(WIDTH, WIDTH, bias=bias)
        self.register_buffer("bias", torch.ones(LENGTH, LENGTH).tril()[None, None])  # stored by versions without flash

    def forward(self, x):
        rows, length, _ = x.shape
        q, k, v = (part.reshape(rows, length, HEADS, -1) for part in self.c_attn(x).split(WIDTH, dim=2))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(WIDTH / HEADS)
        shares = scores.masked_fill(self.bias[:, :, :length, :length] == 0, -math.inf).softmax(-1)
        return self.c_proj(torch.einsum("bhqk,bkhd->bqhd", shares, v).reshape(rows, length, WIDTH))


class Block(torch.nn.Module):
    def __init__(self, bias: bool, gelu: str):
        super().__init__()
        self.ln_1, self.ln_2 = (torch.nn.LayerNorm(WIDTH, bias=bias) for _ in range(2))
        self.attn = Attention(bias)
        self.mlp = torch.nn.ModuleDict(
            {
                "c_fc": torch.nn.Linear(WIDTH, 4 * WIDTH, bias=bias),
                "gelu": torch.nn.GELU(approximate=gelu),
                "c_proj": torch.nn.Linear(4 * WIDTH, WIDTH, bias=bias),
            }
        )

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](self.mlp["gelu"](self.mlp["c_fc"](self.ln_2(x))))


class Model(torch.nn.Module):
    """The names and shapes of nanoGPT's state dict."""

    def __init__(self, bias: bool, gelu: str = "tanh"):
        super().__init__()
        parts = {"wte": torch.nn.Embedding(VOCABULARY, WIDTH), "wpe": torch.nn.Embedding(LENGTH, WIDTH)}
        parts |= {"h": torch.nn.ModuleList(Block(bias, gelu) for _ in range(LAYERS))}
        self.transformer = torch.nn.ModuleDict(parts | {"ln_f": torch.nn.LayerNorm(WIDTH, bias=bias)})
        self.lm_head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = parts["wte"].weight
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + (".ln_" in name))

    def forward(self, tokens):
        x = self.transformer["wte"](tokens) + self.transformer["wpe"](torch.arange(tokens.shape[1]))
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


def checkpoint_of(model: Model, bias: bool, prefix: str = "", **arguments: object) -> dict[str, object]:
    """What train.py of nanoGPT saves."""
    sizes = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "block_size": LENGTH, "vocab_size": VOCABULARY}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return {
        "model": {prefix + name: tensor for name, tensor in model.state_dict().items()},
        "optimizer": torch.optim.AdamW(parameters).state_dict(),
        "model_args": sizes | {"bias": bias, "dropout": 0.2} | arguments,
        "iter_num": 5,
        "best_val_loss": torch.tensor(3.5),
        "config": {"dataset": "shakespeare_char", "learning_rate": 6e-4, "compile": True},
    }


def difference(model: Model, config, weights) -> float:
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (3, LENGTH))
    with torch.inference_mode():
        theirs = model(torch.from_numpy(tokens)).numpy()
    ours = model_from_weights(config.model_copy(update={"dtype": "float32"}), weights)
    return float(np.abs(theirs - jax.jit(lambda model: model(tokens))(ours)).max())


def read(checkpoint, path):
    torch.save(checkpoint, path)
    return read_content(read_torch(path, ""), path)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_logits_are_theirs(bias, prefix, tmp_path):
    model = Model(bias)
    config, weights = read(checkpoint_of(model, bias, prefix), tmp_path / "ckpt.pt")
    assert difference(model, config, weights) < 1e-4
    sizes = (config.vocab_size, config.n_positions, config.n_layer, config.n_head, config.n_embd)
    assert sizes == (VOCABULARY, LENGTH, LAYERS, HEADS, WIDTH)
    assert (config.tie_word_embeddings, config.resid_pdrop, config.layer_norm_epsilon) == (True, 0.2, 1e-5)


def test_matrices_of_a_square_shape_are_transposed_too(tmp_path):
    _, weights = read(checkpoint_of(model := Model(bias=True), bias=True), tmp_path / "ckpt.pt")
    theirs = model.state_dict()["transformer.h.1.attn.c_proj.weight"].numpy()
    np.testing.assert_array_equal(weights["h/attn/c_proj/kernel"][1].reshape(WIDTH, WIDTH), theirs.T)


def test_a_head_of_its_own_is_kept(tmp_path):
    model = Model(bias=True)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCABULARY, WIDTH))
    config, weights = read(checkpoint_of(model, bias=True), tmp_path / "ckpt.pt")
    assert not config.tie_word_embeddings
    assert difference(model, config, weights) < 1e-4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["model_args"].pop("n_head"), "model_args are not nanoGPT's (['n_head'])"),
        (lambda c: c["model_args"].update(n_kv_head=1), "model_args are not nanoGPT's (['n_kv_head'])"),
        (lambda c: c["model_args"].update(n_head=5), "n_embd"),
        (lambda c: c["model_args"].update(n_layer=3), "h.2.attn.c_attn.weight missing"),
        (lambda c: c["model_args"].update(bias=True), "h.0.attn.c_attn.bias missing"),
        (lambda c: c["model"].pop("transformer.wpe.weight"), "wpe.weight missing"),
        (lambda c: c["model"].pop("transformer.wte.weight"), "wte.weight missing"),
        (lambda c: c.update(model=[1]), "not a state dict"),
        (lambda c: c["model"].update(x=torch.zeros(1).expand(10**6, 10**6)), "larger than the file"),
        (lambda c: c["model"]["transformer.ln_f.weight"].fill_(math.nan), "24 of the 24 numbers of ln_f.weight"),
    ],
)
def test_what_does_not_fit_is_named(change, said, tmp_path):
    checkpoint = checkpoint_of(Model(bias=False), bias=False)
    change(checkpoint)
    with pytest.raises(UserError) as caught:
        read(checkpoint, tmp_path / "ckpt.pt")
    assert said in str(caught.value)
    assert caught.value.exit_code == ExitCode.DATA
    assert "\n" not in str(caught.value)


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return ended.value.code


@pytest.fixture
def characters(tmp_path):
    """A tokenizer.json of single characters, as docs/from_nanogpt.md makes it; five ids less than the model."""
    alphabet = "\n" + "".join(chr(ord("!") + index) for index in range(VOCABULARY - 6))
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(tmp_path / "characters.json"))
    return tmp_path / "characters.json"


@pytest.mark.slow
def test_import_and_convert_say_how_exact_they_are(characters, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    models = {gelu: Model(bias=False, gelu=gelu) for gelu in ("tanh", "none")}
    torch.save(checkpoint_of(models["tanh"], bias=False), tmp_path / "ckpt.pt")
    options = ("--tokenizer", characters, "--eos", "\n")
    assert run("import", tmp_path / "ckpt.pt", tmp_path / "run", *options) == 0
    said = capsys.readouterr().out.split("within ")
    by_tanh, exact = (float(part.split()[0]) for part in said[1:])
    source = load_source(tmp_path / "run")
    tokenizer = source.tokenizer()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 0, VOCABULARY - 5)
    assert by_tanh < 1e-4 < exact
    assert exact < 2 * difference(models["none"], source.model, source.weights) < 4 * exact
    assert run("generate", tmp_path / "run", "--prompt", "ABC", "--max-new-tokens", 2) == 0
    assert run("convert", tmp_path / "ckpt.pt", tmp_path / "hf", *options) == 0
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf")
    tokens = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert (theirs(tokens).logits - models["tanh"](tokens)).abs().max() < 1e-4
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["vocab_size"]) == (0, 0, VOCABULARY)


def test_what_is_missing_is_asked_for(characters, tmp_path, capsys):
    torch.save(checkpoint_of(Model(bias=True), bias=True), tmp_path / "ckpt.pt")
    assert run("import", tmp_path / "ckpt.pt", tmp_path / "run") == ExitCode.USAGE
    assert "a file of nanoGPT has no vocabulary" in (said := capsys.readouterr().err)
    assert "--tokenizer" in said
    assert "meta.pkl is never read" in said
    tokenizer = ("--tokenizer", characters)
    assert run("import", tmp_path / "ckpt.pt", tmp_path / "run", *tokenizer) == ExitCode.DATA
    assert "--bos TOKEN --eos TOKEN" in capsys.readouterr().err
    assert run("import", tmp_path / "ckpt.pt", tmp_path / "run", *tokenizer, "--eos", "天") == ExitCode.USAGE
    assert "--eos '\\u5929' is no token of the vocabulary" in capsys.readouterr().err
    uer = ("--eos", "\n", "--uer-config", characters)
    assert run("import", tmp_path / "ckpt.pt", tmp_path / "run", *tokenizer, *uer) == ExitCode.USAGE
    assert not (tmp_path / "run").exists()
