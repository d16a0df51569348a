"""Runs on datasets that keep nothing from training."""

import json
from pathlib import Path

import pytest
from support.configs import changed

from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.checkpoint.source import load_source
from gpt2_flax.config.schema import Packing
from gpt2_flax.data.inspect import batch_lines, inspection_lines
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.data.prepare import prepare
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.export.publish import publish
from gpt2_flax.inference.evaluate import evaluate_source
from gpt2_flax.plan.report import plan_lines
from gpt2_flax.text.documents import CorpusOptions
from gpt2_flax.tokenizers.tokenizer import load_tokenizer
from gpt2_flax.training import loop

pytestmark = pytest.mark.slow


@pytest.fixture
def without(corpus, tokenizer_folder, tmp_path) -> Path:
    folder = tmp_path / "without"
    prepare([str(corpus)], load_tokenizer(tokenizer_folder), folder, validation_fraction=0.0)
    return folder


@pytest.mark.parametrize("packing", Packing.__args__)
def test_a_dataset_without_validation_is_trained_on_without_evaluation(config, without, tmp_path, capsys, packing):
    keys = {"data__packing": packing, "training__prompts": ["这是"], "training__sample_tokens": 3}
    config = changed(config, data__dataset=str(without), **keys)
    loop.train(config)
    out = capsys.readouterr().out
    assert f"no validation split, so no validation loss: {without}\n" in out
    assert "step       3  validation" not in out
    metrics = [json.loads(line) for line in RunFolder(config.output).metrics.read_text().splitlines()]
    assert sorted(record["step"] for record in metrics if "train/loss" in record) == [1, 2, 3, 4, 5, 6]
    assert not [name for record in metrics for name in record if name.startswith("validation/")]
    assert RunFolder(config.output).samples.read_text(encoding="utf-8").count("这是") == 2  # at steps 3 and 6
    source = load_source(Path(config.output))
    with pytest.raises(UserError, match="no validation split") as error:
        evaluate_source(source, None, None, 8, 0, CorpusOptions())
    assert (error.value.exit_code, error.value.where) == (ExitCode.DATA, str(without))
    assert evaluate_source(source, None, None, 8, 0, CorpusOptions(), "train").tokens > 1000
    publish(source, tmp_path / "exported", name="mine")
    card = (tmp_path / "exported" / "README.md").read_text(encoding="utf-8")
    assert "training loss" in card
    assert "validation" not in card


def test_of_several_datasets_those_with_validation_are_evaluated(config, without, dataset_folder, capsys):
    config = changed(config, data__dataset={str(without): 1.0, str(dataset_folder): 1.0})
    loop.train(config)
    assert f"no validation split, so no validation loss: {without}\n" in capsys.readouterr().out
    found = evaluate_source(load_source(Path(config.output)), None, None, 16, 1, CorpusOptions())
    alone = evaluate_source(load_source(Path(config.output)), str(dataset_folder), None, 16, 1, CorpusOptions())
    assert found == alone
    metrics = [json.loads(line) for line in RunFolder(config.output).metrics.read_text().splitlines()]
    assert [line for line in metrics if "validation/loss" in line][-1]["validation/loss"] == pytest.approx(
        alone.loss, rel=1e-6
    )


def test_what_shows_datasets_and_plans_runs_copes_with_none(config, without):
    import jax

    mixture = Mixture({str(without): 1.0})
    config = changed(config, data__dataset=str(without))
    (dataset,) = mixture.datasets.values()
    dataset.verify()
    assert "documents" in "\n".join(inspection_lines(dataset))
    assert len(list(batch_lines(config, mixture, 1, 1))) > 3
    assert any(line.startswith("epochs") for line in plan_lines(config, jax.devices()[:1], 0.4, None, False))
