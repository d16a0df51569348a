"""The page about runs: it shows the numbers of metrics.jsonl, executes no text of a run, and loads no other file."""

import base64
import contextlib
import csv
import hashlib
import html.parser
import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.browser import browser
from support.configs import changed
from support.failures import fails
from support.folders import contents

from gpt2_flax import __main__ as cli
from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.config.parse import dump_config
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.report.facts import names_of
from gpt2_flax.report.history import moving_mean, read_history, thin
from gpt2_flax.report.page import report

ROOT = Path(__file__).parents[2]
EVIL = "</script ><img src=x onerror=\"document.title='run'\"><!--<script>document.title='run'</script> & \u2028 书"


class Parts(html.parser.HTMLParser):
    """The elements of a page, and the text of each kind of script and style."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict]] = []
        self.texts: dict[str, str] = {}
        self._inside = None
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("type", tag) if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside:
            self.texts[self._inside] = self.texts.get(self._inside, "") + data


def data_of(path: Path) -> dict:
    return json.loads(Parts(path.read_text(encoding="utf-8")).texts["application/json"])


def write_run(folder: Path, records=(), config=None, samples="", end="") -> Path:
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines + end, encoding="utf-8")
    (folder / "samples.txt").write_text(samples, encoding="utf-8")
    if config is not None:
        (folder / "config.toml").write_text(dump_config(config), encoding="utf-8")
    return folder


def step(number: int, loss: float = 1.0, **more) -> dict:
    return {"step": number, "time": 1e9 + number, "train/loss": loss} | more


@pytest.fixture(scope="module")
def trained(dataset_folder, tmp_path_factory):
    """A finished run with a hostile prompt, and what it printed."""
    from gpt2_flax.config.parse import parse_config
    from gpt2_flax.training.loop import train

    values = {
        "output": str(tmp_path_factory.mktemp("trained") / "run"),
        "model": {"n_positions": 32, "n_layer": 1, "n_head": 2, "n_embd": 32, "dtype": "float32"},
        "data": {"dataset": str(dataset_folder), "seq_length": 16, "global_batch_size": 8},
        "optimizer": {"learning_rate": 1e-2, "warmup": 2},
        "training": {"total_steps": 12, "log_every": 2, "save_every": 4, "evaluate_every": 6, "evaluation_batches": 1}
        | {"prompts": ["</script>", "这是"], "sample_tokens": 4, "keep_checkpoints": 1, "keep_best": 0},
    }
    config = parse_config(values, "test")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        train(config)
    return config, printed.getvalue()


@pytest.mark.slow
def test_a_run_that_ends_leaves_a_report_with_its_numbers(trained, dataset_folder):
    config, printed = trained
    run = RunFolder(config.output)
    (found,) = data_of(run.report)["runs"]
    assert "warning" not in printed
    logged: dict[str, dict[int, float]] = {}
    for line in run.metrics.read_text().splitlines():
        record = json.loads(line)
        for name, value in record.items():
            logged.setdefault(name, {})[record["step"]] = value
    for name in ("train/loss", "train/bits_per_character", "train/grad_norm", "train/learning_rate", "validation/loss"):
        curve = found["curves"][name]
        assert dict(zip(curve["steps"], curve["values"], strict=True)) == logged[name]
        assert curve["tokens"] == [128 * one for one in curve["steps"]]
        assert curve["points"] == len(logged[name])
    assert (found["name"], found["last_step"], found["total_steps"], found["saved"]) == ("run", 12, 12, [4, 8, 12])
    assert [one["step"] for one in found["checkpoints"]] == [12]
    assert found["checkpoints"][0]["validation_loss"] == logged["validation/loss"][12]
    assert found["hardware"] == "8 x cpu"
    assert found["medians"]["train/tokens_per_second"] == np.median([*logged["train/tokens_per_second"].values()])
    texts = [line.partition(f"step {line[5:12]}  ")[2] for line in run.samples.read_text(encoding="utf-8").splitlines()]
    assert found["samples"] == [{"step": 6, "texts": texts[:2]}, {"step": 12, "texts": texts[2:]}]
    assert found["config"]["optimizer.learning_rate"] == 1e-2
    (dataset,) = found["datasets"]
    counts = json.loads((dataset_folder / "dataset.json").read_text(encoding="utf-8"))["shards"]["train"]
    assert dataset["splits"]["train"]["tokens"] == sum(shard["tokens"] for shard in counts)
    assert dataset["splits"]["train"]["documents"] == sum(shard["documents"] for shard in counts)


def test_a_run_that_was_killed_in_its_report_gets_it_from_the_next_start(trained, capsys):
    from gpt2_flax.training.loop import train

    config, _ = trained
    run = Path(config.output)
    copied = run.parent / "killed"
    shutil.copytree(run, copied)
    (copied / "report.html").rename(copied / "report.html.tmp")
    (copied / "report.html.tmp").write_text("half", encoding="utf-8")
    train(changed(config, output=str(copied)))
    assert "has all its 12 steps" in capsys.readouterr().out
    assert data_of(copied / "report.html")["runs"][0]["last_step"] == 12
    assert not (copied / "report.html.tmp").exists()


@pytest.mark.slow
def test_a_report_never_fails_its_run(trained, monkeypatch, capsys):
    from gpt2_flax.training.loop import train

    config, _ = trained
    run = Path(config.output)
    copied = run.parent / "copied"
    shutil.copytree(run, copied)
    (copied / "report.html").write_text("mine", encoding="utf-8")
    more = {"allow_change": ["training.total_steps"]}
    train(changed(config, output=str(copied), training__total_steps=13), **more)
    out = capsys.readouterr().out
    assert out.count("warning: no report: output exists and is not a report: ") == 1
    assert (copied / "report.html").read_text(encoding="utf-8") == "mine"

    def broken(*arguments):
        raise ZeroDivisionError("oh no")

    monkeypatch.setattr("gpt2_flax.report.page.page", broken)
    (copied / "report.html").unlink()
    train(changed(config, output=str(copied), training__total_steps=14), **more)
    assert capsys.readouterr().out.count("warning: no report: oh no\n") == 1
    assert not (copied / "report.html").exists()


# The history of a run.


@given(st.data())
def test_a_resumed_run_shows_only_what_counts(tmp_path_factory, data):
    """The expectation follows the run itself: what a stop takes back is taken back at once."""
    records, expected, now, version = [], {}, 0, 0
    for _ in range(data.draw(st.integers(1, 4))):
        for _ in range(data.draw(st.integers(1, 6))):
            now += 1
            version += 1
            expected = {at: value for at, value in expected.items() if at < now}
            expected[now] = version
            records.append(step(now, float(version)))
            if data.draw(st.booleans()):
                records.append({"step": now, "time": 0.0, "validation/loss": float(version)})
        records.append({"step": now, "time": 0.0, "checkpoint": now})
        now = data.draw(st.integers(0, now))
    run = write_run(tmp_path_factory.mktemp("resumed") / "run", records)
    history = read_history(RunFolder(run))
    curve = history.curves["train/loss"]
    assert dict(zip(curve.step_N.tolist(), curve.value_N.tolist(), strict=True)) == expected
    assert all(one in expected for one in history.saved)
    if validation := history.curves.get("validation/loss"):
        assert all(expected[at] == value for at, value in zip(*map(np.ndarray.tolist, validation), strict=True))


def test_odd_lines_are_passed_over(tmp_path):
    odd = ["[]", "7", '{"step": "9"}', '{"step": -1, "train/loss": 1}', '{"step": 99999999999999, "train/loss": 1}']
    run = write_run(tmp_path / "run", [step(1, 3.0), step(2, 2.0, note="text", flag=True, big=10**400)])
    content = run.joinpath("metrics.jsonl").read_text() + "\n".join([*odd, "[" * 9999, '{"step": 3, "train/lo'])
    run.joinpath("metrics.jsonl").write_text(content)
    history = read_history(RunFolder(run))
    assert set(history.curves) == {"train/loss"}
    assert history.curves["train/loss"].step_N.tolist() == [1, 2]
    assert (history.last_step, history.ended) == (2, 1e9 + 2)


def test_values_that_are_not_finite_are_counted_and_not_drawn(tmp_path):
    records = [step(1, 3.0), step(2, "nan"), step(3, 2.0), step(4, "inf"), step(5, math.nan)]
    report([write_run(tmp_path / "run", records)], tmp_path / "page.html")
    curve = data_of(tmp_path / "page.html")["runs"][0]["curves"]["train/loss"]
    assert (curve["steps"], curve["values"], curve["not_finite"], curve["points"]) == ([1, 3], [3.0, 2.0], 3, 2)


def test_axes_follow_from_samples_and_speed(config, tmp_path):
    config = config.with_vocab_size(100)  # 2 blocks of width 32, rows of 16 tokens
    speed = {"train/tokens_per_second": 500.0}
    # The second half of the run has batches of 32 rows in place of 16; the pause before step 40 does not count.
    records = [step(10, **speed, **{"train/samples": 160}), step(20, **speed, **{"train/samples": 320})]
    records += [{"step": 20, "validation/loss": 1.0}, step(40, **speed, **{"train/samples": 960, "time": 9e9})]
    records.append({"step": 50, "validation/loss": 0.9})  # newer than the last line of a step
    report([write_run(tmp_path / "run", records, config)], tmp_path / "page.html")
    (run,) = data_of(tmp_path / "page.html")["runs"]
    tokens = [16 * 160, 16 * 320, 16 * 960]
    assert run["curves"]["train/loss"]["tokens"] == tokens
    assert run["curves"]["train/loss"]["hours"] == pytest.approx([one / 500 / 3600 for one in tokens], rel=1e-5)
    assert run["curves"]["validation/loss"]["tokens"] == [16 * 320, 16 * (960 + 10 * 16)]
    assert run["flops_per_token"] == [6 * (2 * 12 * 32**2 + 100 * 32) + 12 * 2 * 32 * 16] * 2
    assert run["parameters"] == 100 * 32 + 32 * 32 + 2 * (12 * 32**2 + 13 * 32) + 2 * 32


def test_the_last_texts_of_a_step_count(config, tmp_path):
    # The run resumes before 2, then again between 2 and 4; it has not come to 6 again.
    blocks = [(2, "a"), (4, "b"), (6, "c"), (2, "d"), (4, "f"), (4, "e")]
    lines = [f"step {at:>7}  {prompt}{letter}" for at, letter in blocks for prompt in ("x ", "y  ")]
    config = changed(config, training__prompts=["x ", "y  "])
    run = write_run(tmp_path / "run", [step(4)], config, "\n".join([*lines, "step"]))
    report([run], tmp_path / "page.html")
    found = data_of(tmp_path / "page.html")["runs"][0]["samples"]
    assert found == [{"step": 2, "texts": ["x d", "y  d"]}, {"step": 4, "texts": ["x e", "y  e"]}]


# What a screen can show.


@given(
    st.lists(
        st.tuples(st.integers(0, 2**31 - 1), st.floats(-1e9, 1e9)), min_size=1, max_size=400, unique_by=lambda p: p[0]
    ),
    st.integers(1, 12),
)
def test_thinning_keeps_ends_and_extremes(points, slices):
    step_N, value_N = map(np.array, zip(*sorted(points), strict=True))
    kept = thin(step_N, value_N, slices)
    assert sorted(set(kept.tolist())) == kept.tolist()
    if len(step_N) <= 4 * slices:
        assert len(kept) == len(step_N)
        return
    assert len(kept) <= 4 * slices + 2
    assert {0, len(step_N) - 1} <= set(kept.tolist())
    span = int(step_N[-1] - step_N[0])
    parts = np.array([min((one - int(step_N[0])) * slices // span, slices - 1) for one in step_N.tolist()])
    for part in set(parts.tolist()):
        drawn, whole = value_N[kept[parts[kept] == part]], value_N[parts == part]
        assert (drawn.min(), drawn.max()) == (whole.min(), whole.max())
    assert value_N[kept].min() == value_N.min()
    assert value_N[kept].max() == value_N.max()


def test_each_slice_keeps_its_lowest_and_highest_point():
    step_N = np.arange(1, 100_001)
    value_N = np.random.default_rng(0).normal(size=len(step_N))
    kept = set(thin(step_N, value_N, 50).tolist())
    for border in range(0, 100_000, 2_000):  # 50 slices of the linear axis, which begins at step 1
        inside = slice(border, border + 2_000)
        assert border + int(value_N[inside].argmin()) in kept
        assert border + int(value_N[inside].argmax()) in kept
    assert len([one for one in kept if one < 1_000]) > 30  # of the logarithmic axis


@pytest.mark.parametrize("count", [1, 2, 99, 100, 101, 700])
def test_the_moving_mean_is_the_mean_of_the_neighbours(count):
    values = np.random.default_rng(count).normal(size=count).tolist()
    reach = int(len(values) / 100)
    expected = []
    for i in range(len(values)):
        after = min(reach, i, len(values) - 1 - i)
        inside = values[i - min(reach, i) : i + after + 1]
        expected.append(math.fsum(inside) / len(inside))
    assert moving_mean(np.array(values)) == pytest.approx(expected, abs=1e-9)


def test_a_long_run_makes_a_page_of_a_moderate_size(tmp_path):
    losses = np.random.default_rng(0).normal(3, 0.1, 20_000)
    losses[12_345] = 99.0
    run = write_run(tmp_path / "run", [step(10 * i, float(loss)) for i, loss in enumerate(losses)])
    with np.errstate(all="raise"):  # step 0 has no logarithm
        report([run], tmp_path / "page.html")
    curve = data_of(tmp_path / "page.html")["runs"][0]["curves"]["train/loss"]
    assert len(curve["steps"]) == len(curve["values"]) == len(curve["means"]) <= 2_002
    assert (curve["points"], max(curve["values"]), min(curve["values"])) == (20_000, 99.0, losses.min())
    assert (curve["steps"][0], curve["steps"][-1]) == (0, 199_990)
    assert (tmp_path / "page.html").stat().st_size < 250_000


# Text of a run, which may be hostile.


def hostile(config, tmp_path) -> Path:
    texts = f"step       1  {EVIL} more\nstep       1  {EVIL}\n".replace("\u2028", "")
    config = changed(config, training__prompts=[EVIL, "x"], data__dataset=str(tmp_path / EVIL.replace("/", "_")))
    return write_run(
        tmp_path / EVIL.replace("/", "_"), [step(1), step(2, **{f"validation/loss/{EVIL}": 1.0})], config, texts
    )


def test_text_of_a_run_stays_text(config, tmp_path):
    run = hostile(config, tmp_path)
    report([run], tmp_path / "page.html")
    content = (tmp_path / "page.html").read_text(encoding="utf-8")
    parts = Parts(content)
    assert [attributes for tag, attributes in parts.elements if tag == "script"] == [
        {"type": "application/json", "id": "data"},
        {},
    ]
    assert not any(tag == "img" or name.startswith("on") for tag, attributes in parts.elements for name in attributes)
    assert not set("<>&\u2028\u2029") & set(parts.texts["application/json"])  # nothing there begins or ends an element
    found = data_of(tmp_path / "page.html")["runs"][0]
    assert found["name"] == EVIL.replace("/", "_")
    assert found["prompts"][0] == found["config"]["training.prompts"][0] == EVIL
    assert found["samples"][0]["texts"][0].endswith("书 more")
    assert f"validation/loss/{EVIL}" in found["curves"]

    # The policy allows exactly the script and the style of this page, and no network.
    (policy,) = [one["content"] for _, one in parts.elements if one.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    digests = {
        name: base64.b64encode(hashlib.sha256(parts.texts[name].encode()).digest()).decode()
        for name in ("script", "style")
    }
    assert rules == {
        "default-src": "'none'",
        "script-src": f"'sha256-{digests['script']}'",
        "style-src": f"'sha256-{digests['style']}'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert "innerHTML" not in content
    assert "http://" not in content.replace("http://www.w3.org/2000/svg", "")


# Several runs, CSV and PNG.


def test_runs_are_compared_and_tabulated(config, tmp_path, capsys):
    config = config.with_vocab_size(100)
    first = write_run(tmp_path / "a/run", [step(1, 3.5), step(2, 2.5, extra=7)], config)
    second = write_run(tmp_path / "b/run", [step(2, 1.5)], changed(config, optimizer__learning_rate=0.5))
    page, table = tmp_path / "page.html", tmp_path / "new/table.csv"
    assert (
        cli.exit_code(["report", str(first), str(second), str(first), "--output", str(page), "--csv", str(table)]) == 0
    )
    assert capsys.readouterr().out == f"{page}\n{table}\n"
    runs = data_of(page)["runs"]
    assert [run["name"] for run in runs] == ["a/run", "b/run"]
    assert [run["config"]["optimizer.learning_rate"] for run in runs] == [1e-2, 0.5]
    with open(table, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    kept = [(row["run"], int(row["step"]), float(row["train/loss"]), row["extra"]) for row in rows]
    assert kept == [("a/run", 1, 3.5, ""), ("a/run", 2, 2.5, "7.0"), ("b/run", 2, 1.5, "")]
    assert [float(row["tokens"]) for row in rows] == [256, 512, 512]
    assert float(rows[1]["flops"]) == 512 * runs[0]["flops_per_token"][1]


def test_flops_count_the_smaller_model_before_growth(config, tmp_path):
    growth = {"growth__until": 2, "growth__n_layer": 1, "growth__seq_length": 8}
    config = changed(config.with_vocab_size(100), **growth)
    run = write_run(tmp_path / "run", [step(number) for number in range(1, 5)], config)
    report([run], tmp_path / "page.html", tmp_path / "curves.csv")
    with open(tmp_path / "curves.csv", encoding="utf-8-sig", newline="") as file:
        found = [float(row["flops"]) for row in csv.DictReader(file)]
    smaller, whole = 6 * (12 * 32**2 + 3200) + 12 * 32 * 8, 6 * (2 * 12 * 32**2 + 3200) + 12 * 2 * 32 * 16
    assert found == [256 * smaller, 512 * smaller, 512 * smaller + 256 * whole, 512 * smaller + 512 * whole]
    (facts,) = data_of(tmp_path / "page.html")["runs"]
    assert (facts["flops_per_token"], facts["growth_tokens"]) == ([smaller, whole], 512)


def test_names_tell_runs_apart(tmp_path):
    assert list(names_of([tmp_path / "a", tmp_path / "b"]).values()) == ["a", "b"]
    assert list(names_of([tmp_path / "x/a", tmp_path / "y/a", tmp_path / "c"]).values()) == ["x/a", "y/a", "c"]


def test_a_run_without_config_or_data_is_shown(config, tmp_path):
    lost = changed(config, data__dataset=str(tmp_path / "moved"))
    runs = [write_run(tmp_path / "bare", [step(1)]), write_run(tmp_path / "lost", [step(1)], lost)]
    report(runs, tmp_path / "page.html")
    bare, lost = data_of(tmp_path / "page.html")["runs"]
    assert (bare["config"], bare["datasets"], "tokens" in bare["curves"]["train/loss"]) == (None, [], False)
    assert "dataset not found" in lost["datasets"][0]["problem"]


def test_the_figure_is_a_png(config, tmp_path):
    pytest.importorskip("matplotlib")
    records = [step(1, 3.0), step(2, "nan"), step(3, 2.0, **{"validation/loss": 2.5})]
    runs = [write_run(tmp_path / "$a_书", records), write_run(tmp_path / "b", records)]
    report(runs, tmp_path / "page.html", figure=tmp_path / "loss.png")
    content = (tmp_path / "loss.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82")


def test_without_matplotlib_the_figure_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run, page = write_run(tmp_path / "run", [step(1)]), tmp_path / "page.html"
    arguments = ["report", run, "--output", page, "--png", tmp_path / "a.png"]
    fails(capsys, 64, arguments, "matplotlib", "gpt2_flax[report]")
    assert not page.exists()


# What goes wrong.


@pytest.mark.parametrize(
    ("exit_code", "command", "words"),
    [
        (64, "report", ("RUN",)),
        (64, "report {run} --csv {tmp}/a --png {tmp}/a", ("two outputs have the same name",)),
        (66, "report {tmp}/none", ("no run found", "none")),
        (66, "report {tmp}/photos", ("no run found", "photos")),
        (66, "report {tmp}/photos/summer.jpg", ("no run found", "summer.jpg")),
        (66, "report {run} {tmp}/empty", ("run has no metrics yet", "empty/metrics.jsonl")),
        (66, "report {tmp}/checkpoints-only", ("run has no metrics yet", "checkpoints-only")),
        (73, "report {run} --output {tmp}/photos", ("output is a folder", "photos")),
        (73, "report {run} --output {tmp}/photos/summer.jpg", ("output exists and is not a report", "--overwrite")),
        (73, "report {run} --output {tmp}/page.html --csv {tmp}/photos/summer.jpg", ("is not a report", "summer.jpg")),
        (73, "report {run} --output {tmp}/photos/summer.jpg/page.html", ("output cannot be written", "summer.jpg")),
        (73, "report {run} --output {tmp}/pipe --overwrite", ("output exists and is not a report", "pipe")),
        (73, "report {run} --output {tmp}/nowhere", ("leads nowhere",)),
    ],
)
def test_what_goes_wrong_is_one_line_and_writes_nothing(
    tmp_path, capsys, monkeypatch, config, exit_code, command, words
):
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "run", [step(1)])
    write_run(tmp_path / "empty", end="{")
    write_run(tmp_path / "checkpoints-only", [{"step": 4, "checkpoint": 4}], config)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/summer.jpg").write_text("mine", encoding="utf-8")
    (tmp_path / "nowhere").symlink_to("gone")
    before = contents(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    fails(capsys, exit_code, command.format(run=run, tmp=tmp_path).split(" "), *words)
    (tmp_path / "pipe").unlink()
    assert contents(tmp_path) == before


def test_pipes_in_a_run_folder_are_not_waited_for(tmp_path, capsys):
    run = write_run(tmp_path / "run", [step(1)])
    (run / "samples.txt").unlink()
    for name in ("samples.txt", "config.toml"):
        os.mkfifo(run / name)
    report([run], tmp_path / "page.html")
    (found,) = data_of(tmp_path / "page.html")["runs"]
    assert (found["samples"], found["config"], found["last_step"]) == ([], None, 1)
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    fails(capsys, 66, ["report", run, "--output", tmp_path / "page.html"], "no run found")


def test_a_report_is_replaced_and_another_file_only_when_asked_for(tmp_path):
    run, page = write_run(tmp_path / "run", [step(1)]), tmp_path / "page.html"
    report([run], page)
    write_run(tmp_path / "new", [step(5)])
    report([tmp_path / "new"], page)
    assert data_of(page)["runs"][0]["last_step"] == 5
    page.write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="--overwrite") as error:
        report([run], page)
    assert error.value.exit_code == ExitCode.CANT_CREATE
    report([run], page, overwrite=True)
    assert data_of(page)["runs"][0]["last_step"] == 1


@pytest.mark.multiprocess
def test_the_command_needs_no_jax(tmp_path):
    write_run(tmp_path / "run", [step(1)])
    code = """
import sys
for name in ("jax", "flax", "optax", "orbax", "torch", "tensorboardX", "matplotlib"):
    sys.modules[name] = None  # an import of it is an error
from gpt2_flax.__main__ import main
main(["report", "run"])
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "report.html\n", "")


# The page, where there is a Chromium and its driver.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("language", "title", "other", "axis"),
    [("en-US", "Training report", "训练报告", "FLOPs"), ("zh-CN", "训练报告", "Training report", "浮点运算量")],
)
def test_the_page_shows_the_runs_in_a_browser(config, tmp_path, language, title, other, axis):
    config = config.with_vocab_size(100)
    curve = [step(i, 9 / i, **{"train/tokens_per_second": 100.0, "validation/loss": 10 / i}) for i in range(1, 60)]
    runs = [write_run(tmp_path / "first", curve, config), hostile(config, tmp_path)]
    report(runs, tmp_path / "page.html")
    (tmp_path / "profile").mkdir()
    with browser(language, tmp_path / "profile") as page:
        for width in (1280, 390):
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            page.get((tmp_path / "page.html").as_uri())
            assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
            assert page.title.startswith(title)
            assert page.title != "run"  # no text of a run ran
            texts = [element.text for element in page.find_elements("css selector", "#samples p")]
            assert texts[0].startswith("</script ><img src=x onerror=")
            assert "9.0000" not in page.find_element("id", "results").text
            assert f"{9 / 59:.4f}" in page.find_element("id", "results").text
            headings = page.find_elements("css selector", "h1, h2, h3, label, summary, option")
            assert all(element.text for element in headings if element.is_displayed())

        # Arrow keys read the values out; End is the last step.
        assert axis in page.find_element("id", "axis").text
        chart = page.find_element("css selector", "#main-chart svg")
        page.execute_script("arguments[0].focus()", chart)
        chart.send_keys("\ue010")
        shown = page.find_element("css selector", "#main-chart .readout").text
        assert "59" in shown
        assert f"{9 / 59:.4f}" in shown
        assert f"{10 / 59:.4f}" in shown
        paths = "return document.querySelectorAll('#main-chart path.main').length"
        assert page.execute_script(paths) == 2
        page.find_element("css selector", "#legend input").click()
        assert page.execute_script(paths) == 1

        page.find_element("id", "language").click()
        assert page.title.startswith(other)
        assert page.get_log("browser") == []
