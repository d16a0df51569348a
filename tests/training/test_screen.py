"""What a run shows: without a terminal here, and what the status at a terminal says; `test_cli` has a real terminal."""

import contextlib
import json
import math
import os
import pty
import re
import signal
from types import SimpleNamespace

import pytest
from rich.console import Console
from support.configs import changed

from gpt2_flax import interruption
from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.checkpoint.step_meta import read_meta
from gpt2_flax.data.dataset import TokenDataset
from gpt2_flax.model.flops import flops_per_token
from gpt2_flax.training import live_screen, loop
from gpt2_flax.training.live_screen import LiveScreen
from gpt2_flax.training.screen import Screen
from gpt2_flax.training.throughput import Throughput


def lines_of(out):
    return dict(re.findall(r"^(\w[\w ]*?)  +(\S.*)$", out, re.MULTILINE))


@pytest.fixture
def doings(monkeypatch):
    """What a screen says that a run is doing, in order."""
    said, doing = [], Screen.doing

    def noted(screen, what, total=None):
        said.append(what)
        return doing(screen, what, total)

    monkeypatch.setattr(Screen, "doing", noted)
    return said


@pytest.mark.slow(8)
def test_lines_without_a_terminal(config, capsys, doings):
    config = changed(config, training__total_steps=5, training__log_every=1000)
    loop.train(config)
    assert doings[0] == "making the model"
    assert {"evaluating", "saving step 5"} < set(doings)
    out = capsys.readouterr().out
    shown = lines_of(out)
    run, data = RunFolder(config.output), TokenDataset(config.data.dataset)
    vocab_size = data.info.vocab_size
    arrays = read_meta(run.checkpoints / "5", 5)["arrays"]
    sizes = {path: 4 * math.prod(array["shape"]) for path, array in arrays.items()}
    in_embeddings, padding = (vocab_size + 32) * 32, sizes["model/wte/embedding"] // 4 - vocab_size * 32
    parameters = sum(size for path, size in sizes.items() if path.startswith("model/")) // 4 - padding
    assert shown["parameters"] == f"{parameters:,}, {in_embeddings:,} of them in embeddings"
    assert shown["devices"] == "8 x cpu"
    assert shown["mesh"].startswith("data 8 x fsdp 1 x tensor 1")
    assert shown["attention"].startswith("xla: ")
    assert shown["a step"] == "256 tokens: 16 rows of 16"
    assert shown["steps"] == "5, 1.28k tokens"
    epochs = 5 * 16 / math.ceil((data.train.n_tokens - 1) / 16)
    assert shown["epochs"] == f"{epochs:.2f} of {data.train.n_tokens:,} tokens in {config.data.dataset}"
    assert float(shown["a checkpoint"].split()[0]) == pytest.approx(sum(sizes.values()) / 1e3, rel=0.01)
    assert "estimated end" not in shown
    assert shown["run folder"] == config.output

    logged = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    losses = {record["step"]: record["train/loss"] for record in logged if "train/loss" in record}
    assert sorted(losses) == [5]  # the line of the first step is no record
    steps = re.findall(r"^step +(\d+)/5  loss (\S+) .*?(compilation included|ETA 0s)$", out, re.MULTILINE)
    assert [(int(step), end) for step, _, end in steps] == [(1, "compilation included"), (5, "ETA 0s")]
    assert steps[1][1] == f"{losses[5]:.4f}"

    validation = next(record["validation/loss"] for record in logged[::-1] if "validation/loss" in record)
    assert re.fullmatch(r"5 steps, 1.28k tokens, in \w+", shown["finished"])
    assert shown["loss"] == f"training {losses[5]:.4f}, validation {validation:.4f}"
    best = min((record["validation/loss"], record["step"]) for record in logged if "validation/loss" in record)
    assert shown["best step"] == f"{best[1]}, validation loss {best[0]:.4f}"

    doings.clear()
    loop.train(changed(config, training__total_steps=6), allow_change=["training.total_steps"])
    assert doings[0] == "restoring the newest checkpoint"
    assert re.fullmatch(
        r"\S+ \S+, in \w+, at the speed before the stop", lines_of(capsys.readouterr().out)["estimated end"]
    )


def test_a_quiet_screen_prints_warnings(capsys):
    screen = Screen(quiet=True)
    screen.say("step 1")
    screen.say("stage 1 of 2: warning: disk full")
    assert capsys.readouterr().out == "stage 1 of 2: warning: disk full\n"


@pytest.fixture
def clock(monkeypatch):
    """The time, which passes only when a test says so."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(live_screen.time, "perf_counter", lambda: now.seconds)
    return now


def drawn(screen, width=100):
    console = Console(width=width)
    with console.capture() as captured:
        console.print(screen)
    return captured.get().splitlines()


def test_the_status_counts_the_time_of_steps_only(config, clock):
    config = changed(config, training__total_steps=1000, training__evaluate_every=30, model__vocab_size=100)
    flops = 256 * flops_per_token(config.model, 16)
    screen = LiveScreen()
    assert drawn(screen) == ["starting"]
    screen.begin("stage 2 of 2: ")
    screen.compiling(10, config, Throughput(256, flops, None, {}))
    clock.seconds += 65
    assert drawn(screen)[0] == "stage 2 of 2"
    assert drawn(screen)[-1] == "compiling the training step  1m05s"
    for step in range(11, 21):
        screen.stepped(step, 5.0)
        clock.seconds += 2
        if step == 15:
            with screen.doing("evaluating", 40) as advance:
                clock.seconds += 90
                advance(12)
                assert re.fullmatch(r"evaluating  ━+ +12/40  1m30s", drawn(screen)[-1])
            clock.seconds += 2
    screen.stepped(21, 4.25)
    screen.memory = 12_300_000_000
    _, steps, speed = drawn(screen)
    assert re.fullmatch(r"step 21/1,000  ━+ +2%  loss 4.2500  █+▁", steps.strip())
    assert speed == "128 tokens/s  MFU 50.0%  ETA 32m38s  memory 12.3 GB  next evaluation 30, save 24"
    assert all(len(line) <= 60 - len("^C ") for line in drawn(screen, 60))


def test_the_status_says_that_a_signal_has_come(monkeypatch):
    monkeypatch.setattr(interruption, "asked", signal.SIGINT)
    assert drawn(LiveScreen())[-1] == "stops after this step, and saves; a second signal ends it at once"


@pytest.mark.parametrize("n_steps", [1, 15, 16, 17, 31, 32, 33, 1000])
def test_the_sparkline_is_the_last_half_of_the_losses(n_steps):
    losses = live_screen._Losses()
    for step in range(n_steps):
        losses.add(1000.0 - step)
        losses.add(math.nan)  # a skipped step is no point of the line
    line = losses.sparkline()
    assert len(line) == n_steps if n_steps <= 16 else len(line) == 16
    assert list(line) == sorted(line, reverse=True)
    assert n_steps == 1 or (line[0], line[-1]) == ("█", "▁")


def test_a_run_goes_on_when_its_terminal_is_gone(monkeypatch):
    ours, theirs = pty.openpty()
    file = open(theirs, "w", encoding="utf-8")  # noqa: SIM115 - closed below, where it fails
    monkeypatch.setattr("sys.stdout", file)
    monkeypatch.setenv("TERM", "xterm")
    with LiveScreen() as screen:
        screen.say("before")
        written = b""
        while b"before" not in written:
            written += os.read(ours, 1000)
        os.close(ours)
        screen.say("after")
        screen.say("after")
    with contextlib.suppress(OSError):
        file.close()
