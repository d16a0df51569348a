"""Runs that are killed, again and again, against a run that nobody disturbed: `scripts/kill_loop.py`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.multiprocess

SCRIPT = Path(__file__).parents[2] / "scripts" / "kill_loop.py"


# What takes minutes: CONTRIBUTING.md says when to run it.
at_night = pytest.mark.skipif("GPT2_FLAX_LONG_TESTS" not in os.environ, reason="GPT2_FLAX_LONG_TESTS is not set")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of all tests here: the corpus, the undisturbed run and compiled programs."""
    return tmp_path_factory.mktemp("kill_loop")


def kill(folder, *arguments):
    command = [sys.executable, SCRIPT, "--folder", folder, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=600)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()[-1]


@pytest.mark.slow(60)
@pytest.mark.parametrize("kills", [7, pytest.param(40, marks=at_night)])
def test_kills_give_the_bits_of_a_run_that_nobody_disturbed(folder, kills):
    code, said = kill(folder, "--kills", str(kills), "--seed", "1")
    assert code == 0, said
    assert said.startswith(f"passed: {kills} kills (")


@at_night
def test_a_kill_at_each_named_point_gives_them_too(folder):
    code, said = kill(folder, "--kills", "0", "--crash-at", "all")
    assert code == 0, said
    assert re.match(r"passed: 15 kills \(15 at named points\)", said)


@at_night
def test_two_processes_of_which_one_or_both_are_killed_give_them_too(folder):
    code, said = kill(folder, "--kills", "1", "--processes", "2", "--seed", "1")
    assert code == 0, said
    assert said.startswith("passed: 1 kills (")


@pytest.mark.parametrize(
    ("part", "step"), [pytest.param("opt", 8, marks=at_night), ("rng", 7), pytest.param("data", 7, marks=at_night)]
)
def test_a_resume_that_forgets_something_is_found(folder, part, step):
    code, said = kill(folder, "--kills", "0", "--crash-at", "commit:3", "commit:2", "--forget", part)
    assert code == 1
    assert re.match(rf"FAILED after 2 kills .*: train/loss of step {step} is \d\.\d+, undisturbed \d\.\d+", said), said
