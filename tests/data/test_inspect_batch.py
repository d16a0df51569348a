"""`inspect --batch` shows the rows that the training loop feeds, and their true origin."""

import re

import numpy as np
import pytest
import tomli_w
from support.configs import CHARACTERS, changed
from support.failures import fails

from gpt2_flax import __main__ as cli
from gpt2_flax.data.inspect import batch_lines
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.data.packing import IGNORE, row_layout
from gpt2_flax.data.prepare import prepare
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.tokenizers.tokenizer import load_tokenizer
from gpt2_flax.training import loop

SAMPLE = re.compile(r"sample ([\d,]+): (\S+) row ([\d,]+) of ([\d,]+) in epoch (\d+), (\d+) targets, (\d+) padding")
SEGMENT = re.compile(
    r"  document ([\d,]+) of ([\d,]+), tokens (\d+) to (\d+) of (\d+), (\d+) targets(, ⟨end⟩ inserted)?"
)


def parsed(lines):
    """(sample, folder, targets, padding, [(document, first, last, of, targets, inserted, text)]) of each row shown."""
    rows = []
    for line in filter(None, lines):
        if match := SAMPLE.fullmatch(line):
            sample, folder, *_, targets, padding = match.groups()
            rows.append((int(sample.replace(",", "")), folder, int(targets), int(padding), []))
        elif match := SEGMENT.fullmatch(line):
            document, _, *figures = (int(group.replace(",", "")) for group in match.groups()[:-1])
            rows[-1][-1].append([document, *figures, match.group(7) is not None])
        else:
            assert line.startswith("    "), line
            rows[-1][-1][-1].append(line[4:])
    return rows


def text_of(ids, tokenizer):
    """Decode each token by itself: every token of the small vocabulary is a character."""
    signs = {tokenizer.bos_id: "⟨begin⟩", tokenizer.eos_id: "⟨end⟩", tokenizer.unk_id: "\ufffd"}
    return "".join(signs.get(token) or tokenizer.decode([token]) for token in ids)


@pytest.fixture
def mixed(config, corpus, tokenizer_folder, tmp_path):
    """A run on two datasets, one of which has unknown characters."""
    other = tmp_path / "other.txt"
    other.write_text("\n".join(f"{CHARACTERS[i % 40 : i % 40 + 9]}龘" for i in range(60)), encoding="utf-8")
    prepare([str(other)], load_tokenizer(tokenizer_folder), tmp_path / "other", validation_fraction=0.1)
    return changed(config, data__dataset={config.data.dataset: 1.0, str(tmp_path / "other"): 1.0})


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["stream", "best_fit", "document"])
def test_what_is_shown_is_what_the_loop_feeds(mixed, monkeypatch, packing):
    config = changed(mixed, data__packing=packing, training__total_steps=3)
    fed, device_batch = [], loop.device_batch

    def recorded(mesh, n_rows, read, start):
        fed.append(read(start, start + n_rows))
        return device_batch(mesh, n_rows, read, start)

    monkeypatch.setattr(loop, "device_batch", recorded)
    loop.train(config)
    mixture = Mixture(config.data.datasets)
    tokenizer = load_tokenizer(mixture.tokenizer_folder)
    for step, batch in enumerate(fed, 1):
        head, *lines = batch_lines(config, mixture, step, samples=99)
        first = (step - 1) * 16
        assert head == f"step {step} of 3: samples {first} to {first + 15}, 16 rows of 16 tokens, packing {packing}"
        rows = parsed(lines)
        assert [sample for sample, *_ in rows] == list(range(first, first + 16))
        assert {folder for _, folder, *_ in rows} == set(config.data.datasets)
        for row, (_, folder, targets, padding, segments) in enumerate(rows):
            tokens_T, targets_T, segments_T, _ = (array_BT[row] for array_BT in batch)
            assert targets == (targets_T != IGNORE).sum()
            assert padding == (segments_T == 0).sum()
            assert len(segments) == segments_T.max()
            split = mixture.datasets[folder].train
            for number, (document, begin, end, size, trained, inserted, text) in enumerate(segments, 1):
                inside_T = segments_T == number
                assert not inserted
                assert text == text_of(tokens_T[inside_T], tokenizer)
                assert trained == (targets_T[inside_T] != IGNORE).sum()
                ids_T = split.read(*split.bounds(document))
                assert len(ids_T) == size
                np.testing.assert_array_equal(ids_T[begin : end + 1], tokens_T[inside_T])


@pytest.mark.parametrize("packing", ["stream", "best_fit", "document"])
@pytest.mark.parametrize("across", [False, True])
def test_inserted_end_tokens_are_shown_in_the_document_that_has_them(mixed, packing, across):
    keys = {"data__packing": packing, "data__prompt_separator": 0.5, "model__attend_across_documents": across}
    config, mixture, n_inserted = changed(mixed, **keys), Mixture(mixed.data.datasets), 0
    tokenizer = load_tokenizer(mixture.tokenizer_folder)
    batch = mixture.batches(row_layout(config), config.training.seed, 0.5).batch(16, 32)
    rows = parsed(list(batch_lines(config, mixture, 2, samples=99))[1 + across :])
    assert len(rows) == 16
    for row, (_, folder, targets, padding, documents) in enumerate(rows):
        tokens_T, targets_T, segments_T, _ = (array_BT[row] for array_BT in batch)
        assert targets == (targets_T != IGNORE).sum() == sum(document[4] for document in documents)
        assert padding == (segments_T == 0).sum()
        assert "".join(text for *_, text in documents) == text_of(tokens_T[segments_T > 0], tokenizer)
        for document, begin, end, size, _, inserted, text in documents:
            split = mixture.datasets[folder].train
            ids_T = split.read(*split.bounds(document))
            assert len(ids_T) == size
            # An inserted token stands before the one that ends the document.
            assert text_of(ids_T[begin : end + 1], tokenizer) == (text.replace("⟨end⟩", "", 1) if inserted else text)
            n_inserted += inserted
    n_segments = 16 if across else sum(len(documents) for *_, documents in rows)
    assert n_segments / 5 < n_inserted < n_segments  # half of the segments that have a place


def test_rows_are_limited_and_attention_across_documents_is_said(config):
    config = changed(config, model__attend_across_documents=True)
    head, across, *lines = batch_lines(config, Mixture(config.data.datasets), 2, samples=2)
    assert head.startswith("step 2 of 6: samples 16 to 31, ")
    assert "across documents" in across
    assert [sample for sample, *_ in parsed(lines)] == [16, 17]
    assert parsed(lines) == parsed(list(batch_lines(changed(config), Mixture(config.data.datasets), 2, 99))[2:])[:2]
    for step in (0, 7):
        with pytest.raises(UserError, match=f"no step {step}.*1 to 6") as error:
            list(batch_lines(config, Mixture(config.data.datasets), step, 1))
        assert error.value.exit_code == ExitCode.USAGE


@pytest.fixture
def files(config, mixed, tmp_path):
    common = config.model_dump(exclude_none=True)
    output, training = common.pop("output"), common.pop("training")
    stages = [{"output": f"{output}{n}", "training": training | {"total_steps": n}} for n in (1, 2)]
    values = {"one": config, "mixed": mixed}
    values = {name: config.model_dump(exclude_none=True) for name, config in values.items()}
    for name, content in (values | {"stages": common | {"stages": stages}}).items():
        (tmp_path / f"{name}.toml").write_text(tomli_w.dumps(content), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("exit_code", "arguments", "words"),
    [
        (0, "--batch 6 --config {0}/one.toml", ("step 6 of 6", "⟨begin⟩")),
        (0, "{1} --batch 1 --config {0}/one.toml --samples 0", ("step 1 of 6",)),
        (0, "--batch 2 --config {0}/stages.toml --stage 2", ("step 2 of 2",)),
        (64, "--batch 2 --config {0}/stages.toml", ("2 stages", "--stage, 1 to 2")),
        (64, "--batch 2 --config {0}/stages.toml --stage 1", ("no step 2",)),
        (64, "--batch 1 --config {0}/stages.toml --stage 3", ("no stage 3",)),
        (64, "{1} --batch 1 --config {0}/mixed.toml", ("2 datasets", "leave DATASET out")),
        (64, "--batch 7 --config {0}/one.toml", ("no step 7",)),
        (64, "--batch 0 --config {0}/one.toml", ("--batch",)),
        (64, "{1} --batch 1", ("--config",)),
        (64, "{1} --config {0}/one.toml", ("--batch",)),
        (64, "", ("DATASET",)),
        (64, "--verify --batch 1 --config {0}/one.toml", ("--verify",)),
        (66, "--batch 1 --config {0}/none.toml", ("none.toml",)),
        (66, "{0}/none --batch 1 --config {0}/one.toml", ("none/dataset.json",)),
    ],
)
def test_the_command(files, dataset_folder, capsys, exit_code, arguments, words):
    call = ["inspect", *arguments.format(files, dataset_folder).split()]
    if exit_code:
        return fails(capsys, exit_code, call, *words)
    assert cli.exit_code(call) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in words)
    return None
