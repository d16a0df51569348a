"""The benchmarks run with the options that the documents give, and with small sizes."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from support.documents import commands

ROOT = Path(__file__).parents[2]
SIZES = {
    "checkpoint": "--size tiny --rounds 1",
    "generate": "--size tiny --batches 2 --new 8 --prompt 8 --vocab-size 100 --calls 1 --rounds 1",
    "loader": "--tokens 1e5 --lengths 32 --batch 8 --seconds 0.05 --turns 1",
    "prepare": "--megabytes 1 --slow-megabytes 0.02 --prepare-megabytes 0.2 --repeats 1",
    "train": "--sizes tiny --shapes 2x16 --vocab-size 100 --rounds 1 --steps 2",
}
"""The others have tests of their own, or options of this kind in the documents."""


def without_sizes(name, arguments):
    """The arguments without the options that SIZES gives other values."""
    kept, keep = [], True
    for word in arguments:
        if word.startswith("--"):
            keep = word not in SIZES[name].split()
        kept += [word] * keep
    return kept


def documented():
    """The arguments of each benchmark in the documents, without programs for accelerators."""
    found = {"checkpoint": [[]]}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for program, script, *arguments in (words for words in commands(page.read_text(encoding="utf-8")) if words[1:]):
            name = Path(script).stem.removeprefix("benchmark_")
            if program == "python" and name in SIZES and "--topology" not in arguments:
                several, kept = found.setdefault(name, []), without_sizes(name, arguments)
                several += [kept] * (kept not in several)
    return [(name, arguments) for name, several in found.items() for arguments in several]


@pytest.mark.multiprocess
@pytest.mark.skipif("GPT2_FLAX_LONG_TESTS" not in os.environ, reason="GPT2_FLAX_LONG_TESTS is not set")
@pytest.mark.parametrize(("name", "arguments"), documented())
def test_a_benchmark_of_the_documents_runs(name, arguments, tmp_path):
    draw = random.Random(0)
    characters = [*map(chr, range(0x4E00, 0x5200))]
    words = ["".join(draw.choices(characters, k=2)) for _ in range(12_000)]
    lines = ("".join(draw.choices(words, k=25)) for _ in range(8000))  # enough for a vocabulary of 8,000
    (tmp_path / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
    (tmp_path / "google_zh_vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    command = [sys.executable, ROOT / "scripts" / f"benchmark_{name}.py", *arguments, *SIZES[name].split()]
    command += ["--folder", tmp_path] if name == "prepare" else []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert any(character.isdigit() for character in done.stdout)


def test_all_benchmarks_are_in_the_documents():
    assert {name for name, _ in documented()} == SIZES.keys()
