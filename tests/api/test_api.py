"""The tutorial, and what its model and its data give: as transformers, the command line and the loader give it."""

import contextlib
import io
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from support.rows import batches_of

import gpt2_flax
from gpt2_flax import __main__ as cli
from gpt2_flax.data.dataset import TokenDataset
from gpt2_flax.formats.registry import writer

pytestmark = pytest.mark.slow

NOTEBOOK = Path(__file__).parents[2] / "docs/tutorial.ipynb"
STEPS = 30
SMALLER = {
    "CORPUS": None,
    "VOCABULARY, STEPS": (100, STEPS),
    "MODEL": {"n_positions": 32, "n_layer": 1, "n_head": 2, "n_embd": 32, "dtype": "float32"},
}
TEXTS = ["我们在北京看见一只大鸟", "", "我们", "这是很久之前的事情了" * 8]


@pytest.fixture(scope="module")
def tutorial(corpus, tmp_path_factory):
    """The names that the notebook defines when its cells run in order, with a small corpus and model."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == 10
    names, printed = {}, io.StringIO()
    with contextlib.chdir(tmp_path_factory.mktemp("tutorial")), contextlib.redirect_stdout(printed):
        for cell in cells:
            source = "".join(cell["source"])
            for name, value in (SMALLER | {"CORPUS": str(corpus)}).items() if cell is cells[0] else ():
                source, count = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", source, flags=re.MULTILINE)
                assert count == 1
            exec(compile(source, cell["id"], "exec"), names)
        folder = Path.cwd()
        names |= {"folder": folder, "printed": printed.getvalue()}
        names["run"] = gpt2_flax.Run(folder / "run")
        names["dataset"] = gpt2_flax.Dataset(folder / "dataset")
    return names


@pytest.fixture(scope="module")
def model(tutorial):
    return tutorial["model"]


def test_the_tutorial_trains_a_model_that_learns_and_exports_it(tutorial):
    run, losses, printed = tutorial["run"], tutorial["losses"], tutorial["printed"]
    assert losses[-1] < 0.6 * losses[0]
    written = {record["step"]: record["train/loss"] for record in run.records if "train/loss" in record}
    assert written == {step: losses[step - 1] for step in (25, STEPS)}
    assert len(losses) == STEPS
    assert run.steps == [STEPS]
    assert run.config["training"]["total_steps"] == STEPS
    assert tutorial["model"].metrics["train/loss"] == losses[-1]
    assert "bits a character" in printed
    assert "equal those of transformers" in printed


def test_logits_are_those_of_transformers(model, tutorial):
    torch = pytest.importorskip("torch")
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (3, 21))
    with torch.no_grad():
        expected = tutorial["network"](torch.tensor(ids)).logits.numpy()
    assert np.abs(model.logits(ids) - expected).max() < 1e-4
    assert np.abs(model.logits(ids[1, :5].tolist()) - expected[1, :5]).max() < 1e-4


def test_scores_are_the_log_probabilities_of_transformers(model, tutorial):
    torch = pytest.importorskip("torch")
    scores = model.score(TEXTS)
    for text, score in zip(TEXTS, scores, strict=True):
        ids = tutorial["tokenizer"](f"[CLS]{text}[SEP]", add_special_tokens=False).input_ids
        nats = correct = 0.0
        for start in range(0, len(ids) - 1, 32):
            part = torch.tensor(ids[start : start + 33])
            with torch.no_grad():
                logits = tutorial["network"](part[None, :-1]).logits[0].double()
            nats -= logits.log_softmax(-1).gather(1, part[1:, None]).sum().item()
            correct += (logits.argmax(-1) == part[1:]).sum().item()
        assert score.nats == pytest.approx(nats, rel=1e-5)
        assert (score.correct, score.tokens, score.characters) == (correct, len(ids) - 1, len(text))
    assert model.score(TEXTS[0]).nats == pytest.approx(scores[0].nats, rel=1e-5)


def test_greedy_text_is_that_of_transformers_alone_in_a_batch_and_in_pieces(model, tutorial):
    prompt, tokenizer = TEXTS[0], tutorial["tokenizer"]
    ids = tokenizer(f"[CLS]{prompt}", add_special_tokens=False, return_tensors="pt")
    ids = tutorial["network"].generate(**ids, max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(ids[0], skip_special_tokens=True).replace(" ", "")
    assert model.generate(prompt, 12, temperature=0) == expected
    assert model.generate([prompt, "我"], 12, temperature=0)[0] == expected
    assert prompt + "".join(model.generate(prompt, 12, temperature=0, stream=True)) == expected


def test_a_seed_draws_other_texts_and_the_same_again(model):
    first, second = model.generate(TEXTS[0], 12, temperature=2.0, samples=2, seed=1)
    assert first != second
    assert model.generate([TEXTS[0]], 12, temperature=2.0, seed=1) == [first]
    with pytest.warns(UserWarning, match="鱼"):
        model.generate(TEXTS[0] + "鱼", 12)


def test_the_command_line_evaluates_to_the_same_figures(model, tutorial, corpus, capsys):
    run = tutorial["run"]
    capsys.readouterr()
    assert cli.exit_code(["evaluate", str(run.path), "--data", str(corpus), "--seq-length", "16"]) == 0
    found = model.evaluate(corpus, seq_length=16)
    assert capsys.readouterr().out == f"{found}  tokens {found.tokens:,}\n"
    assert found.bits_per_character == pytest.approx(found.nats / np.log(2) / found.characters)


def test_a_batch_is_that_of_the_loader_of_training(tutorial, corpus):
    dataset = tutorial["dataset"]
    tokens = TokenDataset(dataset.folder)
    expected = batches_of(tokens.train, 24, seed=5).batch(12, 18)
    batch = dataset.batch(3, seed=5, seq_length=24, global_batch_size=6)
    for ours, array in zip(batch, expected, strict=True):
        assert np.array_equal(ours, array)
    assert sum(map(len, dataset.documents("validation"))) == tokens.validation.n_tokens
    assert dataset.decode(next(dataset.documents())) in corpus.read_text(encoding="utf-8").splitlines()


def test_every_kind_of_place_gives_the_same_model(model, tutorial):
    folder, ids = tutorial["folder"], model.encode(TEXTS[0])
    writer("uer").write_folder(model._source, folder / "uer", False)
    own = {"tokenizer": folder / "tokenizer/vocab.txt", "uer_config": folder / "uer/uer_config.json"}
    for place, options, tolerance in (
        (f"{folder}/run/checkpoints/{STEPS}", {}, 0.0),
        (str(folder / "exported"), {}, 0.0),
        (folder / "uer/model.bin", own, 5e-3),  # layer norm has another epsilon there
    ):
        other = gpt2_flax.load(place, **options)
        assert other.encode(TEXTS[0]) == ids
        assert np.abs(other.logits(ids) - model.logits(ids)).max() <= tolerance


def test_a_run_that_is_interrupted_saves_and_resumes(tutorial, tmp_path):
    steps, losses = [], []

    def on_step(record):
        steps.append(record["step"])
        losses.append(record["train/loss"])
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    # The config of the tutorial, given in another way.
    config = {"model": tutorial["MODEL"], "data.seq_length": 32, "training": {"log_every": 25, "evaluate_every": 100}}
    overrides = {"output": tmp_path / "run", "data.dataset": tutorial["dataset"], "data.global_batch_size": 8}
    overrides["training.total_steps"] = STEPS
    with pytest.raises(gpt2_flax.UserError, match="stopped at step") as error:
        gpt2_flax.train(config, overrides, on_step=on_step)
    assert error.value.exit_code is gpt2_flax.ExitCode.TRY_AGAIN
    assert gpt2_flax.Run(tmp_path / "run").steps == [steps[-1]]
    assert steps[-1] < STEPS
    run = gpt2_flax.train(config, overrides, on_step=on_step)
    assert steps == [*range(1, STEPS + 1)]
    assert losses == tutorial["losses"]
    with pytest.raises(gpt2_flax.UserError, match=r"model.n_embd is 64 but the run has 32") as error:
        gpt2_flax.train(config, overrides | {"model.n_embd": 64})
    assert error.value.exit_code == 78
    assert run.config["data"]["seq_length"] == 32


@pytest.mark.parametrize(
    ("call", "exit_code", "words"),
    [
        (lambda model: model.generate("我", top_p=1.5), 64, "bad value of top_p: gpt2_flax.Model.generate; "),
        (lambda model: model.generate("我", max_new_tokens=0), 64, "max_new_tokens"),
        (lambda model: model.generate("我" * 40), 65, "leaves no room"),
        (lambda model: model.generate(["我"], stream=True), 64, "stream is for one text"),
        (lambda model: model.generate("\ud800"), 64, "bad value of prompt"),
        (lambda model: model.evaluate("corpus.txt", separator="tab"), 64, "'line', 'blank-line' or 'file', not 'tab'"),
        (lambda model: model.score(3), 64, "bad value of text"),
        (lambda model: model.logits([[1], [1, 2]]), 65, "not ids: [[1], [1, 2]]; give integers of shape (T,)"),
        (lambda model: model.logits([0.5]), 65, "not ids"),
        (lambda model: model.logits([1, 5000]), 65, "id 5000 is outside the vocabulary"),
        (lambda model: model.logits([1] * 33), 65, "33 ids in a row"),
        (lambda model: model.export("exported", format="onnx"), 64, "bad value of format"),
        (lambda model: gpt2_flax.load("nowhere"), 66, "no model found: nowhere"),
        (lambda model: gpt2_flax.load(3), 64, "give a string or a path, not 3"),
        (lambda model: gpt2_flax.load("s3://bucket/run"), 64, "only a path of this machine works here"),
        (lambda model: gpt2_flax.Run("nowhere"), 66, "no run found"),
        (lambda model: gpt2_flax.Dataset("nowhere"), 66, "dataset not found"),
        (lambda model: gpt2_flax.Dataset("s3://bucket/data").batch(1), 64, "at an address cannot be read"),
        (lambda model: gpt2_flax.prepare("nowhere.txt", "tokenizer", "d"), 66, "tokenizer not found"),
        (lambda model: gpt2_flax.prepare([3], "tokenizer", "d"), 64, "bad value of corpus"),
        (lambda model: gpt2_flax.train_tokenizer("a", "b", vocab_size=0), 64, "bad value of vocab_size"),
        (lambda model: gpt2_flax.train({"modle": {}}), 78, "unknown key modle: config; did you mean model?"),
        (
            lambda model: gpt2_flax.train(None, {"output": "r", "data.dataset": "d"}),
            78,
            "missing key training.total_steps",
        ),
        (lambda model: gpt2_flax.train("base"), 66, "dataset not found: data/mine"),
        (lambda model: gpt2_flax.train({}, {"n layer": 2}), 64, "not a key of a config: 'n layer'"),
        (lambda model: gpt2_flax.train({}, ["n_layer"]), 64, "not an override: 'n_layer'"),
        (lambda model: gpt2_flax.train("nowhere.toml"), 66, "config not found"),
    ],
)
def test_wrong_arguments_are_one_sentence_with_an_exit_code(model, call, exit_code, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(gpt2_flax.UserError) as error:
        call(model)
    assert error.value.exit_code == exit_code
    assert words in str(error.value)
    assert not [*tmp_path.iterdir()]
