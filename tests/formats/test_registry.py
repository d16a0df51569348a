"""The table of formats, and who pays for a format."""

import subprocess
import sys
from pathlib import Path

import pytest

from gpt2_flax.formats.registry import FORMATS, reader, recognize, writer


@pytest.mark.parametrize("name", [name for name, one in FORMATS.items() if one.reader])
def test_readers_read_and_compare(name):
    assert callable(reader(name).read_content)
    assert callable(reader(name).compare)


def test_writers_write():
    assert callable(writer("uer").write_folder)
    assert callable(writer("gguf").write_file)
    assert {name for name, one in FORMATS.items() if one.writer} == {"uer", "gguf"}


def test_files_are_recognized_by_their_keys():
    assert recognize({"model": {}, "model_args": {}, "iter_num": 5}) == "nanogpt"
    assert recognize({"embedding.word.embedding.weight": None}) == "uer"


@pytest.mark.slow
@pytest.mark.parametrize("module", ["training.loop", "checkpoint.source", "export.publish", "cli", "serve.server"])
def test_a_format_is_imported_when_it_is_used_only(module):
    code = f"import sys, gpt2_flax.{module}; print(*(name for name in sys.modules if 'gpt2_flax.formats.' in name))"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert set(done.stdout.split()) <= {"gpt2_flax.formats.registry"}
