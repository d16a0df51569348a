import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.documents import blocks

from gpt2_flax.data.dataset import TokenDataset
from gpt2_flax.data.dataset_info import SPLITS, DatasetInfo, Duplicates, Example, LeftOut, write_info
from gpt2_flax.data.dataset_writer import ShardWriter
from gpt2_flax.data.inspect import PERCENTS, inspection_lines, left_out_lines, split_figures, split_line
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.tokenizers.ragged_ids import token_dtype
from gpt2_flax.tokenizers.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
CHARACTERS = "这是很久之前的事情了"


def write_dataset(folder: Path, vocabulary: Path, texts: dict[str, list[str]], **info) -> TokenDataset:
    """One shard a split."""
    tokenizer = load_tokenizer(vocabulary)
    shards = {}
    for split in SPLITS:
        with ShardWriter(folder, split, 0, tokenizer.vocab_size, tokenizer.unk_id) as writer:
            for text in texts[split]:
                ids = [tokenizer.bos_id, *tokenizer.encode_batch([text])[0], tokenizer.eos_id]
                writer.add(np.array(ids, np.uint32), np.array([0]), len(text))
            shards[split] = [writer.close()]
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "unk_id": tokenizer.unk_id}
    sizes = {"dtype": token_dtype(tokenizer.vocab_size), "vocab_size": tokenizer.vocab_size}
    values = {"tokenizer_fingerprint": tokenizer.fingerprint, "shards": shards}
    write_info(folder, DatasetInfo(**ids | sizes | values | info))
    return TokenDataset(folder)


@pytest.fixture
def vocabulary(tmp_path) -> Path:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "\x1b", *CHARACTERS]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def dataset(tmp_path, vocabulary) -> TokenDataset:
    train = [CHARACTERS[: n % 10 + 1] * (n // 10 + 1) for n in range(60)]
    return write_dataset(
        tmp_path / "dataset", vocabulary, {"train": train, "validation": [CHARACTERS, "飞" * 300, "这飞是" * 2]}
    )


def chunked(numbers: list[int], size: int):
    return lambda: (np.array(numbers[i : i + size]) for i in range(0, len(numbers), size))


lengths = st.one_of(st.integers(1, 40), st.integers(60, 140), st.sampled_from([2**16 - 1, 2**16, 2**16 + 1, 200_000]))


@pytest.mark.slow
@given(st.lists(lengths, max_size=30), st.integers(1, 8), st.lists(st.integers(1, 130), max_size=3))
def test_figures_are_those_of_the_documents_one_by_one(documents, chunk, row_lengths):
    split = SimpleNamespace(
        n_documents=len(documents),
        n_characters=None,
        n_tokens=sum(documents),
        n_unknown=0,
        document_lengths=chunked(documents, chunk),
    )
    figures = split_figures(split, row_lengths)
    for percent, quantile in zip(PERCENTS, figures.quantiles, strict=bool(documents)):
        enough = [n for n in documents if 100 * sum(other <= n for other in documents) >= percent * len(documents)]
        assert quantile == min(enough)
    for row, length in zip(figures.rows, row_lengths, strict=True):
        rows = [min(length + 1, n - start) for n in documents for start in range(0, n, length + 1)]
        assert row.padded_rows == len(rows)
        empty = sum(max(0, length - held) for held in rows)
        assert row.padding == pytest.approx(empty / max(1, length * len(rows)))
        assert row.kept == pytest.approx(sum(min(n, length) for n in documents) / max(1, sum(documents)))
        assert row.packed_rows == len(range(0, max(0, sum(documents) - 1), length))


def test_what_is_printed_has_the_counts_and_the_same_samples_every_time(dataset):
    lines = list(inspection_lines(dataset, samples=3))
    assert lines == list(inspection_lines(dataset, samples=3))
    text = "\n".join(lines)
    figures = split_figures(dataset.validation, ())
    assert (figures.documents, figures.unknown, figures.tokens, figures.quantiles[-1]) == (3, 302, 322, 302)
    assert re.search(r"^documents +60 +3$", text, re.M)
    assert re.search(r"^unknown tokens +0 \(0.00%\) +302 \(93.79%\)$", text, re.M)
    samples = [line for line in lines if line.startswith(("train document", "validation document"))]
    numbers = [int(line.split()[2]) for line in samples]
    assert numbers == [10, 30, 50, 0, 1, 2]
    for number, place in zip(numbers[:3], (lines.index(line) for line in samples[:3]), strict=True):
        assert lines[place + 1] == "  " + CHARACTERS[: number % 10 + 1] * (number // 10 + 1)
    assert lines[-1] == "  这\ufffd是这\ufffd是"
    assert lines[-4] == "  " + "\ufffd" * 200 + "..."
    assert not [line for line in inspection_lines(dataset, samples=0) if "document " in line and " of " in line]


def test_a_split_without_documents_and_characters_that_are_not_known_are_shown(tmp_path, vocabulary):
    dataset = write_dataset(tmp_path / "dataset", vocabulary, {"train": [CHARACTERS], "validation": []})
    shard = dataset.info.shards["train"][0].model_copy(update={"characters": None})
    shards = dataset.info.shards | {"train": [shard]}
    write_info(dataset.folder, dataset.info.model_copy(update={"shards": shards, "unk_id": None}))
    dataset = TokenDataset(dataset.folder)
    text = "\n".join(inspection_lines(dataset))
    assert re.search(r"^characters +not known +0$", text, re.M)
    assert "unknown none" in text
    assert split_line(dataset.info, "train") == "train: 1 documents, 12 tokens"
    assert split_line(dataset.info, "validation") == "validation: 0 documents, 0 characters, 0 tokens"


def test_what_was_left_out_is_told_and_nothing_reaches_the_terminal_raw(tmp_path, vocabulary):
    example = Example(file="a\x1b[2J.txt", line=7, reason="not UTF-8")
    dataset = write_dataset(
        tmp_path / "dataset",
        vocabulary,
        {"train": [CHARACTERS], "validation": [CHARACTERS]},
        sources=["\x1b]0;\n.txt"] * 12,
        left_out=LeftOut(skipped=1234, replaced=5, examples=[example] * 100),
        duplicates=Duplicates(documents=6, characters=7890),
    )
    told = list(left_out_lines(dataset.info))
    assert "1,234 documents left out, 5 mended" in told[0]
    assert told[1].endswith("a\\x1b[2J.txt:7: not UTF-8")
    assert "6 documents left out, 7,890 characters" in told[-1]
    lines = list(inspection_lines(dataset))
    assert "and 2 more" in lines[0]
    assert set(told) <= set(lines)
    assert all(line.isprintable() for line in lines)
    escape = np.array([2, 4, 3], "<u2")  # a vocabulary may contain terminal sequences
    with ShardWriter(dataset.folder, "train", 0, dataset.info.vocab_size, 1) as writer:
        writer.add(escape, np.array([0]), 1)
        shard = writer.close()
    shards = dataset.info.shards | {"train": [shard]}
    write_info(dataset.folder, dataset.info.model_copy(update={"shards": shards}))
    assert "  \\x1b" in list(inspection_lines(TokenDataset(dataset.folder)))


def test_a_dataset_with_another_tokenizer_is_refused(dataset):
    path = dataset.tokenizer_folder / "vocab.txt"
    path.write_bytes(path.read_bytes().replace("这".encode(), "那".encode()))
    with pytest.raises(UserError, match="tokenizer is not the one") as error:
        list(inspection_lines(dataset))
    assert error.value.exit_code == ExitCode.DATA
    assert error.value.where == str(dataset.tokenizer_folder)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the sample of CLUECorpusSmall")
def test_figures_of_a_real_corpus(tmp_path):
    texts = (SHARED / "CLUECorpusSmall_sampled.txt").read_text(encoding="utf-8").split("\n")
    texts = {"train": [text for text in texts if text.strip()], "validation": []}
    dataset = write_dataset(tmp_path / "dataset", SHARED / "google_zh_vocab.txt", texts)
    figures = split_figures(dataset.train)
    short, long = figures.rows
    # A word of more than 100 characters is one unknown token; a limit of 200 would give 80 tokens more.
    assert (figures.documents, figures.tokens) in ((2500, 663_005 - 80), (2500, 663_005))
    assert (short.padded_rows, f"{short.padding:.1%}") in ((6572, "21.7%"), (6573, "21.7%"))
    assert (long.padded_rows, f"{long.padding:.1%}") == (2716, "76.2%")
    assert (short.packed_rows, long.packed_rows) == (5180, 648)


@pytest.mark.multiprocess
def test_the_program_in_the_documentation_reads_what_we_read(tmp_path, dataset):
    (program,) = blocks((ROOT / "docs" / "data.md").read_text(encoding="utf-8"), "python")
    assert len(program.splitlines()) <= 22
    more = []  # another shard, and an empty one
    for number, ids in ((1, [2, 5, 6, 3, 2, 7, 3]), (2, [])):
        with ShardWriter(dataset.folder, "train", number, 15, 1) as writer:
            writer.add(np.array(ids, np.uint16), np.array([0, 4]), None)
            more.append(writer.close())
    shards = dataset.info.shards | {"train": dataset.info.shards["train"] + more}
    write_info(dataset.folder, dataset.info.model_copy(update={"shards": shards}))
    show = f"print(json.dumps([[d.tolist() for d in read_documents({str(dataset.folder)!r}, s)] for s in {SPLITS}]))"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\n{show}"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    opened = TokenDataset(dataset.folder)
    opened.verify()
    train, validation = ([ids.tolist() for ids in split.documents()] for split in (opened.train, opened.validation))
    assert json.loads(done.stdout) == [train, validation]
    assert train[-2:] == [[2, 5, 6, 3], [2, 7, 3]]
