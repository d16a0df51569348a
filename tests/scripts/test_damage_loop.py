"""Damaged runs, through every command that reads them: `scripts/damage_loop.py`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.multiprocess

SCRIPT = Path(__file__).parents[2] / "scripts" / "damage_loop.py"


@pytest.mark.slow(60)
@pytest.mark.parametrize(
    "damages",
    [
        50,
        pytest.param(
            400,
            marks=pytest.mark.skipif(
                "GPT2_FLAX_LONG_TESTS" not in os.environ, reason="GPT2_FLAX_LONG_TESTS is not set"
            ),
        ),
    ],
)
def test_no_reader_is_silent_about_damages(tmp_path, damages):
    command = [sys.executable, SCRIPT, "--damages", str(damages), "--seed", "1", "--folder", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=900)
    assert done.stderr == ""
    assert done.returncode == 0, done.stdout
    assert re.search(rf"^passed: {damages} damages, \d+ answers, 0 wrong", done.stdout, re.MULTILINE)
    answers = {what: int(count) for count, what in re.findall(r"^ *(\d+) (\w+: .+)$", done.stdout, re.MULTILINE)}
    assert answers["resume: the one before"] > 0
    assert answers["verify: 74"] > 0
    for reader in ("evaluate", "generate", "export", "resume"):
        assert answers[f"{reader}: as undamaged"] > 0
        if damages == 400:  # fewer damages do not meet all of these
            assert answers[f"{reader}: the one before"] > 0
            assert answers["train: as undamaged"] > 0  # from an older checkpoint too
