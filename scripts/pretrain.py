"""UER-py's pretrain.py for GPT-2, with the same flags: write a config, then print and run `gpt2-flax train`.

    python3 pretrain.py --dataset_path cluecorpussmall_lm_seq128_dataset.pt --vocab_path models/google_zh_vocab.txt \
        --config_path models/gpt2/config.json --output_model_path models/cluecorpussmall_gpt2_seq128_model.bin \
        --world_size 8 --gpu_ranks 0 1 2 3 4 5 6 7 --total_steps 1000000 --save_checkpoint_steps 100000 \
        --report_steps 50000 --learning_rate 1e-4 --batch_size 64

The run is the folder models/cluecorpussmall_gpt2_seq128_model; the config is beside it, with .toml for .bin.
--pretrained_model_path and convert_gpt2_from_uer_to_huggingface.py accept UER-py's name of a checkpoint:
models/cluecorpussmall_gpt2_seq128_model.bin-1000000. After a stop, the same command resumes. docs/from_uer.md lists the
differences.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import tomli_w
from preprocess import SEQ_LENGTH
from uer_command_line import Flags, exit_code, named_model, run_before, run_folder, run_instead, shown, user_path

from gpt2_flax.checkpoint.huggingface import CONFIG, from_hf_config
from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.checkpoint.step_meta import DamagedCheckpoint, read_meta
from gpt2_flax.config.parse import parse_config
from gpt2_flax.data.dataset_info import read_info
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.folders import write_whole
from gpt2_flax.formats.uer import LAYER_NORM_EPSILON
from gpt2_flax.formats.uer_config import model_values
from gpt2_flax.input_files import read_object
from gpt2_flax.tokenizers.tokenizer import load_tokenizer

_SCHEDULES = {
    "linear": {},
    "cosine": {"schedule": "cosine"},
    "constant": {"schedule": "constant", "warmup": 0},
    "constant_with_warmup": {"schedule": "constant"},
}
_NOT_LM = "leave it out: it is not for lm"
_OTHER_MODEL = "leave it out: GPT-2 does not have it"
_SHARDED = "leave it out: parameters are sharded over devices as far as memory requires, see mesh.fsdp"
_INSTEAD = {
    "--log_path": "leave it out: numbers are in metrics.jsonl and tensorboard of the run folder",
    "--log_level": "leave it out: numbers are in metrics.jsonl and tensorboard of the run folder",
    "--log_file_level": "leave it out: numbers are in metrics.jsonl and tensorboard of the run folder",
    "--deepspeed": _SHARDED,
    "--deepspeed_config": _SHARDED,
    "--deepspeed_checkpoint_activations": "use model.remat in the config that is written",
    "--local_rank": "leave it out: one process uses all devices of its host",
    "--merges_path": "prepare the dataset with the tokenizer.json: gpt2-flax prepare --tokenizer",
    "--whole_word_masking": _NOT_LM,
    "--span_": _NOT_LM,
    "--tgt_": _NOT_LM,
    "--labels_num": _NOT_LM,
    "--pooling": _NOT_LM,
    "--bidirectional": _OTHER_MODEL,
    "--decoder": _OTHER_MODEL,
    "--factorized_embedding_parameterization": _OTHER_MODEL,
    "--has_lmtarget_bias": _OTHER_MODEL,
    "--has_residual_attention": _OTHER_MODEL,
    "--parameter_sharing": _OTHER_MODEL,
    "--relative_position_embedding": _OTHER_MODEL,
    "--remove_attention_scale": _OTHER_MODEL,
    "--remove_transformer_bias": _OTHER_MODEL,
}
# Flags of old versions for fields of models/gpt2/config.json, checked like those fields.
_MODEL_LISTS = ("embedding", "target")
_MODEL_WORDS = ("encoder", "mask", "layernorm_positioning", "layernorm", "feed_forward", "data_processor")
_MODEL_SWITCHES = ("remove_embedding_layernorm", "tie_weights")


def main() -> None:
    options = _flags().parse(None)
    output = run_folder(options.output_model_path)
    hosts, environment = _hosts(options), _visible_devices(options)
    init_from = named_model(options.pretrained_model_path) if options.pretrained_model_path else None
    epsilon = LAYER_NORM_EPSILON
    if init_from is not None and init_from.is_file():
        init_from = _imported(init_from, output, options, hosts)
    elif init_from is not None:
        epsilon = _epsilon(init_from)
    values = _config(options, output, init_from, epsilon)
    file = output.with_name(output.name + ".toml")
    parse_config(values, str(file))
    origin = f"# Made by pretrain.py from: {shlex.join(sys.argv[1:])}\n"
    write_whole(file, (origin + tomli_w.dumps(values)).encode())
    if options.translate_only:
        print(shown(["train", str(file), *hosts], environment))
        return
    run_instead("train", str(file), *hosts, **environment)


def _flags() -> Flags:
    flags = Flags(__doc__, _INSTEAD)
    dataset = Path("dataset.pt")
    flags.add_argument("--dataset_path", type=user_path, default=dataset, help="folder made by preprocess.py")
    flags.add_argument("--seq_length", type=int, help="tokens in a row; default: as given to preprocess.py")
    flags.add_argument("--vocab_path", type=user_path, help="compared with the vocabulary of the dataset")
    flags.add_argument("--spm_model_path", type=user_path, help="as --vocab_path")
    flags.add_argument("--tokenizer", choices=["bert", "xlmroberta"], help="without effect: the dataset's is used")
    flags.add_argument("--do_lower_case", choices=["true", "false"], default="true")
    flags.add_argument("--config_path", type=user_path, required=True, help="config.json of a UER-py GPT-2")
    flags.add_argument(
        "--pretrained_model_path",
        type=user_path,
        help="a run, a checkpoint NAME.bin-STEP, a UER-py .bin file, a transformers folder",
    )
    flags.add_argument(
        "--output_model_path", type=user_path, required=True, help="the run folder, with or without .bin"
    )
    flags.add_argument("--world_size", type=int, default=1, help="total number of GPUs, which multiplies --batch_size")
    flags.add_argument("--gpu_ranks", type=int, nargs="+", default=[], help="ranks of the GPUs of this host")
    flags.add_argument("--master_ip", default="tcp://localhost:12345", help="address of the first of several hosts")
    flags.add_argument("--backend", help="accepted without effect")
    flags.add_argument("--instances_buffer_size", help="without effect: the whole dataset is shuffled")
    flags.add_argument("--total_steps", type=int, default=100_000)
    flags.add_argument("--save_checkpoint_steps", type=int, default=10_000)
    flags.add_argument("--report_steps", type=int, default=100)
    flags.add_argument("--accumulation_steps", type=int, default=1)
    flags.add_argument("--batch_size", type=int, default=32, help="rows for each GPU")
    flags.add_argument("--learning_rate", type=float, default=2e-5)
    flags.add_argument("--warmup", type=float, default=0.1, help="share of all steps")
    flags.add_argument("--beta1", type=float, default=0.9)
    flags.add_argument("--beta2", type=float, default=0.999)
    flags.add_argument("--optimizer", choices=["adamw"], default="adamw")
    flags.add_argument("--scheduler", choices=list(_SCHEDULES), default="linear")
    flags.add_argument("--dropout", type=float)
    flags.add_argument("--seed", type=int, default=7)
    flags.add_argument("--fp16", action="store_true", help="bfloat16, which needs no loss scaling")
    flags.add_argument("--fp16_opt_level", choices=["O0", "O1", "O2", "O3"], help="without effect")
    flags.add_argument("--deep_init", action="store_true", help="divide residual projections by sqrt(2 layers)")
    for name in _MODEL_LISTS:
        flags.add_argument(f"--{name}", nargs="+")
    for name in _MODEL_WORDS:
        flags.add_argument(f"--{name}")
    flags.add_argument("--max_seq_length", type=int, help="number of positions")
    for name in _MODEL_SWITCHES:
        flags.add_argument(f"--{name}", action="store_true")
    flags.add_argument("--translate_only", action="store_true", help="write the config, print the command, and exit")
    return flags


def _config(options: argparse.Namespace, output: Path, init_from: Path | None, epsilon: float) -> dict[str, Any]:
    total, microbatches = options.total_steps, options.accumulation_steps
    if min(total, microbatches, options.save_checkpoint_steps, options.report_steps, options.batch_size) < 1:
        raise UserError(ExitCode.USAGE, "steps and batch size must be above 0", "pretrain.py", "correct the command")
    # UER-py counts microbatches as steps.
    total, save, report = (
        max(1, n // microbatches) for n in (total, options.save_checkpoint_steps, options.report_steps)
    )
    start = {} if init_from is None else {"init_from": str(init_from)}
    return {
        "output": str(output),
        **start,
        "model": _model(options)
        | {
            "layer_norm_epsilon": epsilon,
            "initializer": "gpt2" if options.deep_init else "uer",
            "dtype": "bfloat16" if options.fp16 else "float32",
        },
        "data": {
            "dataset": str(options.dataset_path),
            "seq_length": _seq_length(options),
            "global_batch_size": options.batch_size * options.world_size * microbatches,
        },
        "optimizer": {
            "preset": "uer",
            "learning_rate": options.learning_rate,
            "warmup": options.warmup,
            "b1": options.beta1,
            "b2": options.beta2,
        }
        | _SCHEDULES[options.scheduler],
        "training": {
            "total_steps": total,
            "accumulation_steps": microbatches,
            "seed": options.seed,
            "log_every": report,
            "save_every": save,
            "keep_checkpoints": max(3, -(-total // save)),  # UER-py keeps all checkpoints
            "evaluate_every": save,
            "evaluation_batches": 200,
        },
    }


def _model(options: argparse.Namespace) -> dict[str, Any]:
    if not options.config_path.is_file():
        raise UserError(
            ExitCode.NO_INPUT, "file not found", options.config_path, "give UER-py's models/gpt2/config.json"
        )
    given = {name: getattr(options, name) for name in (*_MODEL_LISTS, *_MODEL_WORDS, "max_seq_length", "dropout")}
    given |= {name: getattr(options, name) or None for name in _MODEL_SWITCHES}
    values = {"max_seq_length": 512} | read_object(options.config_path)
    values |= {name: value for name, value in given.items() if value is not None}
    for name in ("hidden_size", "layers_num", "heads_num"):
        if name not in values:
            raise UserError(ExitCode.DATA, f"no {name}", options.config_path, "give UER-py's models/gpt2/config.json")
    return {"tie_word_embeddings": False} | model_values(values, options.config_path)  # UER-py's default


def _seq_length(options: argparse.Namespace) -> int:
    folder = options.dataset_path
    vocabulary = options.spm_model_path or options.vocab_path
    info = read_info(folder)
    lowercase = False if options.do_lower_case == "false" else None
    if vocabulary and load_tokenizer(vocabulary, lowercase=lowercase).fingerprint != info.tokenizer_fingerprint:
        fix = "give the vocabulary that preprocess.py got, or leave it out"
        raise UserError(ExitCode.DATA, f"dataset {folder} was made with another vocabulary", vocabulary, fix)
    if options.seq_length is not None:
        return options.seq_length
    if not (folder / SEQ_LENGTH).is_file():
        fix = "add --seq_length, as the dataset was not made by preprocess.py"
        raise UserError(ExitCode.USAGE, "length of rows not known", folder, fix)
    return read_object(folder / SEQ_LENGTH)["seq_length"]


def _imported(file: Path, output: Path, options: argparse.Namespace, hosts: list[str]) -> Path:
    """Import a file of UER-py into a folder beside the run, and return the folder."""
    folder = output.with_name(output.name + "_pretrained")
    vocabulary = str(options.vocab_path or options.dataset_path / "tokenizer")
    command = ["import", str(file), str(folder), "--tokenizer", vocabulary, "--uer-config", str(options.config_path)]
    if hosts:
        fix = f"import it once before, and name the folder: {shown(command)}"
        raise UserError(ExitCode.USAGE, "several hosts cannot import one file", file, fix)
    run_before(*command, "--overwrite")
    return folder


def _epsilon(init_from: Path) -> float:
    """Return the layer norm epsilon of a run, a checkpoint, or a `transformers` folder."""
    if (init_from / CONFIG).is_file():
        return from_hf_config(read_object(init_from / CONFIG), init_from / CONFIG).layer_norm_epsilon
    run = RunFolder(init_from.parent.parent if init_from.parent.name == "checkpoints" else init_from)
    if (config := run.read_config()) is not None:
        return config.model.layer_norm_epsilon
    imported = run.checkpoints / "0"
    if not imported.is_dir():
        fix = "give a run, its NAME.bin-STEP, a .bin file of UER-py, or a transformers folder"
        raise UserError(ExitCode.NO_INPUT, "no model found", init_from, fix)
    try:
        return read_meta(imported, 0)["model"]["layer_norm_epsilon"]
    except DamagedCheckpoint as error:
        raise UserError(ExitCode.IO, f"checkpoint is damaged ({error})", imported, "import the model again") from None


def _hosts(options: argparse.Namespace) -> list[str]:
    """Return the options of `gpt2-flax train` for several hosts with the same number of GPUs; none for one host."""
    here, total = len(options.gpu_ranks), options.world_size
    ranks_fit = total == 1 or set(options.gpu_ranks) <= set(range(total))
    if here > total or not ranks_fit or total < 1:
        fix = "give each GPU of this host a rank from 0 to below --world_size"
        raise UserError(ExitCode.USAGE, "--world_size and --gpu_ranks do not fit", "pretrain.py", fix)
    if total == 1 or here in (0, total):
        return []
    if total % here:
        fix = "use hosts with equally many GPUs, or start gpt2-flax train on each host yourself"
        raise UserError(ExitCode.USAGE, f"{total} GPUs are not a multiple of the {here} here", "pretrain.py", fix)
    address = options.master_ip.removeprefix("tcp://")
    number = min(options.gpu_ranks) // here
    return ["--coordinator", address, "--num-processes", str(total // here), "--process-id", str(number)]


def _visible_devices(options: argparse.Namespace) -> dict[str, str]:
    """Return the variable for the GPUs that UER-py would use: the given rank, or as many GPUs as ranks."""
    ranks = options.gpu_ranks
    if not ranks or "CUDA_VISIBLE_DEVICES" in os.environ:
        return {}
    visible = ranks if options.world_size == 1 else range(len(ranks))
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, visible))}


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
