"""Which tokens begin and end documents: what the files of a folder name, in their order; transformers agrees."""

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from support.tokenizer_texts import TEXTS, ids_of
from support.weight_folders import CONFIG, write_folder
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from gpt2_flax import __main__ as cli
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.tokenizers.special_tokens import Ends
from gpt2_flax.tokenizers.tokenizer import load_tokenizer
from gpt2_flax.tokenizers.train import train_sentencepiece, train_wordpiece

BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
SPECIAL = ["<|endoftext|>", "[CLS]", "[SEP]", "[PAD]", "<s>", "</s>", "<|im_end|>", BEGIN, END, "<bos>", "<eos>"]


def byte_level(special=SPECIAL) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def write(folder: Path, tokenizer: Tokenizer | None = None, **files: object) -> Path:
    """A folder with a tokenizer.json and files by their names without `.json`."""
    (tokenizer or byte_level()).save(str(folder / "tokenizer.json"))
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def ends_of(tokenizer) -> tuple[str, str]:
    return tokenizer.special_tokens["bos_token"], tokenizer.special_tokens["eos_token"]


def as_dict(content: str) -> dict[str, object]:
    return {"__type": "AddedToken", "content": content, "lstrip": False, "normalized": True, "special": True}


NAMED = [
    ({"tokenizer_config": {"bos_token": BEGIN, "eos_token": END}}, (BEGIN, END)),
    ({"tokenizer_config": {"bos_token": as_dict(BEGIN), "eos_token": as_dict(END)}}, (BEGIN, END)),
    ({"tokenizer_config": {"bos_token": None, "eos_token": "<|im_end|>"}}, ("<|im_end|>", "<|im_end|>")),
    ({"special_tokens_map": {"bos_token": "<bos>", "eos_token": as_dict("<eos>")}}, ("<bos>", "<eos>")),
    ({"tokenizer_config": {"eos_token": "</s>"}}, ("<s>", "</s>")),
    ({"tokenizer_config": dict.fromkeys(("bos_token", "eos_token"), "</s>")}, ("</s>", "</s>")),
    ({"tokenizer_config": dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>")}, ("<|endoftext|>",) * 2),
    ({"generation_config": {"bos_token_id": 9, "eos_token_id": [10, 6]}}, ("<bos>", "<eos>")),
    ({"generation_config": {"eos_token_id": [50256, 6]}}, ("<|im_end|>", "<|im_end|>")),
    ({"config": {"bos_token_id": 0, "eos_token_id": 0}}, ("<|endoftext|>", "<|endoftext|>")),
    ({"config": {"bos_token_id": 5, "eos_token_id": 5}}, ("</s>", "</s>")),
    # What GPT2Config writes unasked is no token here, nor is an id of a piece of text.
    ({"config": {"bos_token_id": 50256, "eos_token_id": 50256}}, ("[CLS]", "[SEP]")),
    ({"config": {"bos_token_id": 300, "eos_token_id": 300}}, ("[CLS]", "[SEP]")),
    ({"config": {"bos_token_id": True, "eos_token_id": "5"}}, ("[CLS]", "[SEP]")),
    # From several files, and the first to name one.
    (
        {"tokenizer_config": {"eos_token": "<|im_end|>"}, "config": {"bos_token_id": 0, "eos_token_id": 0}},
        ("<|endoftext|>", "<|im_end|>"),
    ),
    (
        {"special_tokens_map": {"eos_token": "<eos>"}, "generation_config": {"bos_token_id": 9, "eos_token_id": 0}},
        ("<bos>", "<eos>"),
    ),
    ({"tokenizer_config": {"eos_token": "<lost>"}, "config": {"eos_token_id": 8}}, (END, END)),
    ({}, ("[CLS]", "[SEP]")),
]


@pytest.mark.parametrize(("files", "expected"), NAMED)
def test_begin_and_end_are_the_named_ones(tmp_path, files, expected):
    tokenizer = load_tokenizer(write(tmp_path, **files))
    assert ends_of(tokenizer) == expected
    assert (tokenizer.bos_id, tokenizer.eos_id) == tuple(map(SPECIAL.index, expected))


@pytest.mark.parametrize(("files", "expected"), NAMED)
def test_a_saved_folder_reads_back_here_and_in_transformers(tmp_path, files, expected):
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(write(tmp_path, **files))
    (out := tmp_path / "out").mkdir()
    tokenizer.save(out)
    for again in (load_tokenizer(out), pickle.loads(pickle.dumps(tokenizer))):
        assert ends_of(again) == expected
        assert again.fingerprint == tokenizer.fingerprint
        assert again.special_tokens == tokenizer.special_tokens
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert (theirs.bos_token, theirs.eos_token) == expected
    assert theirs(TEXTS[1])["input_ids"] == [tokenizer.bos_id, *ids_of(tokenizer, TEXTS[1])]


@pytest.mark.parametrize("files", [files for files, _ in NAMED[:7]])
def test_transformers_names_the_same_tokens_of_the_original_folder(tmp_path, files):
    transformers = pytest.importorskip("transformers")
    config = files.get("tokenizer_config", {}) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    folder = write(tmp_path, **files | {"tokenizer_config": config})
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    assert theirs.eos_token == ours.special_tokens["eos_token"]
    if theirs.bos_token is not None:
        assert theirs.bos_token == ours.special_tokens["bos_token"]


def test_what_is_passed_over_is_said(tmp_path, capsys):
    values = {"bos_token_id": 0, "eos_token_id": [10, 6]}
    load_tokenizer(write(tmp_path, tokenizer_config={"bos_token": "<bos>"}, generation_config=values))
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"warning: bos_token in {tmp_path}: generation_config.json says '<|endoftext|>'; '<bos>' is used",
        f"warning: eos_token in {tmp_path}: generation_config.json lists '<eos>', '<|im_end|>'; '<eos>' is used",
    ]
    load_tokenizer(write(tmp_path, tokenizer_config={"bos_token": "<lost>"}, generation_config={}))
    assert "tokenizer_config.json says '<lost>', which the vocabulary lacks" in capsys.readouterr().err
    load_tokenizer(write(tmp_path, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"}))
    assert capsys.readouterr().err == ""


def test_fingerprints_of_known_families_are_what_they_were(tmp_path):
    spec = json.loads(byte_level(["<|endoftext|>"]).to_str())
    tokenizer = load_tokenizer(write(tmp_path, byte_level(["<|endoftext|>"])))
    template = {"type": "TemplateProcessing"}
    token, first, second = (
        {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
        *({"Sequence": {"id": name, "type_id": 0}} for name in "AB"),
    )
    template |= {"single": [token, first], "pair": [token, first, second]}
    template |= {"special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}}
    spec |= {"truncation": None, "padding": None, "post_processor": template}
    assert tokenizer.fingerprint == hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()


def test_tokenizers_with_other_ends_have_other_fingerprints(tmp_path):
    folder = write(tmp_path)
    pairs = [("<s>", "</s>"), ("<s>", "<eos>"), ("<bos>", "<eos>"), ("<bos>", "</s>"), ("<eos>", "<eos>")]
    assert len({load_tokenizer(folder, ends=Ends(*pair)).fingerprint for pair in pairs}) == len(pairs)


def test_a_named_token_that_is_a_piece_of_text_becomes_a_special_one(tmp_path):
    transformers = pytest.importorskip("transformers")
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "<": 2, "e": 3, ">": 4, "<e>": 5}, []))
    backend.decoder = decoders.Fuse()
    backend.add_tokens([AddedToken("<e>", special=False)])
    folder = write(tmp_path, backend, tokenizer_config={"eos_token": "<e>"})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_id == tokenizer.bos_id == 5
    assert ids_of(tokenizer, "a<e>b") == [0, 2, 3, 4, 1]
    assert tokenizer.decode([0, 5]) == "a"
    (out := tmp_path / "out").mkdir()
    tokenizer.save(out)
    theirs = transformers.AutoTokenizer.from_pretrained(out, split_special_tokens=True)
    assert theirs("a<e>b")["input_ids"] == [5, 0, 2, 3, 4, 1]
    assert theirs.decode([0, 5], skip_special_tokens=True) == "a"


def test_the_unknown_token_of_gpt2_is_no_unknown_token(tmp_path):
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    tokenizer = load_tokenizer(write(tmp_path, tokenizer_config=names))
    assert (tokenizer.unk_id, tokenizer.pad_id, tokenizer.eos_id) == (None, None, 0)


@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map", "generation_config", "config"])
@pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000, '"x"'])
def test_a_damaged_file_beside_it_is_named(tmp_path, name, content):
    (write(tmp_path) / f"{name}.json").write_text(content)
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path)
    assert error.value.exit_code == ExitCode.DATA
    assert error.value.where == str(tmp_path / f"{name}.json")


# A vocab.txt and a SentencePiece model.


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_other_kinds_take_named_tokens_too(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    usual = train_wordpiece(TEXTS, 200) if kind == "wordpiece" else train_sentencepiece(TEXTS, 350, kind)
    usual.save(tmp_path)
    name = "vocab.txt" if kind == "wordpiece" else "spiece.model"
    bos, eos = ("[MASK]", "。") if kind == "wordpiece" else ("<s>", "你")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": bos, "eos_token": eos}))
    named, asked = load_tokenizer(tmp_path), load_tokenizer(tmp_path / name, ends=Ends(bos, eos))
    assert named.fingerprint == asked.fingerprint != usual.fingerprint
    assert named.bos_id != named.eos_id != usual.eos_id
    (out := tmp_path / "out").mkdir()
    named.save(out)
    assert (out / name).read_bytes() == (tmp_path / name).read_bytes()
    theirs = transformers.AutoTokenizer.from_pretrained(out, split_special_tokens=True)
    assert (theirs.bos_token, theirs.eos_token) == (bos, eos)
    for again in (load_tokenizer(out), pickle.loads(pickle.dumps(named))):
        assert (again.fingerprint, again.bos_id, again.eos_id) == (named.fingerprint, named.bos_id, named.eos_id)
        assert named.eos_id not in ids_of(again, "你好。" * 100_000), "a text made the end of a document"
        assert again.decode([*ids_of(again, "好"), again.eos_id]) == "好"
    assert theirs("今天天气很好")["input_ids"] == [named.bos_id, *ids_of(named, "今天天气很好")]


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_the_usual_ends_by_name_change_nothing(tmp_path, kind):
    tokenizer = train_wordpiece(TEXTS, 200) if kind == "wordpiece" else train_sentencepiece(TEXTS, 350)
    tokenizer.save(tmp_path)
    ends = Ends("[CLS]", "[SEP]") if kind == "wordpiece" else Ends("<s>", "</s>")
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    (tmp_path / "config.json").write_text(json.dumps(ids))
    for again in (load_tokenizer(tmp_path), load_tokenizer(tmp_path, ends=ends)):
        assert again.fingerprint == tokenizer.fingerprint


# vocab.json and merges.txt.


def write_gpt2(folder: Path, **files: object) -> Path:
    byte_level(["<|endoftext|>"]).model.save(str(folder))
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer_config": {"add_prefix_space": True}},
        {"added_tokens": {"<user>": 401, "<bot>": 400}, "special_tokens_map": {"eos_token": "<bot>"}},
        {
            "tokenizer_config": {
                "added_tokens_decoder": {"0": as_dict("<|endoftext|>"), "400": as_dict("<user>")},
                "tokenizer_class": "GPT2Tokenizer",
            }
        },
    ],
)
def test_vocab_json_with_merges_gives_the_ids_of_transformers(tmp_path, files):
    transformers = pytest.importorskip("transformers")
    folder = write_gpt2(tmp_path, **files)
    assert len(json.loads((folder / "vocab.json").read_text())) == 400
    ours = load_tokenizer(folder)
    theirs = transformers.GPT2Tokenizer.from_pretrained(folder, split_special_tokens=True)
    for text in [*TEXTS, "<user> naïve  \n\n 😀<bot>"]:
        assert ids_of(ours, text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.eos_id == theirs.eos_token_id == (400 if "added_tokens" in files else 0)
    assert ours.vocab_size == len(theirs)
    assert load_tokenizer(folder / "merges.txt").fingerprint == load_tokenizer(folder / "vocab.json").fingerprint
    (out := tmp_path / "out").mkdir()
    ours.save(out)
    assert load_tokenizer(out).fingerprint == ours.fingerprint
    assert transformers.AutoTokenizer.from_pretrained(out)(TEXTS[0])["input_ids"] == [
        ours.bos_id,
        *ids_of(ours, TEXTS[0]),
    ]


def test_half_a_vocabulary_and_an_impossible_id_are_refused(tmp_path):
    write_gpt2(tmp_path, added_tokens={"<user>": 777})
    with pytest.raises(UserError, match="cannot have the id 777"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").unlink()
    for path in (tmp_path, tmp_path / "vocab.json"):
        with pytest.raises(UserError) as error:
            load_tokenizer(path)
        assert error.value.exit_code == ExitCode.NO_INPUT
    (tmp_path / "merges.txt").write_text("no merges\n")
    with pytest.raises(UserError, match=r"not a vocab\.json"):
        load_tokenizer(tmp_path)


# Commands.


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return ended.value.code


@pytest.mark.slow
@pytest.mark.parametrize(("bos", "eos"), [("<|endoftext|>", "<|endoftext|>"), (BEGIN, END), ("</s>", "</s>")])
def test_convert_keeps_begin_and_end(tmp_path, bos, eos):
    pytest.importorskip("transformers")
    size = byte_level().get_vocab_size()
    ids = {"bos_token_id": SPECIAL.index(bos), "eos_token_id": SPECIAL.index(eos)}
    config = CONFIG.model_copy(update={"vocab_size": size})
    write_folder(tmp_path / "hf", config, **ids)
    write(tmp_path / "hf", tokenizer_config={"bos_token": bos, "eos_token": eos}, generation_config=ids)
    assert run("convert", tmp_path / "hf", tmp_path / "out") == 0
    assert run("import", tmp_path / "hf", tmp_path / "run") == 0
    assert run("export", tmp_path / "run", tmp_path / "again") == 0
    for folder in (tmp_path / "out", tmp_path / "again"):
        for name in ("config.json", "generation_config.json"):
            found = json.loads((folder / name).read_text())
            assert {key: found[key] for key in ids} == ids


def test_the_options_name_what_nothing_says(tmp_path, corpus, capsys):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    write(folder, byte_level(["<a>", "<z>"]))
    call = ("prepare", corpus, "--validation-fraction", 0.1, "--tokenizer", folder, "--output", tmp_path / "dataset")
    assert run(*call) == ExitCode.DATA
    assert "--bos TOKEN --eos TOKEN" in capsys.readouterr().err
    assert run(*call, "--bos", "<a>", "--eos", "<zz>") == ExitCode.USAGE
    assert "--eos '<zz>' is no token of the vocabulary" in capsys.readouterr().err
    assert run(*call, "--bos", "<a>", "--eos", "<z>") == 0
    info = json.loads((tmp_path / "dataset" / "dataset.json").read_text())
    assert (info["bos_id"], info["eos_id"]) == (0, 1)
    saved = load_tokenizer(tmp_path / "dataset" / "tokenizer")
    assert (ends_of(saved), saved.fingerprint) == (("<a>", "<z>"), info["tokenizer_fingerprint"])
    tokens = tmp_path / "tokens.bin"
    np.array([5, 6, 1, 7, 8, 9, 1, 5, 5, 1] * 50, "<u2").tofile(tokens)
    options = (
        "--tokenizer",
        folder,
        "--dtype",
        "uint16",
        "--validation-fraction",
        0.1,
        "--output",
        tmp_path / "tokens",
    )
    assert run("import-tokens", tokens, *options, "--eos", "<z>") == 0
    assert json.loads((tmp_path / "tokens" / "dataset.json").read_text())["eos_id"] == 1
