"""UER-py's preprocess.py for GPT-2, with the same flags: print and run a `gpt2-flax prepare` command.

    python3 preprocess.py --corpus_path corpora/cluecorpussmall.txt --vocab_path models/google_zh_vocab.txt \
        --dataset_path cluecorpussmall_lm_seq128_dataset.pt --seq_length 128 --processes_num 32 --data_processor lm

The dataset is the folder --dataset_path. It serves every sequence length; a file in it holds --seq_length for
pretrain.py. docs/from_uer.md lists the differences.
"""

import json
from pathlib import Path

from uer_command_line import Flags, exit_code, run_before, user_path

from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.folders import write_whole

SEQ_LENGTH = "uer_seq_length.json"  # in the dataset: the sequence length for pretrain.py

_NOT_LM = "leave it out: it is not for lm"
_INSTEAD = {
    "--merges_path": "give gpt2-flax prepare a tokenizer.json with --tokenizer",
    "--tgt_": _NOT_LM,
    "--dynamic_masking": _NOT_LM,
    "--whole_word_masking": _NOT_LM,
    "--span_": _NOT_LM,
    "--full_sentences": _NOT_LM,
    "--sentence_selection_strategy": _NOT_LM,
}


def main() -> None:
    flags = Flags(__doc__, _INSTEAD)
    flags.add_argument("--corpus_path", required=True, help="a text file, one document a line")
    flags.add_argument("--vocab_path", help="vocab.txt of BERT")
    flags.add_argument("--spm_model_path", help="SentencePiece model, instead of --vocab_path")
    flags.add_argument("--tokenizer", choices=["bert", "xlmroberta"], default="bert")
    flags.add_argument("--do_lower_case", choices=["true", "false"], default="true")
    flags.add_argument("--dataset_path", type=user_path, default=Path("dataset.pt"), help="the new folder")
    flags.add_argument("--seq_length", type=int, default=128)
    flags.add_argument("--processes_num", type=int, default=1)
    flags.add_argument("--data_processor", "--target", choices=["lm"], required=True)
    flags.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    for name in ("docs_buffer_size", "instances_buffer_size", "dup_factor", "short_seq_prob", "seed"):
        flags.add_argument(f"--{name}", help="accepted without effect; UER-py ignores it for lm too")
    options = flags.parse(None)
    tokenizer = options.spm_model_path or options.vocab_path
    if tokenizer is None or (options.spm_model_path and options.vocab_path):
        raise UserError(
            ExitCode.USAGE, "no tokenizer, or two", "preprocess.py", "give --vocab_path or --spm_model_path"
        )
    if min(options.seq_length, options.processes_num) < 1:
        what = "--seq_length and --processes_num must be above 0"
        raise UserError(ExitCode.USAGE, what, "preprocess.py", "correct the command")
    prepare = ["prepare", options.corpus_path, "--tokenizer", tokenizer, "--output", str(options.dataset_path)]
    prepare += ["--format", "text", "--workers", str(options.processes_num)]
    prepare += ["--cased"] if options.do_lower_case == "false" else []
    prepare += ["--overwrite"] if options.overwrite else []
    run_before(*prepare)
    note = {"seq_length": options.seq_length}
    write_whole(options.dataset_path / SEQ_LENGTH, (json.dumps(note) + "\n").encode())
    print(f"{options.dataset_path}: serves every length; pretrain.py will train on rows of {options.seq_length} tokens")


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
