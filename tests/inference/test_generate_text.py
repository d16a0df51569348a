"""Texts are continued as their ids are: in a batch, alone, streamed, and from the command line."""

import sys

import jax
import numpy as np
import pytest
from flax import nnx

from gpt2_flax.checkpoint.source import Source
from gpt2_flax.checkpoint.weights import model_from_weights, weights_of
from gpt2_flax.cli import app
from gpt2_flax.config.model import ModelConfig
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.export.transformers_folder import export_folder
from gpt2_flax.inference import decode
from gpt2_flax.inference.generate import Generator, prompt_ids, stream_text, unknown_in, with_text_only
from gpt2_flax.inference.sampling import Sampling
from gpt2_flax.model.gpt2 import GPT2
from gpt2_flax.tokenizers.tokenizer import load_tokenizer
from gpt2_flax.tokenizers.train import train_sentencepiece

pytestmark = pytest.mark.slow

PROMPTS = ["这是很久之前的事情了", "", "我们在北京", "好"]
ENGLISH = "The quick brown fox jumps over the lazy dog. 今天天气很好, we walk to the river.\n"


def source_of(tokenizer_folder, surplus=0) -> Source:
    vocab_size = load_tokenizer(tokenizer_folder).vocab_size + surplus
    dropouts = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    sizes = {"vocab_size": vocab_size, "n_positions": 48, "n_layer": 2, "n_head": 2, "n_embd": 32}
    config = ModelConfig(**sizes, **dropouts, initializer_range=0.6, dtype="float32")
    return Source("a test", config, weights_of(jax.jit(lambda: GPT2(config, rngs=nnx.Rngs(1)))()), tokenizer_folder)


@pytest.fixture(scope="module")
def source(tokenizer_folder):
    return source_of(tokenizer_folder)


@pytest.fixture(scope="module")
def generator(source):
    return Generator(source)


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory):
    """Of a SentencePiece vocabulary in which most Chinese characters are three tokens."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    train_sentencepiece([ENGLISH] * 30, vocab_size=330).save(folder)
    return Generator(source_of(folder))


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(top_k=20)], ids=["greedy", "drawn"])
def test_a_text_does_not_depend_on_its_batch_and_comes_in_pieces_as_a_whole(generator, sampling):
    texts = generator.texts(PROMPTS, 20, sampling, seed=3)
    assert all(text.startswith(prompt) and text != prompt for text, prompt in zip(texts, PROMPTS, strict=True))
    assert generator.texts(PROMPTS[:1], 20, sampling, seed=3) == texts[:1]
    pieces = list(generator.stream(PROMPTS[0], 20, sampling, seed=3))
    assert PROMPTS[0] + "".join(pieces) == texts[0]
    assert len(pieces) > 5
    assert not any(" " in text for text in texts)  # Chinese has no blanks between characters


@pytest.mark.parametrize("seed", range(4))
def test_characters_of_several_tokens_come_whole(bytewise, seed):
    sampling = Sampling(temperature=2.0)
    for prompt in ("The quick", "今天", "鱼"):
        pieces = list(bytewise.stream(prompt, 40, sampling, seed))
        assert [prompt + "".join(pieces)] == bytewise.texts([prompt], 40, sampling, seed)


@pytest.mark.parametrize("text", ["鱼和fish, 鲸。 and 😀 so on", "The fox 跑", "  two  blanks"])
def test_pieces_are_cut_between_characters(bytewise, text):
    tokenizer = bytewise.tokenizer
    before, whole = prompt_ids(tokenizer, ["今天 the", text])
    pieces = list(stream_text(tokenizer, before, iter(whole[1:])))
    assert "".join(pieces) == text
    assert len(pieces) > 3
    assert not any("\ufffd" in piece for piece in pieces)
    # A character that is never finished shows at the end.
    assert "".join(stream_text(tokenizer, before, iter(prompt_ids(tokenizer, ["鱼"])[0][1:-1]))).endswith("\ufffd")


def test_samples_of_a_prompt_follow_each_other(generator):
    texts = generator.texts(PROMPTS[:2], 10, Sampling(), seed=0, samples=3)
    assert len(set(texts)) == 6
    assert all(text.startswith(PROMPTS[0]) for text in texts[:3])
    many = generator.texts(["好"], 3, Sampling(), seed=0, samples=decode_rows() + 5)
    assert len(many) == decode_rows() + 5
    assert len(set(many)) > decode_rows() / 2  # the second batch is not the first again


def decode_rows():
    from gpt2_flax.inference import generate

    return generate.MOST_ROWS


def test_programs_serve_all_prompts_and_samplings_that_fit(generator):
    generator.texts(["好人"], 9, Sampling(temperature=0.0), seed=0)
    before = decode.run_steps._cache_size(), decode.read_prompts._cache_size()
    for prompt, sampling in (
        ("好", Sampling(0.3, 7, 0.8)),
        ("我们在北京", Sampling(min_p=0.1, repetition_penalty=1.2)),
        ("事情", Sampling(no_repeat_ngram=2, banned=(9,))),
    ):
        generator.texts([prompt], 8, sampling, seed=1)
        list(generator.stream(prompt, 8, sampling, seed=1))
    assert (decode.run_steps._cache_size(), decode.read_prompts._cache_size()) == before


def test_tokens_without_text_are_never_chosen_unless_asked_for(tokenizer_folder):
    generator = Generator(source_of(tokenizer_folder, surplus=7))
    tokenizer, vocab_size = generator.tokenizer, generator.decoder.cfg.vocab_size
    special = {tokenizer.unk_id, tokenizer.pad_id, tokenizer.bos_id}
    silent = special | set(range(tokenizer.vocab_size, vocab_size))
    assert set(with_text_only(Sampling(), tokenizer, vocab_size).banned) == silent
    assert set(with_text_only(Sampling(), tokenizer, vocab_size, unknown=True).banned) == silent - {tokenizer.unk_id}
    assert with_text_only(Sampling(banned=()), tokenizer, vocab_size).banned == ()

    def drawn(banned):
        sampling = Sampling(temperature=20.0, banned=banned)
        return {token for seed in range(4) for token in generator.new_ids([tokenizer.bos_id], 40, sampling, seed)}

    assert not drawn(None) & silent
    assert drawn(()) & silent


def test_a_prompt_that_leaves_no_room_is_explained_before_anything_is_made(generator):
    for make in (generator.texts_in_turn, generator.stream):
        prompt = "我" * 47
        with pytest.raises(UserError, match=r"prompt of 48 tokens leaves no room in the model's 48 positions") as told:
            make([prompt] if make == generator.texts_in_turn else prompt, 5, Sampling(), 0)
        assert told.value.exit_code == ExitCode.DATA


def test_what_the_vocabulary_lacks_is_named(generator, bytewise):
    tokenizer = generator.tokenizer
    assert unknown_in(tokenizer, ["我们在北京", ""]) == []
    assert unknown_in(tokenizer, ["我们龘在", "𠮷北 龘"]) == ["龘", "𠮷"]
    assert unknown_in(bytewise.tokenizer, ["龘"]) == []  # spelled in bytes


@pytest.fixture(scope="module")
def folder(source, tokenizer_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "model"
    export_folder(source.weights, source.model, load_tokenizer(tokenizer_folder), folder, card="", verify=False)
    return folder


def printed(capsys, *arguments):
    app(["generate", *map(str, arguments)], standalone_mode=False)
    return capsys.readouterr()


def test_command_makes_samples_of_prompts_from_a_file(folder, generator, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff我们在\r\n\n北京龘\n".encode())
    options = ("--prompt", "好", "--samples", 2, "--max-new-tokens", 6, "--seed", 4, "--min-p", 0.01)
    out, err = printed(capsys, folder, "--prompt-file", file, *options)
    sampling = Sampling(top_k=50, min_p=0.01)
    assert out.splitlines() == generator.texts(["好", "我们在", "北京龘"], 6, sampling, seed=4, samples=2)
    assert err == "warning: not in the vocabulary, the model sees [UNK] for it: 龘\n"


def test_command_streams_one_text_to_a_terminal(folder, generator, capsys, monkeypatch):
    (expected,) = generator.texts(["我们在"], 9, Sampling(top_k=50), seed=0)
    for terminal, choice, streamed in (
        (True, [], True),
        (False, [], False),
        (False, ["--stream"], True),
        (True, ["--no-stream"], False),
    ):
        writes = []
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal, raising=False)
        with monkeypatch.context() as patch:
            patch.setattr(sys.stdout, "write", writes.append)
            app(
                ["generate", str(folder), "--prompt", "我们在", "--max-new-tokens", "9", *choice], standalone_mode=False
            )
        assert "".join(writes) == expected + "\n"
        assert ("我们在" in writes) == streamed


@pytest.mark.parametrize(
    ("arguments", "content", "exit_code", "words"),
    [
        ([], None, ExitCode.USAGE, "--prompt-file"),
        (["--prompt", "x", "--samples", "2", "--stream"], None, ExitCode.USAGE, "--stream is for one text"),
        (["--prompt-file", "FILE"], None, ExitCode.NO_INPUT, "not found"),
        (["--prompt-file", "FILE"], b" \n\n", ExitCode.NO_INPUT, "no prompt in the file"),
        (["--prompt-file", "FILE"], b"a\n\xff\n", ExitCode.DATA, "prompts.txt:2"),
        (["--prompt-file", "FILE"], "\n".join(["好", "我" * 50]).encode(), ExitCode.DATA, "51 tokens"),
    ],
)
def test_command_explains_what_it_cannot_do(folder, tmp_path, arguments, content, exit_code, words):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    arguments = [str(file) if argument == "FILE" else argument for argument in arguments]
    with pytest.raises(UserError, match=words) as told:
        app(["generate", str(folder), *arguments], standalone_mode=False)
    assert told.value.exit_code == exit_code


def test_prompts_may_come_from_standard_input(folder, capsys, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("好\n人".encode())))
    out, _ = printed(capsys, folder, "--prompt-file", "-", "--max-new-tokens", 3)
    assert [line[0] for line in out.splitlines()] == ["好", "人"]


def test_prompts_of_any_length_are_read_alike(source, generator):
    """Programs are padded to a few lengths: what a prompt says does not depend on how much of it is padding."""
    decoder, draw = generator.decoder, np.random.default_rng(0)
    model = model_from_weights(source.model, source.weights)
    ids = draw.integers(5, decoder.cfg.vocab_size, 47).tolist()
    for length in (1, 15, 16, 17, 33, 47):
        (alone,) = decode.generate(decoder, [ids[:length]], -1, 1, Sampling(temperature=0.0))
        beside = decode.generate(decoder, [ids[:length], ids[:40]], -1, 1, Sampling(temperature=0.0))[0]
        expected = model(np.array([ids[:length]], np.int32))[0, -1].argmax()
        assert alone == beside == [expected]
