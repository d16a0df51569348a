"""Any damage of dataset.json is reported in one sentence."""

import copy
import json

import pytest
from support.token_datasets import write_dataset

from gpt2_flax.data.dataset import TokenDataset
from gpt2_flax.data.dataset_info import MARKER
from gpt2_flax.errors import ExitCode, UserError


@pytest.fixture
def dataset(tmp_path) -> TokenDataset:
    return write_dataset(tmp_path, 100, [[[2, 5, 3], [2, 6, 7, 3]], [], [[2, 99, 3], [2, 4, 8, 3]]])


def content_of(path) -> dict:
    """Return the content without its checksum, so that the check of the field must detect a change."""
    values = json.loads(path.read_text())
    del values["sha256"]
    return values


def changed(values: dict, dotted: str, value: object = None, *, remove: bool = False) -> dict:
    *sections, last = dotted.split(".")
    place = values
    for section in sections:
        place = place[int(section) if section.isdecimal() else section]
    if remove:
        del place[last]
    else:
        place[last] = value
    return values


COUNTS = [f"shards.train.0.{name}" for name in ("documents", "tokens", "unknown", "characters", "max_id", "first")]
IDS = ["vocab_size", "eos_id", "bos_id", "unk_id", "left_out.skipped", "left_out.replaced"]
NAMES = ["format", "dtype", "tokenizer_fingerprint"]
SUMS = ["shards.train.0.tokens_sha256", "shards.train.0.offsets_sha256"]
OTHERS = ["version", "shards", "sources", "left_out", "shards.train", "shards.train.0.file", "duplicates"]
FIELDS = COUNTS + IDS + NAMES + SUMS + OTHERS
OPTIONAL = {"sources", "left_out", "duplicates", "left_out.skipped", "left_out.replaced"}
OPTIONAL |= {"shards.train.0.file", "shards.train.0.first"}


def refused(folder) -> UserError:
    with pytest.raises(UserError) as error:
        TokenDataset(folder)
    assert error.value.exit_code == ExitCode.DATA
    assert "\n" not in str(error.value)
    return error.value


@pytest.mark.parametrize("field", FIELDS)
def test_a_damaged_field_of_dataset_json_is_refused(dataset, field):
    path = dataset.folder / MARKER
    whole, content = path.read_text(), content_of(path)
    values = [-1, 2**63, float("nan"), 1.5, True, {"a": 1}, [None], *([] if field in NAMES[2:] else ["2"])]
    for value in values:
        path.write_text(json.dumps(changed(copy.deepcopy(content), field, value)))
        refused(dataset.folder)
    if field not in OPTIONAL:
        path.write_text(json.dumps(changed(copy.deepcopy(content), field, remove=True)))
        assert refused(dataset.folder).where == str(path)
    path.write_text(whole)
    TokenDataset(dataset.folder)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 1},
        {"version": 3},
        {"format": "another"},
        {"dtype": "float32"},
        {"vocab_size": 99},
        {"vocab_size": 2**40},
        {"eos_id": 100},
        {"unk_id": 100},
        {"shards": {"train": []}},
        {"surprise": 1},
        {"sources": ["\ud800"]},
        {"left_out": {"examples": [{"file": "a", "line": 1, "reason": "b"}] * 101}},
        {"duplicates": {"documents": 1}},
    ],
)
def test_a_damaged_dataset_json_is_refused(dataset, change):
    path = dataset.folder / MARKER
    path.write_text(json.dumps(content_of(path) | change))
    assert refused(dataset.folder).where == str(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("documents", 0),
        ("tokens", 0),
        ("documents", 8),
        ("unknown", 8),
        ("first", 1),
        ("file", "/nowhere/tokens.bin"),
        ("file", "."),
        ("tokens_sha256", "0"),
    ],
)
def test_a_shard_that_cannot_be_is_refused(dataset, field, value):
    path = dataset.folder / MARKER
    path.write_text(json.dumps(changed(content_of(path), f"shards.train.0.{field}", value)))
    error = refused(dataset.folder)
    if field == "file":
        assert "import the files again with `gpt2-flax import-tokens`, which copies them" in error.fix
        assert error.where == str(path)


@pytest.mark.slow
def test_a_dataset_json_that_says_something_else_is_refused_and_one_laid_out_otherwise_is_read(dataset):
    path = dataset.folder / MARKER
    whole = path.read_text()
    values = json.loads(whole)
    path.write_text(json.dumps(values))
    assert TokenDataset(dataset.folder).info == dataset.info
    # Only the checksum detects these changes; validation losses are computed with the first field.
    for field, value in (("shards.validation.0.characters", 7), ("sources", ["another.txt"]), ("vocab_size", 101)):
        path.write_text(json.dumps(changed(copy.deepcopy(values), field, value)))
        assert "sha256 differs" in refused(dataset.folder).what
    flips = [i for i, character in enumerate(whole) if character.isalnum()]
    for place in flips:
        flipped = chr(ord(whole[place]) ^ 1)
        path.write_text(whole[:place] + flipped + whole[place + 1 :])
        assert refused(dataset.folder).where == str(path) or "train" in refused(dataset.folder).where
    path.write_text(json.dumps({name: value for name, value in values.items() if name != "sha256"}))
    assert TokenDataset(dataset.folder).info == dataset.info


def test_a_dataset_json_cut_anywhere_is_refused(dataset):
    path = dataset.folder / MARKER
    whole = path.read_bytes().rstrip()
    for place in range(0, len(whole), 97):
        path.write_bytes(whole[:place])
        assert refused(dataset.folder).where == str(path)
    for content in (b"\xff\xfe", b"[" * 100_000, b"7" * 5000, b"null", b"[]"):
        path.write_bytes(content)
        assert refused(dataset.folder).where == str(path)


def test_a_folder_without_dataset_json_is_no_dataset(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="dataset not found") as error:
            TokenDataset(folder)
        assert error.value.exit_code == ExitCode.NO_INPUT
