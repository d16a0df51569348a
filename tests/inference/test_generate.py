"""Generation chooses what `transformers` would choose, and evaluation adds up what the model says of each token."""

import itertools
import math

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.rows import rows

from gpt2_flax.checkpoint.weights import weights_of
from gpt2_flax.config.model import ModelConfig
from gpt2_flax.data.dataset import TokenDataset
from gpt2_flax.data.shard_job import in_validation
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.export.transformers_folder import export_folder
from gpt2_flax.inference.decode import generate, generate_one
from gpt2_flax.inference.evaluation import Evaluation, evaluate
from gpt2_flax.inference.sampling import Sampling
from gpt2_flax.model.decoding import decoder_of
from gpt2_flax.model.gpt2 import GPT2
from gpt2_flax.parallel.mesh import MeshSizes, make_mesh
from gpt2_flax.tokenizers.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

GREEDY = Sampling(temperature=0.0)
NO_END = -1  # an id that never comes: every continuation gets its full length


@pytest.fixture(scope="module")
def model(tokenizer_folder):
    """Weights large enough that the likeliest token changes from step to step."""
    vocab_size = load_tokenizer(tokenizer_folder).vocab_size
    dropouts = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    sizes = {"vocab_size": vocab_size, "n_positions": 32, "n_layer": 2, "n_head": 2, "n_embd": 32}
    config = ModelConfig(**sizes, **dropouts, initializer_range=0.6, dtype="float32")
    return jax.jit(lambda: GPT2(config, rngs=nnx.Rngs(1)))()


@pytest.fixture(scope="module")
def decoder(model):
    return decoder_of(model)


@pytest.fixture(scope="module")
def prompts(model):
    draw = np.random.default_rng(0)
    return [draw.integers(5, model.cfg.vocab_size, length).tolist() for length in (1, 4, 9, 5)]


@pytest.fixture(scope="module")
def theirs(model, tokenizer_folder, tmp_path_factory):
    """The same model in transformers."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("export") / "model"
    export_folder(weights_of(model), model.cfg, load_tokenizer(tokenizer_folder), folder, card="", verify=False)
    return transformers.GPT2LMHeadModel.from_pretrained(folder)


def their_greedy(theirs, prompt, n_new, **options):
    import torch

    ids = torch.tensor([prompt])
    options |= {"do_sample": False, "max_new_tokens": n_new, "max_length": None, "eos_token_id": None}
    return theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_text_is_that_of_transformers_token_for_token(decoder, theirs, prompts, penalty):
    ours = generate(decoder, prompts, NO_END, 20, Sampling(temperature=0.0, repetition_penalty=penalty))
    assert ours == [their_greedy(theirs, prompt, 20, repetition_penalty=penalty) for prompt in prompts]
    assert min(len(set(row)) for row in ours) > 3  # else the comparison would say little


def test_fifty_prompts_go_on_as_in_transformers_together_and_alone(model, decoder, theirs):
    draw = np.random.default_rng(1)
    prompts = [draw.integers(5, model.cfg.vocab_size, 1 + number % 20).tolist() for number in range(50)]
    expected = [their_greedy(theirs, prompt, 12) for prompt in prompts]
    assert generate(decoder, prompts, NO_END, 12, GREEDY) == expected
    alone = [generate(decoder, [prompt], NO_END, 12, GREEDY)[0] for prompt in prompts]
    assert alone == expected
    assert [list(generate_one(decoder, prompt, NO_END, 12, GREEDY, 0)) for prompt in prompts[::10]] == expected[::10]
    assert len({tuple(row) for row in expected}) > 40


def test_rows_of_a_batch_do_not_know_of_each_other(decoder, prompts):
    together = generate(decoder, prompts, NO_END, 20, GREEDY)
    assert generate(decoder, prompts[::-1], NO_END, 20, GREEDY) == together[::-1]
    assert generate(decoder, prompts[3:], NO_END, 20, GREEDY) == together[3:]


@pytest.mark.parametrize("sampling", [Sampling(top_k=1), Sampling(top_p=0.0), Sampling(temperature=1e-45)])
def test_the_narrowest_sampling_is_greedy(decoder, prompts, sampling):
    assert generate(decoder, prompts, NO_END, 20, sampling, seed=5) == generate(decoder, prompts, NO_END, 20, GREEDY)


def test_same_seed_same_text_and_other_seed_other_text(decoder, prompts):
    first, again, other = (
        generate(decoder, prompts, NO_END, 20, Sampling(), seed) for seed in (2**32 - 1, 2**32 - 1, 0)
    )
    assert first == again
    assert all(mine != theirs for mine, theirs in zip(first, other, strict=True))
    assert len({tuple(row) for row in generate(decoder, [prompts[1]] * 3, NO_END, 20)}) == 3  # equal prompts may differ


def test_text_ends_at_eos_and_leaves_it_out(decoder, prompts):
    whole = generate(decoder, prompts, NO_END, 20, GREEDY)
    eos_id = whole[1][4]
    cut = [row[: row.index(eos_id)] if eos_id in row else row for row in whole]
    assert generate(decoder, prompts, eos_id, 20, GREEDY) == cut
    assert len({len(row) for row in cut}) > 1


def test_text_ends_with_the_last_position_and_a_longer_prompt_is_refused(model, decoder):
    n_positions = model.cfg.n_positions
    rows = generate(decoder, [[7] * (n_positions - 3), [8]], NO_END, 20, GREEDY)
    assert [len(row) for row in rows] == [3, 20]  # the shorter prompt continues
    with pytest.raises(UserError, match=f"prompt of {n_positions} tokens leaves no room") as refused:
        generate(decoder, [[7] * n_positions], NO_END, 1)
    assert refused.value.exit_code == ExitCode.DATA


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshSizes())


@pytest.fixture(scope="module")
def validation(dataset_folder):
    return TokenDataset(dataset_folder).validation


def evaluated(model, split, mesh, seq_length, n_rows, n_batches=0) -> Evaluation:
    with jax.set_mesh(mesh):
        placed = jax.device_put(model, NamedSharding(mesh, P()))
        return evaluate(placed, rows(split, seq_length), mesh, n_rows, n_batches)


@pytest.mark.parametrize(("seq_length", "n_rows"), [(16, 8), (32, 16)])
def test_evaluation_is_the_sum_over_the_parts_of_documents_that_windows_hold(
    model, validation, mesh, corpus, seq_length, n_rows
):
    found = evaluated(model, validation, mesh, seq_length, n_rows)
    parts = list(parts_of_documents(validation, seq_length))
    # A part that starts inside a document predicts its second token first: windows share one token with the next.
    logits = [reference_logits(weights_of(model), model.cfg, part[:-1]) for part in parts]
    targets = np.concatenate([part[1:] for part in parts])
    logits = np.concatenate(logits)
    nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[:, None], 1)[:, 0]

    assert found.tokens == len(targets) == validation.n_tokens - validation.n_documents
    assert found.loss == pytest.approx(nats.mean(), rel=1e-5)
    assert found.accuracy == pytest.approx((logits.argmax(-1) == targets).mean(), abs=1e-12)
    assert found.perplexity == pytest.approx(np.exp(nats.mean()), rel=1e-4)
    documents = corpus.read_text(encoding="utf-8").splitlines()
    characters = sum(len(text) for text in documents if in_validation([text], 0.1)[0])
    assert found.bits_per_character == pytest.approx(nats.sum() / math.log(2) / characters, rel=1e-5)


def test_evaluation_of_some_batches_reads_the_first_windows(model, validation, mesh):
    some = evaluated(model, validation, mesh, 16, 8, n_batches=2)
    parts = list(parts_of_documents(validation, 16, last_window=16))
    assert some.tokens == sum(len(part) - 1 for part in parts)
    nats = [
        -np.log(softmax(reference_logits(weights_of(model), model.cfg, part[:-1])))[range(len(part) - 1), part[1:]]
        for part in parts
    ]
    assert some.loss == pytest.approx(np.concatenate(nats).mean(), rel=1e-5)


def parts_of_documents(split, seq_length, last_window=None):
    """Yield the ids of each document's segment in each window of `seq_length + 1` tokens, if it has two or more."""
    starts = set(split.document_starts(np.array([0]), split.n_tokens)[1].tolist())
    first_tokens = list(range(0, split.n_tokens - 1, seq_length))[:last_window]
    for first in first_tokens:
        stop = min(first + seq_length + 1, split.n_tokens)
        cuts = [first, *(position for position in range(first + 1, stop) if position in starts), stop]
        for start, end in itertools.pairwise(cuts):
            if end - start > 1:
                yield split.read(start, end)


def reference_logits(weights, config, ids) -> np.ndarray:
    """Return logits_TV of one text in float64, straight from the description of GPT-2."""
    w = {path: array.astype(np.float64) for path, array in weights.items()}

    def norm(x_TD, scale, bias):
        centred_TD = x_TD - x_TD.mean(-1, keepdims=True)
        return centred_TD / np.sqrt((centred_TD**2).mean(-1, keepdims=True) + config.layer_norm_epsilon) * scale + bias

    x_TD = w["wte/embedding"][ids] + w["wpe/embedding"][: len(ids)]
    future_TT = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for block in ({path[2:]: array[layer] for path, array in w.items() if path[:2] == "h/"} for layer in range(2)):
        h_TD = norm(x_TD, block["ln_1/scale"], block["ln_1/bias"])
        qkv = np.einsum("td,dchk->chtk", h_TD, block["attn/c_attn/kernel"]) + block["attn/c_attn/bias"][:, :, None]
        scores_HTT = np.einsum("htk,hsk->hts", qkv[0], qkv[1]) / math.sqrt(config.head_size) + future_TT
        mixed_THK = np.einsum("hts,hsk->thk", softmax(scores_HTT), qkv[2])
        x_TD = x_TD + np.einsum("thk,hkd->td", mixed_THK, block["attn/c_proj/kernel"]) + block["attn/c_proj/bias"]
        h_TD = norm(x_TD, block["ln_2/scale"], block["ln_2/bias"])
        u_TF = h_TD @ block["mlp/c_fc/kernel"] + block["mlp/c_fc/bias"]
        gelu_TF = 0.5 * u_TF * (1 + np.tanh(math.sqrt(2 / math.pi) * (u_TF + 0.044715 * u_TF**3)))
        x_TD = x_TD + gelu_TF @ block["mlp/c_proj/kernel"] + block["mlp/c_proj/bias"]
    return norm(x_TD, w["ln_f/scale"], w["ln_f/bias"]) @ w["wte/embedding"].T


def softmax(x):
    exponentials = np.exp(x - x.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)
