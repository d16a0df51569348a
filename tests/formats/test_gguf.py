"""GGUF: the model in one file, with what llama.cpp needs to give the ids of `transformers`.

What is asked for here was found out with llama.cpp itself.
"""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from sentencepiece import SentencePieceTrainer
from support.exports import LOWER, TEXTS, config_for, export
from support.weight_folders import random_weights

from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.export.transformers_folder import export_folder
from gpt2_flax.formats.gguf import GGUF, remarks
from gpt2_flax.tokenizers.sentencepiece import SentencePieceTokenizer
from gpt2_flax.tokenizers.tokenizer_json import read_tokenizer_json
from gpt2_flax.tokenizers.train import train_sentencepiece, train_wordpiece
from gpt2_flax.tokenizers.wordpiece import WordPieceTokenizer


@pytest.fixture(scope="module")
def wordpiece():
    return train_wordpiece(TEXTS, 120)


@pytest.fixture(scope="module")
def bpe():
    return train_sentencepiece(TEXTS, 305, "bpe")


@pytest.fixture(scope="module")
def unigram():
    return train_sentencepiece(TEXTS, 305, "unigram")


def gguf_of(folder):
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(folder / GGUF)
    return {name: field.contents() for name, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


@pytest.mark.parametrize("dtype", ["float32", *LOWER])
def test_gguf_holds_the_model_and_says_how_large_it_is(tmp_path, wordpiece, dtype):
    pytest.importorskip("gguf")
    export(tmp_path / "out", wordpiece, format="gguf", dtype=dtype)
    fields, tensors = gguf_of(tmp_path / "out")
    assert {name: fields[name] for name in fields if name.startswith(("gpt2.", "general."))} == {
        "general.architecture": "gpt2",
        "general.name": "out",
        "general.file_type": {"float32": 0, "float16": 1, "bfloat16": 32}[dtype],
        "gpt2.vocab_size": wordpiece.vocab_size,
        "gpt2.context_length": 40,
        "gpt2.embedding_length": 16,
        "gpt2.block_count": 2,
        "gpt2.feed_forward_length": 64,
        "gpt2.attention.head_count": 2,
        "gpt2.attention.layer_norm_epsilon": pytest.approx(1e-5),
    }
    theirs = load_file(tmp_path / "out" / "model.safetensors")
    assert len(tensors) == len(theirs) == 4 + 2 * 12
    pairs = {
        "token_embd.weight": theirs["transformer.wte.weight"],
        "position_embd.weight": theirs["transformer.wpe.weight"],
        "output_norm.bias": theirs["transformer.ln_f.bias"],
        "blk.1.attn_qkv.weight": theirs["transformer.h.1.attn.c_attn.weight"].T,
        "blk.1.attn_output.weight": theirs["transformer.h.1.attn.c_proj.weight"].T,
        "blk.0.ffn_up.weight": theirs["transformer.h.0.mlp.c_fc.weight"].T,
        "blk.0.ffn_down.weight": theirs["transformer.h.0.mlp.c_proj.weight"].T,
        "blk.0.ffn_norm.weight": theirs["transformer.h.0.ln_2.weight"],
    }
    for name, array in pairs.items():
        data = tensors[name].data
        matrix = array.ndim == 2 and name != "position_embd.weight"
        assert (
            tensors[name].tensor_type.name
            == {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype if matrix else "float32"]
        )
        data = data.view(ml_dtypes.bfloat16) if matrix and dtype == "bfloat16" else data
        assert np.array_equal(data.astype(np.float32), array.astype(np.float32)), name


def test_gguf_gives_the_logits_of_the_safetensors(tmp_path, wordpiece):
    """By way of the reader in transformers, which is not ours."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate", reason="transformers reads GGUF with it")
    export(tmp_path / "out", wordpiece, format="gguf")
    tokens = torch.arange(20)[None] % wordpiece.vocab_size
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")  # it cannot read n_positions from GGUF
    logits = [
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out", config=config, **options).eval()(tokens).logits
        for options in ({}, {"gguf_file": GGUF})
    ]
    assert torch.equal(*logits)


def test_gguf_of_wordpiece_marks_words_and_puts_nothing_behind_a_prompt(tmp_path, wordpiece):
    pytest.importorskip("gguf")
    config = config_for(wordpiece, surplus=3)
    options = {"card": "", "format": "gguf", "verify": False}
    export_folder(random_weights(config), config, wordpiece, tmp_path / "out", **options)
    fields, tensors = gguf_of(tmp_path / "out")
    assert tensors["token_embd.weight"].shape.tolist() == [16, wordpiece.vocab_size + 3]
    lines = (tmp_path / "out" / "vocab.txt").read_bytes().decode().removesuffix("\n").split("\n")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == config.vocab_size
    for line, token in zip(lines, tokens, strict=False):
        special = line in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
        assert token == (line if special else line[2:] if line.startswith("##") else "▁" + line)
        assert types[tokens.index(token)] == (3 if special else 1)
    assert types[-3:] == [5, 5, 5]
    assert len(set(tokens)) == len(tokens)
    expected = {
        "model": "bert",
        "bos_token_id": wordpiece.bos_id,
        "eos_token_id": wordpiece.eos_id,
        "seperator_token_id": wordpiece.eos_id,
        "padding_token_id": wordpiece.pad_id,
        "unknown_token_id": wordpiece.unk_id,
        "add_bos_token": True,
        "add_eos_token": False,
        "add_sep_token": False,
        "normalizer.lowercase": True,
        "normalizer.strip_accents": True,
    }
    assert {name: fields[f"tokenizer.ggml.{name}"] for name in expected} == expected


def vocabulary(*tokens: str, lowercase: bool = True) -> WordPieceTokenizer:
    lines = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *tokens)
    return WordPieceTokenizer("".join(line + "\n" for line in lines).encode(), "vocab.txt", lowercase)


def test_gguf_of_a_cased_vocabulary_keeps_case_and_accents(tmp_path):
    pytest.importorskip("gguf")
    export(tmp_path / "out", vocabulary("A", "a", lowercase=False), format="gguf")
    fields, _ = gguf_of(tmp_path / "out")
    assert fields["tokenizer.ggml.normalizer.lowercase"] is False
    assert fields["tokenizer.ggml.normalizer.strip_accents"] is False


def test_no_token_of_wordpiece_is_named_as_the_mark_of_a_word(tmp_path):
    """llama.cpp would find it in every word that it does not know, and does not load two tokens of one name."""
    pytest.importorskip("gguf")
    export(tmp_path / "out", vocabulary("▁", "##▁", "", "a", "##▁a", "##[PAD]", "##", "##b"), format="gguf")
    fields, _ = gguf_of(tmp_path / "out")
    tokens = fields["tokenizer.ggml.tokens"]
    assert tokens[4:] == ["▁▁", "##▁", "[EMPTY6]", "▁a", "##▁a", "##[PAD]", "▁##", "b"]


def test_gguf_refuses_two_tokens_of_one_name(tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(UserError, match="two tokens of one name") as caught:
        export(tmp_path / "out", vocabulary("####▁", "##▁"), format="gguf")
    assert caught.value.exit_code == ExitCode.USAGE
    assert list(tmp_path.iterdir()) == []


def test_gguf_of_sentencepiece_bpe_has_its_pieces_scores_and_types(tmp_path, bpe):
    pytest.importorskip("gguf")
    config = config_for(bpe, surplus=3)
    options = {"card": "", "format": "gguf", "verify": False}
    export_folder(random_weights(config), config, bpe, tmp_path / "out", **options)
    fields, _ = gguf_of(tmp_path / "out")
    pieces = bpe.proto.pieces
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.tokens"][:-3] == [piece.piece for piece in pieces]
    assert fields["tokenizer.ggml.token_type"] == [piece.type for piece in pieces] + [5, 5, 5]
    scores = fields["tokenizer.ggml.scores"]
    assert np.allclose(scores[:-3], [piece.score for piece in pieces])
    assert len(scores) == config.vocab_size, "or llama.cpp does not load the file"
    assert max(scores[-3:]) < min(scores[:-3])
    assert fields["tokenizer.ggml.add_space_prefix"] is False
    assert fields["tokenizer.ggml.remove_extra_whitespaces"] is False
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.add_eos_token"] is False
    assert remarks(bpe) == ""


def test_gguf_of_a_unigram_finds_line_ends_and_says_what_it_does_not_find(tmp_path, unigram):
    """llama.cpp has no bytes there: they would be unknown."""
    pytest.importorskip("gguf")
    export(tmp_path / "out", unigram, format="gguf")
    fields, _ = gguf_of(tmp_path / "out")
    tokens, types, scores = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "scores"))
    assert fields["tokenizer.ggml.model"] == "t5"
    pieces = unigram.proto.pieces
    names = {piece.piece for piece in pieces}
    lowest = min(piece.score for piece in pieces if piece.type == piece.NORMAL)
    for index, piece in enumerate(pieces):
        expected = (piece.piece, piece.type, piece.score)
        character = chr(int(piece.piece[3:5], 16)) if piece.type == piece.BYTE else "\0"
        if "\0" < character < "\x80" and character not in {*names, " "}:
            expected = (character, 1, lowest - 10)
        assert (tokens[index], types[index]) == expected[:2]
        assert scores[index] == pytest.approx(expected[2])
    newline = unigram.encode_batch(["\n"])[0].tolist()
    assert [tokens[index] for index in newline] == ["\n"]
    assert len(set(tokens)) == len(tokens)
    assert "Characters that the vocabulary lacks are `<unk>` in llama.cpp" in remarks(unigram)


AS_IT_IS = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "model"),
    [
        ({"model_type": "bpe", "byte_fallback": True} | AS_IT_IS, "llama"),
        ({"model_type": "char", "byte_fallback": True} | AS_IT_IS, "llama"),
        ({"model_type": "char"}, "t5"),
        ({"model_type": "unigram"}, "t5"),
        ({"model_type": "unigram", "add_dummy_prefix": False} | AS_IT_IS, "t5"),
        ({"model_type": "bpe"} | AS_IT_IS, None),  # llama.cpp crashes at a rare character
        ({"model_type": "bpe", "byte_fallback": True}, None),  # it does not normalize
        ({"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}, None),
        ({"model_type": "unigram", "add_dummy_prefix": False}, None),  # it puts a blank before the text
    ],
)
def test_sentencepiece_of_others_becomes_what_llama_cpp_reads_alike_or_is_refused(tmp_path, options, model):
    pytest.importorskip("gguf")
    trained = io.BytesIO()
    options = {
        "vocab_size": 400,
        "hard_vocab_limit": False,
        "user_defined_symbols": ["天气"],
        "minloglevel": 2,
    } | options
    SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=trained, **options)
    tokenizer = SentencePieceTokenizer(trained.getvalue(), "m.model")
    if model is None:
        with pytest.raises(UserError, match="cannot tokenize as this SentencePiece model") as caught:
            export(tmp_path / "out", tokenizer, format="gguf")
        assert caught.value.exit_code == ExitCode.USAGE
        assert list(tmp_path.iterdir()) == []
        return
    export(tmp_path / "out", tokenizer, format="gguf")
    fields, _ = gguf_of(tmp_path / "out")
    assert fields["tokenizer.ggml.model"] == model
    normalizer = tokenizer.proto.normalizer_spec
    assert bytes(fields.get("tokenizer.ggml.precompiled_charsmap", [])) == normalizer.precompiled_charsmap
    assert fields["tokenizer.ggml.add_space_prefix"] is normalizer.add_dummy_prefix
    own = fields["tokenizer.ggml.tokens"].index("天气")
    # The other kind would make it cut characters that begin with the same byte.
    assert fields["tokenizer.ggml.token_type"][own] == {"llama": 4, "t5": 1}[model]
    assert remarks(tokenizer) == ""


def byte_level_tokenizer(folder):
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    backend.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    backend.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.slow
def test_gguf_of_byte_level_bpe_has_its_merges(tmp_path):
    pytest.importorskip("gguf")
    file = byte_level_tokenizer(tmp_path)
    tokenizer = read_tokenizer_json(file)
    export(tmp_path / "out", tokenizer, format="gguf", verify=True)
    fields, _ = gguf_of(tmp_path / "out")
    model = json.loads(file.read_text())["model"]
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert fields["tokenizer.ggml.merges"] == [" ".join(merge) for merge in model["merges"]]
    assert fields["tokenizer.ggml.tokens"][-1] == "<|endoftext|>"
    assert fields["tokenizer.ggml.token_type"][-1] == 3


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("pre_tokenizer", {"add_prefix_space": True}),
        ("pre_tokenizer", {"use_regex": False}),
        ("model", {"ignore_merges": True}),
        (None, {"normalizer": {"type": "NFC"}}),
    ],
)
def test_gguf_refuses_byte_level_bpe_unlike_that_of_gpt2(tmp_path, part, change):
    pytest.importorskip("gguf")
    file = byte_level_tokenizer(tmp_path)
    spec = json.loads(file.read_text())
    (spec if part is None else spec[part]).update(change)
    file.write_text(json.dumps(spec))
    with pytest.raises(UserError, match="GGUF has no tokenizer of this kind") as caught:
        export(tmp_path / "out", read_tokenizer_json(file), format="gguf")
    assert caught.value.exit_code == ExitCode.USAGE
    assert not (tmp_path / "out").exists()


def test_gguf_refuses_a_tokenizer_that_it_does_not_know(tmp_path, wordpiece):
    pytest.importorskip("gguf")
    wordpiece.save(tmp_path)
    tokenizer = read_tokenizer_json(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="GGUF has no tokenizer of this kind") as caught:
        export(tmp_path / "out", tokenizer, format="gguf")
    assert caught.value.exit_code == ExitCode.USAGE
    assert not (tmp_path / "out").exists()


def test_without_the_package_gguf_is_refused_before_anything_is_done(tmp_path, wordpiece, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"gpt2_flax\[gguf\]"):
        export(tmp_path / "out", wordpiece, format="gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.multiprocess
def test_gguf_and_safetensors_are_written_without_torch():
    code = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
import tempfile, pathlib
from support.exports import TEXTS, export
from gpt2_flax.tokenizers.train import train_wordpiece
with tempfile.TemporaryDirectory() as folder:
    assert export(pathlib.Path(folder) / "out", train_wordpiece(TEXTS, 120), format="gguf", verify=True) is None
    assert (pathlib.Path(folder) / "out" / "model.gguf").stat().st_size > 10000
"""
    pytest.importorskip("gguf")
    tests = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
