"""Loggers get the numbers of metrics.jsonl, in one run over several starts, and never end the training."""

import json
import struct
import sys
from collections.abc import Iterator

import pytest
from support.configs import changed

from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.training import loggers, loop

pytestmark = pytest.mark.slow

PROMPT = "这是"


@pytest.fixture
def logged(config, tmp_path, monkeypatch):
    """The config of a run of 6 steps that is evaluated after 3 and 6."""
    for name in ("WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "wandb"))
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    steps = {"total_steps": 6, "evaluate_every": 3, "save_every": 3, "log_every": 1}
    texts = {"prompts": [PROMPT], "sample_tokens": 8}
    return changed(config, **{f"training__{name}": value for name, value in (steps | texts).items()})


def records(config) -> dict[int, dict[str, float]]:
    """The values of each step in metrics.jsonl; the last line of a step counts."""
    found = {}
    for line in RunFolder(config.output).metrics.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        found.setdefault(record["step"], {}).update(record)
    names = ("time", "step", "checkpoint")
    return {step: {key: value for key, value in one.items() if key not in names} for step, one in found.items()}


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """The records of a log of LevelDB, as W&B writes it: blocks of 32 KiB, seven bytes before each part of a record."""
    place, whole = 7, b""  # W&B's own header
    while place < len(log):
        if (left := -place % 2**15) < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", log, place + 4)
        whole += log[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part
            yield whole
            whole = b""


def test_mlflow_has_every_number_of_a_run_that_was_started_twice(logged):
    mlflow = pytest.importorskip("mlflow")
    config = changed(logged, training__logging=["mlflow"])
    loop.train(changed(config, training__total_steps=3))
    loop.train(config, allow_change=["training.total_steps"])
    run = RunFolder(config.output)
    client = mlflow.MlflowClient((run.path / "mlruns").as_uri())
    (experiment,) = [one for one in client.search_experiments() if one.name == loggers.PROJECT]
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == run.path.name
    assert found.info.status == "FINISHED"
    assert found.data.params["optimizer.learning_rate"] == str(config.optimizer.learning_rate)
    expected = records(config)
    for name in {name for values in expected.values() for name in values}:
        history = {metric.step: metric.value for metric in client.get_metric_history(found.info.run_id, name)}
        assert history == {step: values[name] for step, values in expected.items() if name in values}
    text = client.download_artifacts(found.info.run_id, "samples/step-6.md")
    with open(text, encoding="utf-8") as file:
        assert file.read().startswith(PROMPT)
    assert not run.tensorboard.exists()


def test_wandb_has_every_number_of_a_run_that_was_started_twice(logged, capsys):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue] - generated

    config = changed(logged, training__logging=["tensorboard", "wandb"])
    loop.train(changed(config, training__total_steps=3))
    loop.train(config, allow_change=["training.total_steps"])
    run, history, runs = RunFolder(config.output), {}, []
    for path in sorted((run.path / "wandb").glob("offline-run-*/*.wandb")):
        for data in leveldb_records(path.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("run"):
                runs.append((record.run.run_id, record.run.display_name, record.run.project))
            if record.HasField("history"):
                items = {item.nested_key[0] if item.nested_key else item.key: item for item in record.history.item}
                values = {name: json.loads(item.value_json) for name, item in items.items()}
                history.setdefault(values.pop("step"), {}).update(values)
    identity = json.loads(run.loggers.read_text(encoding="utf-8"))["wandb"]
    assert set(runs) == {(identity, run.path.name, loggers.PROJECT)}
    for step, values in records(config).items():
        assert {name: history[step][name] for name in values} == values
    assert history[6]["samples"].startswith(PROMPT)
    assert f"wandb sync {run.path / 'wandb'}" in capsys.readouterr().out
    assert list(run.tensorboard.glob("events*"))


def test_an_error_of_a_logger_ends_its_metrics_with_one_warning(logged, monkeypatch, capsys):
    class Failing:
        def __init__(self, *arguments):
            self.calls = 0

        def add_scalars(self, step, values):
            self.calls += 1
            assert self.calls < 3, "called again after an error"
            if self.calls == 2:
                raise RuntimeError("the server is gone\nat line 3")

        def close(self, succeeded):
            raise AssertionError("closed after an error")

    monkeypatch.setattr(loggers, "WandB", Failing)
    loop.train(changed(logged, training__logging=["wandb"], training__prompts=[]))
    out = capsys.readouterr().out
    assert out.count("warning: no more metrics for wandb (RuntimeError: 'the server is gone'); the run continues") == 1
    assert len(records(logged)) == 6


def test_a_logger_that_does_not_start_is_one_sentence_and_leaves_nothing(logged, monkeypatch):
    config = changed(logged, training__logging=["wandb"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        UserError, match=r"training\.logging wandb needs wandb.*pip install 'gpt2_flax\[wandb\]'"
    ) as error:
        loop.train(config)
    assert error.value.exit_code == ExitCode.USAGE

    def refuse(*arguments):
        raise RuntimeError("no key")

    monkeypatch.setattr(loggers, "WandB", refuse)
    with pytest.raises(UserError, match=r"wandb does not start.*take wandb out of training\.logging.*no key") as error:
        loop.train(config)
    assert error.value.exit_code == ExitCode.IO
    loop.train(changed(config, training__logging=[]))  # the key may change
    assert not RunFolder(config.output).loggers.exists()
