"""Convert GPT-2 models of UER-py to files for transformers, with the flags of UER-py's script and an exact result.

    python3 scripts/convert_gpt2_from_uer_to_huggingface.py --input_model_path models/gpt2.bin-250000 \
        --output_model_path pytorch_model.bin --layers_num 12

writes a state dict for `GPT2LMHeadModel.load_state_dict`. UER-py's script of the same name only renames tensors. This
script also converts UER-py's layer norm: gains times sqrt((n - 1) / n), and layer_norm_epsilon 1e-7 in config.json,
which it writes beside the output if there is none. It compares the logits before it writes anything. `gpt2-flax
convert` writes a complete folder instead, with tokenizer, safetensors and model card.

The input may also be a run of this project: its folder, a checkpoint, or UER-py's name of a checkpoint.
"""

import io
import json
from pathlib import Path

from uer_command_line import Flags, exit_code, named_model, user_path

from gpt2_flax.checkpoint.huggingface import CONFIG, to_hf_config, to_state_dict
from gpt2_flax.checkpoint.source import Source, load_source
from gpt2_flax.errors import ExitCode, UserError, io_error, missing_package
from gpt2_flax.folders import write_whole
from gpt2_flax.formats.uer import compare, read_uer
from gpt2_flax.input_files import read_object
from gpt2_flax.tokenizers.tokenizer import load_tokenizer

PUBLISHED_VOCABULARY = 21128  # google_zh_vocab.txt
PUBLISHED_IDS = (101, 102, 0)  # its [CLS], [SEP] and [PAD]


def main() -> None:
    flags = Flags(__doc__, {})
    flags.add_argument("--input_model_path", type=user_path, default=Path("models/input_model.bin"))
    flags.add_argument("--output_model_path", type=user_path, default=Path("models/output_model.bin"))
    flags.add_argument("--layers_num", type=int, help="compared with the number of layers in the file")
    flags.add_argument("--uer_config", type=user_path, help="its UER-py config.json, with the number of heads")
    flags.add_argument("--vocab_path", type=user_path, help="vocab.txt, for the token ids in config.json")
    options = flags.parse(None)
    convert(
        named_model(options.input_model_path),
        options.output_model_path,
        options.layers_num,
        options.uer_config,
        options.vocab_path,
    )


def convert(path: Path, output: Path, layers: int | None, uer_config: Path | None, vocabulary: Path | None) -> None:
    """Write `output` whole or not at all, and config.json beside it unless there is one."""
    try:
        import torch
    except ImportError:
        raise missing_package("the conversion", "torch", "export", output) from None
    if path.is_file():
        source = Source(f"UER-py file {path}", *read_uer(path, uer_config), Path())
        print(f"{path}: {compare(path, source.weights, source.model)}")
    else:
        source = load_source(path)
        vocabulary = vocabulary or source.tokenizer_folder
    if layers not in (None, source.model.n_layer):
        what = f"--layers_num is {layers} but there are {source.model.n_layer} layers"
        raise UserError(ExitCode.USAGE, what, path, "leave --layers_num out, or give another file")
    tensors = {name: torch.from_numpy(array.copy()) for name, array in to_state_dict(source.weights).items()}
    # load_state_dict needs a head; a tied head is stored once.
    tensors.setdefault("lm_head.weight", tensors["transformer.wte.weight"])
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    try:
        write_whole(output, buffer.getbuffer())
        print(f"{output}: {len(tensors)} tensors for GPT2LMHeadModel.load_state_dict")
        _write_config(output.parent / CONFIG, source, vocabulary)
    except OSError as error:
        raise io_error(error, output) from error


def _write_config(path: Path, source: Source, vocabulary: Path | None) -> None:
    epsilon = source.model.layer_norm_epsilon
    if path.exists():
        found = read_object(path).get("layer_norm_epsilon", 1e-5)
        advice = "as it must be" if found == epsilon else f"but {epsilon:g} belongs to these weights: change it there"
        print(f"{path}: kept, with layer_norm_epsilon {found}, {advice}")
        return
    if vocabulary is None and source.model.vocab_size == PUBLISHED_VOCABULARY:
        ids = PUBLISHED_IDS
    elif vocabulary is None:
        ids = (None, None, None)
        print(f"{path}: without ids of [CLS], [SEP] and [PAD]; --vocab_path vocab.txt tells them")
    else:
        tokenizer = load_tokenizer(vocabulary)
        ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    write_whole(path, (json.dumps(to_hf_config(source.model, *ids), indent=2) + "\n").encode())
    print(f"{path}: written, with layer_norm_epsilon {epsilon:g}, which belongs to these weights")


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
