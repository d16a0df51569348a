#!/usr/bin/env bash
# Build the sdist, the wheel from the sdist, and use the wheel as a user would: install it into an environment that
# holds nothing else, and train a tiny model outside the checkout. Takes about a minute; leaves nothing behind.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

root=$PWD
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH PYTHONHOME
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=2 PIP_NO_COMPILE=1
python=$(find_python)

echo "building the sdist and the wheel"
"$python" -m venv "$folder/build"
"$folder/build/bin/pip" install build
"$folder/build/bin/python" -m build --outdir "$folder/dist" . >"$folder/build.log" 2>&1 || {
    cat "$folder/build.log" >&2
    exit 1
}
missing=$(comm -23 \
    <(find configs docs scripts tests -type f ! -name '*.pyc' | LC_ALL=C sort) \
    <(tar -tzf "$folder"/dist/*.tar.gz | cut -d/ -f2- | LC_ALL=C sort))
[ -z "$missing" ] || { echo "error: the sdist lacks files, add them to MANIFEST.in: $missing" >&2; exit 1; }

echo "installing the wheel into an environment of its own, by the steps of scripts/Dockerfile"
"$python" -m venv "$folder/bare"
export PATH="$folder/bare/bin:$PATH" JAX_PLATFORMS=cpu XDG_CACHE_HOME="$folder/cache"
steps=$(sed -n 's/^RUN //p' scripts/Dockerfile)
steps=${steps//\/wheels\//$folder/dist/} steps=${steps//\/cache/$XDG_CACHE_HOME}
EXTRAS='' PIP_CONSTRAINT=scripts/constraints.txt sh -euxc "$steps"
pip check

cd "$folder"
gpt2-flax --help >/dev/null
for config in "$root"/configs/*.toml; do
    gpt2-flax init "$(basename "$config" .toml)" | cmp - "$config"
done
python - "$root" <<'PROGRAM'
import random
import sys
from pathlib import Path

import gpt2_flax

assert not Path(gpt2_flax.__file__).is_relative_to(sys.argv[1]), "the checkout was imported, not the wheel"
lines = ("".join(random.choices("天地玄黄宇宙洪荒日月盈昃", k=30)) for _ in range(200))
Path("corpus.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
PROGRAM
cat >tiny.toml <<'CONFIG'
output = "run"
model = { n_positions = 32, n_layer = 1, n_head = 2, n_embd = 16 }
data = { dataset = "dataset", seq_length = 32, global_batch_size = 4 }
training = { total_steps = 3, log_every = 1, evaluate_every = 3, save_every = 3 }
CONFIG
gpt2-flax tokenizer corpus.txt --vocab-size 50 --output tokenizer
gpt2-flax prepare corpus.txt --tokenizer tokenizer --output dataset --validation-fraction 0.1 --workers 1
gpt2-flax train tiny.toml
gpt2-flax plan quickstart data.dataset=dataset >/dev/null
gpt2-flax generate run --prompt 天地 --max-new-tokens 3
echo "the wheel works"
