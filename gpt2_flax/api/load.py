"""From anything that holds a model to a model in memory."""

import dataclasses
from pathlib import Path

from gpt2_flax.api.arguments import LocalPath, ModelPlace, Positive, Step, checked
from gpt2_flax.api.model import Model
from gpt2_flax.api.set_up import set_up_jax
from gpt2_flax.folders import HubModel


@checked
def load(
    model: ModelPlace,
    *,
    step: Step | None = None,
    best: bool = False,
    average: Positive = 1,
    revision: str | None = None,
    tokenizer: LocalPath | None = None,
    uer_config: LocalPath | None = None,
    bos: str | None = None,
    eos: str | None = None,
) -> Model:
    """Load a model and its tokenizer into memory.

    Args:
        model: A run folder, RUN/checkpoints/STEP, a `transformers` folder, a `.bin` of UER-py, a `ckpt.pt` of
            nanoGPT, or a model on the Hugging Face hub: `OWNER/NAME`, or `hf://OWNER/NAME@REVISION`.
        step: The checkpoint of a run; None for the newest.
        best: Take the checkpoint of a run with the lowest validation loss.
        average: Average the weights of this many checkpoints of a run: the one to take and those before it.
        revision: The branch, tag or commit of a model on the hub; None for `main`.
        tokenizer: A tokenizer in place of the one beside the model. A file of UER-py or nanoGPT needs one.
        uer_config: The `config.json` of a UER-py model, with its number of heads.
        bos, eos: The tokens that begin and end a document; None for what the tokenizer's files say.

    Raises:
        UserError: NO_INPUT if there is no model; DATA or IO if it is damaged, IO if the hub cannot be reached; USAGE
            for arguments that do not suit it.
    """
    from gpt2_flax.checkpoint.run_folder import check_model
    from gpt2_flax.tokenizers.special_tokens import Ends

    place = model if isinstance(model, HubModel) else Path(model)
    check_model(place)  # before the import of JAX, which takes a second
    set_up_jax()
    from gpt2_flax.checkpoint.source import load_source

    own, uer = (None if given is None else Path(given) for given in (tokenizer, uer_config))
    source = load_source(place, step, own, uer, Ends(bos, eos), best, revision, average)
    return Model(dataclasses.replace(source, tokenizer_folder=source.tokenizer_folder.absolute()))  # it is read later
