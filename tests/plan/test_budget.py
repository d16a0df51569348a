"""What `plan --budget` proposes: the published laws, written out again in float64, and the config that it prints."""

import math
import re
import tomllib
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_flax import __main__ as cli
from gpt2_flax.config.file import load_config
from gpt2_flax.config.parse import parse_config
from gpt2_flax.data.dataset import TokenDataset
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.parallel.devices import peak_flops
from gpt2_flax.plan.budget import (
    DROPOUT_EPOCHS,
    SHAPES,
    Corpus,
    best_batch,
    choices,
    parse_budget,
    predicted_loss,
    run_values,
)
from gpt2_flax.plan.estimate import figures
from gpt2_flax.plan.topology import devices_for, kind_and_count

ROOT = Path(__file__).parents[2]
A, B, E, ALPHA = np.exp(6.255414), np.exp(7.3049974), np.exp(0.6254804), 0.3526596
R_D, R_N = 15.387756, 5.309743
EPOCHS = 1 + R_D * math.log(20)  # a further one is worth 5% of the first


def chinchilla(parameters, tokens):
    return E + A * parameters**-ALPHA + B * tokens**-ALPHA


def constrained(parameters, tokens, corpus):
    """The law for repeated tokens and excess parameters, in the steps of the paper's appendix A."""
    unique_tokens = np.minimum(tokens, corpus)
    g = (ALPHA * A / (ALPHA * B)) ** (1 / (ALPHA + ALPHA))
    unique_parameters = np.minimum((unique_tokens * g) ** (ALPHA / ALPHA) * g, parameters)
    token_repeats = np.maximum(tokens / unique_tokens - 1, 0)
    parameter_repeats = np.maximum(parameters / unique_parameters - 1, 0)
    effective_tokens = unique_tokens + unique_tokens * R_D * (1 - np.exp(-token_repeats / R_D))
    effective_parameters = unique_parameters + unique_parameters * R_N * (1 - np.exp(-parameter_repeats / R_N))
    return chinchilla(effective_parameters, effective_tokens)


def sizes(vocabulary, length):
    """Parameters, and operations for a token, of every shape: written out block by block.

    Half of the tokens are for a quarter of the layers.
    """
    layers, heads, width = np.array([shape[:3] for shape in SHAPES], float).T
    assert (width % heads == 0).all()
    norms, attention, mlp = 4 * width, 4 * width**2 + 4 * width, 8 * width**2 + 5 * width
    parameters = (vocabulary + length) * width + layers * (norms + attention + mlp) + 2 * width
    scores_and_sums = 2 * 2 * length * width  # forward; the products with queries, and with values
    computed = 0.5 * np.maximum(1, layers // 4) + 0.5 * layers
    forward = computed * (2 * 12 * width**2 + scores_and_sums) + 2 * vocabulary * width
    return parameters, 3 * forward


budgets = st.floats(14, 25).map(lambda exponent: 10**exponent)
corpora = st.floats(5, 14).map(lambda exponent: 10**exponent)
vocabularies = st.sampled_from([100, 21128, 50257, 128256])
lengths = st.sampled_from([16, 128, 1024, 4096])


def best(found):
    return min(found, key=lambda choice: choice.loss)


# The laws


def test_losses_are_those_that_the_authors_publish():
    assert predicted_loss(6.34e9, 242e9, 25e9) == pytest.approx(2.2256440889984477, rel=1e-12)
    assert predicted_loss(8.67e9, 178e9, 25e9) == pytest.approx(2.2269634075087867, rel=1e-12)


def test_the_optimum_for_a_small_corpus_is_the_one_that_the_authors_publish():
    parameters = np.geomspace(1e9, 1e11, 20_001)
    losses = [predicted_loss(n, 1e22 / (6 * n), 25e9) for n in parameters]
    assert parameters[np.argmin(losses)] == pytest.approx(7022364735.879969, rel=0.005)  # their grid is that coarse


def test_the_optimum_without_limit_has_twenty_tokens_a_parameter():
    for flops in (1e18, 1e21, 1e24):
        parameters = np.geomspace(1e6, 1e13, 100_001)
        losses = [predicted_loss(n, flops / (6 * n), None) for n in parameters]
        found = parameters[np.argmin(losses)]
        assert found == pytest.approx((A / B) ** (1 / (2 * ALPHA)) * (flops / 6) ** 0.5, rel=1e-3)
        assert flops / (6 * found) / found == pytest.approx(19.6, rel=0.01)


@given(st.floats(1e5, 1e12), st.floats(1e5, 1e14), corpora)
def test_losses_are_those_of_the_formula(parameters, tokens, corpus):
    assert predicted_loss(parameters, tokens, None) == pytest.approx(chinchilla(parameters, tokens), rel=1e-12)
    assert predicted_loss(parameters, tokens, corpus) == pytest.approx(
        constrained(parameters, tokens, corpus), rel=1e-12
    )


# The choice


def test_the_shapes_ascend_and_contain_all_of_gpt2():
    parameters, flops = sizes(50257, 1024)
    assert (np.diff(parameters) > 0).all()
    assert (np.diff(flops) > 0).all()
    published = {"small": 124_439_808, "medium": 354_823_168, "large": 774_030_080, "xl": 1_557_611_200}
    found = {shape.name: int(count) for shape, count in zip(SHAPES, parameters, strict=True)}
    assert {name: found[f"GPT-2 {name}"] for name in published} == published


@given(budgets, vocabularies, lengths)
def test_without_limit_the_choice_is_the_optimum_of_chinchilla(flops, vocabulary, length):
    parameters, per_token = sizes(vocabulary, length)
    losses = chinchilla(parameters, flops / per_token)
    found = choices(flops, Corpus(None, vocabulary, None), length)
    assert [choice.model.parameters for choice in found] == parameters.tolist()
    assert [choice.flops_per_token for choice in found] == per_token.tolist()
    np.testing.assert_allclose([choice.loss for choice in found], losses, rtol=1e-12)
    assert best(found).shape == SHAPES[np.argmin(losses)]
    assert best(found).tokens == flops / per_token[np.argmin(losses)]


@given(budgets, corpora, vocabularies, lengths)
def test_no_larger_or_smaller_shape_has_a_lower_loss(flops, corpus, vocabulary, length):
    parameters, per_token = sizes(vocabulary, length)
    tokens = np.minimum(flops / per_token, corpus * EPOCHS)
    losses = constrained(parameters, tokens, corpus)
    found = choices(flops, Corpus(corpus, vocabulary, None), length)
    np.testing.assert_allclose([choice.loss for choice in found], losses[: len(found)], rtol=1e-12)
    np.testing.assert_allclose([choice.tokens for choice in found], tokens[: len(found)], rtol=1e-12)
    assert best(found).loss == min(choice.loss for choice in found)
    # Larger shapes are left out only after one whose parameters are worth next to nothing; they gain less than it has.
    useful = (A / B) ** (1 / ALPHA) * np.minimum(tokens, corpus)
    excess = parameters > useful * (1 + R_N * math.log(20))
    assert len(found) == (np.argmax(excess) + 1 if excess.any() else len(SHAPES))
    least_term = A * (useful * (1 + R_N)) ** -ALPHA
    assert losses[len(found) :].size == 0 or losses.min() > best(found).loss - 0.02 * least_term[len(found) - 1]


@given(budgets, st.floats(1, 100), st.none() | corpora, vocabularies, lengths)
def test_a_larger_budget_never_has_a_higher_loss(flops, factor, corpus, vocabulary, length):
    smaller, larger = (
        best(choices(amount, Corpus(corpus, vocabulary, None), length)) for amount in (flops, min(flops * factor, 1e26))
    )
    assert larger.loss <= smaller.loss


@given(budgets, corpora, st.floats(1, 100), vocabularies, lengths)
def test_a_larger_corpus_never_has_a_higher_loss(flops, corpus, factor, vocabulary, length):
    smaller, larger = (best(choices(flops, Corpus(n, vocabulary, None), length)) for n in (corpus, corpus * factor))
    assert larger.loss <= smaller.loss * (1 + 1e-12)


def test_a_small_corpus_is_neither_repeated_nor_outgrown_without_end():
    without, with_few = (best(choices(1e21, Corpus(n, 21128, None), 1024)) for n in (None, 30e6))
    assert with_few.model.parameters < without.model.parameters / 10
    assert with_few.tokens == pytest.approx(30e6 * EPOCHS)
    assert with_few.tokens * with_few.flops_per_token < 1e21 / 100


# The config


@given(st.floats(18, 24), st.none() | corpora, lengths, st.sampled_from([1, 2, 6, 8, 256]))
def test_the_config_spends_the_budget_or_exhausts_the_corpus(exponent, corpus, length, n_devices):
    chosen = best(choices(10**exponent, Corpus(corpus, 21128, None), length))
    try:
        values = run_values(chosen, n_devices)
    except UserError:
        assert chosen.tokens < 101 * n_devices * max(length, 2 * best_batch(chosen.tokens))
        return
    values["data"]["dataset"] = "data/mine"
    config = parse_config({"output": "runs/one", **values}, "proposal").with_vocab_size(21128)
    counts = figures(config, None)
    assert counts.parameters == chosen.model.parameters
    assert 0.98 * chosen.tokens < counts.tokens <= chosen.tokens
    if corpus is None or chosen.tokens < 0.999 * corpus * EPOCHS:
        assert 0.98 * 10**exponent < counts.flops < 10**exponent * (1 + 1 / config.training.total_steps)
    assert config.growth_steps == pytest.approx(config.training.total_steps / 2, abs=0.5)
    assert config.growth.n_layer == max(1, config.model.n_layer // 4)
    rows = config.data.global_batch_size
    assert rows % n_devices == 0
    assert rows == n_devices or 2**-0.51 < rows * length / best_batch(chosen.tokens) < 2**0.51


def test_batches_are_those_of_the_published_law():
    assert best_batch(1e9) == pytest.approx(0.58 * math.exp(0.571 * math.log(1e9)))
    assert 70_000 < best_batch(1e9) < 90_000  # tokens


@given(budgets, st.none() | corpora)
def test_dropout_is_proposed_for_text_that_is_read_four_times_or_more(flops, corpus):
    for choice in choices(flops, Corpus(corpus, 21128, None), 128):
        repeated = corpus is not None and choice.tokens >= 4 * corpus
        assert choice.dropout == (0.1 if repeated else 0)
        if choice.tokens > 1e9:
            model = run_values(choice, 1)["model"]
            assert [model.get(f"{what}_pdrop", 0) for what in ("embd", "attn", "resid")] == [choice.dropout] * 3


def test_a_batch_has_no_more_rows_than_a_config_may():
    chosen = best(choices(1e26, Corpus(None, 100, None), 1))
    assert best_batch(chosen.tokens) > 2**21
    assert run_values(chosen, 1)["data"]["global_batch_size"] == 2**20
    assert run_values(chosen, 6)["data"]["global_batch_size"] == 6 * 2**17


# The command


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = cli.exit_code([str(argument) for argument in ("plan", *arguments)])
        return code, *capsys.readouterr()

    return call


def test_the_printed_config_trains_the_dataset(run, dataset_folder, tmp_path):
    code, out, _ = run("--budget", "1e15", "--dataset", dataset_folder, "--seq-length", 32)
    assert code == ExitCode.OK
    path = tmp_path / "proposal.toml"
    path.write_text(out, encoding="utf-8")
    config = load_config(path, ["output=run"])
    dataset = TokenDataset(dataset_folder)
    chosen = best(choices(1e15, Corpus(dataset.train.n_tokens, dataset.info.vocab_size, None), 32))
    assert config.data.dataset == str(dataset_folder)
    assert config.model.n_layer == chosen.model.n_layer
    assert config.model.n_positions == config.data.seq_length == 32
    assert f"{dataset.train.n_tokens:,} tokens in {dataset_folder}" in out
    assert "<- recommended" in out
    assert "worth less than 5%" in out  # 47 epochs of this corpus use a small part of the budget
    assert "less than 1% of the budget" in out
    assert (config.model.embd_pdrop, config.model.attn_pdrop, config.model.resid_pdrop) == (0.1, 0.1, 0.1)
    assert f"# dropout                 0.1; text that is read {DROPOUT_EPOCHS} times or more is worth less" in out


def test_time_on_devices_is_a_budget(run, tmp_path):
    code, out, _ = run("--budget", "36h", "--topology", "h100:8", "--mfu", 0.5, "--corpus-tokens", "14e9")
    assert code == ExitCode.OK
    flops = 36 * 3600 * 8 * 989e12 * 0.5
    assert "50% of 7.91P FLOP/s" in out
    assert "# budget                  36h: 513E FLOP on 8 x NVIDIA H100" in out
    path = tmp_path / "proposal.toml"
    path.write_text(out, encoding="utf-8")
    config = load_config(path, ["output=run", "data.dataset=data/mine"]).with_vocab_size(50257)
    assert figures(config, None).flops == pytest.approx(flops, rel=0.02)
    recommended = next(line for line in out.splitlines() if "<- recommended" in line)
    assert "1d12h" in recommended
    assert "+0.000" in recommended
    assert run("--budget", "1.5d", "--topology", "h100:8", "--mfu", 0.5, "--corpus-tokens", "14000000000")[1] == (
        out.replace("36h:", "1.5d:")
    )


def test_the_example_in_the_documents_is_what_is_printed(run):
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    texts = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    examples = re.findall(r"^\$ gpt2-flax plan (--budget .*?) > run.toml; cat run.toml\n(.*?)^\$", texts, re.M | re.S)
    assert examples
    for arguments, printed in examples:
        assert run(*arguments.split())[1] == printed


def test_time_without_a_topology_is_spent_on_the_devices_of_this_machine(run, monkeypatch):
    here = [types.SimpleNamespace(device_kind="NVIDIA L40S")] * 2
    monkeypatch.setattr("gpt2_flax.plan.report.devices_for", lambda topology: here if topology is None else [])
    code, out, _ = run("--budget", "90m")
    assert code == ExitCode.OK
    assert "90m: 1.56E FLOP on 2 x NVIDIA L40S" in out  # 5,400 s of 2 x 362 TFLOP/s at 40%


def test_operations_are_a_budget_without_devices(run):
    code, out, _ = run("--budget", "1e21", "--vocab-size", 21128)
    assert code == ExitCode.OK
    values = tomllib.loads(out)
    assert set(values) == {"model", "data", "growth", "training"}
    assert "MFU" not in out
    assert "epochs" in out.splitlines()[4]  # the head of the table; without a corpus there are no others
    assert out.count("epochs") == 1
    assert "# learning rate           0.02, the default of Muon; its updates have the same spectral norm" in out
    assert "# dropout                 0; text that is read fewer than 4 times" in out
    same = run("--budget", "1e21", "--vocab-size", 21128, "--topology", "v5e:2x4")[1]
    assert "40% of 1.58P FLOP/s" in same
    assert tomllib.loads(same)["model"] == values["model"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--budget 24x", "not a budget: --budget '24x'"),
        ("--budget -1h", "not a budget"),
        ("--budget nan", "not a budget"),
        ("--budget 1e-5", "not a budget"),
        ("--budget 24", "budget of 24 floating point operations"),
        ("--budget 1e27", "budget of 1e+27"),
        ("--budget 1e999", "budget of inf"),
        ("--budget 0h --topology h100:8", "budget of 0"),
        ("--budget 24h", "the peak FLOP/s of cpu are not known"),
        ("--budget 24h --topology cpu:8", "the peak FLOP/s of cpu are not known"),
        ("--budget 24h --topology h100", "unknown topology"),
        ("--budget 1e12", "allow only 22 steps"),
        ("--budget 1e18 --topology v5e:16x16 --corpus-tokens 1e5", "fewer devices"),
        ("--budget 1e18 --corpus-tokens 1e16", "not a number of tokens: --corpus-tokens '1e16'"),
        ("--budget 1e18 --corpus-tokens 0", "not a number of tokens"),
        ("--budget 1e18 --corpus-tokens 24h", "not a number of tokens"),
        ("--budget 1e18 --corpus-tokens 1e9 --dataset {dataset}", "--corpus-tokens does not go with --dataset"),
        ("--budget 1e18 --vocab-size 100 --dataset {dataset}", "--vocab-size does not go with --dataset"),
        ("{dataset} --budget 1e18", "CONFIG does not go with --budget"),
        ("--budget 1e18 --stage 1", "--stage does not go with --budget"),
        ("--budget 1e18 --optimize", "--optimize does not go with --budget"),
        ("{dataset} --dataset {dataset}", "--dataset goes only with --budget"),
        ("{dataset} --corpus-tokens 1e9", "--corpus-tokens goes only with --budget"),
        ("{dataset} --vocab-size 100", "--vocab-size goes only with --budget"),
        ("{dataset} --seq-length 100", "--seq-length goes only with --budget"),
        ("", "nothing to plan"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(run, dataset_folder, arguments, words):
    code, out, error = run(*arguments.format(dataset=dataset_folder).split())
    assert (code, out, error.count("\n")) == (ExitCode.USAGE, "", 1)
    assert error.startswith("error: ")
    assert words in error


def test_a_missing_dataset_is_named(run, tmp_path):
    code, _, error = run("--budget", "1e18", "--dataset", tmp_path / "none")
    assert code == ExitCode.NO_INPUT
    assert str(tmp_path / "none") in error


def test_a_budget_has_an_amount_and_a_unit():
    assert parse_budget("90m") == (5400, True)
    assert parse_budget("7d") == (7 * 86400, True)
    assert parse_budget("1.5h") == (5400, True)
    assert parse_budget("1e21") == parse_budget("1E+21") == (1e21, False)


@pytest.mark.parametrize(
    ("name", "count"), [("v4:2x2x4", 16), ("v5e:2x4", 8), ("v5p:2x2x2", 8), ("v6e:2x4", 8), ("h200:2x8", 16)]
)
def test_the_devices_of_a_topology_are_known_without_their_compiler(name, count):
    pytest.importorskip("libtpu" if name[0] == "v" else "jax_plugins.xla_cuda12")
    devices = devices_for(name)
    assert kind_and_count(name) == (devices[0].device_kind, len(devices)) == (devices[0].device_kind, count)
    assert peak_flops(devices[0].device_kind, "bfloat16")
