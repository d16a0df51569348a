#!/usr/bin/env bash
# Run lint and tests in an environment of their own (.test-environment).
#   bash scripts/run_tests.sh                                everything
#   bash scripts/run_tests.sh --fast                         without the tests that are slow or start processes
#   bash scripts/run_tests.sh tests/model/test_model.py -k cache    other arguments go to pytest
# pytest uses three processes, because some tests wait; with -n 0 it uses its own process alone.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

chosen=()
if [ "${1:-}" = --fast ]; then
    chosen=(-m "not slow and not multiprocess")
    shift
fi
extras=dev,docs,export,gguf,hub,quickstart,corpora,ray,report,serve,wandb,mlflow
# The compilers for TPUs and GPUs exist for this platform only; they need no TPU and no GPU.
[ "$(uname -sm)" != "Linux x86_64" ] || extras+=,tpu,cuda-compiler
make_environment .test-environment "$extras"
ruff check .
ruff format --check .
shellcheck --external-sources .ci/run scripts/*.sh scripts/train.slurm
hadolint scripts/Dockerfile
# Types are checked beside the tests: basedpyright needs only one core.
log=$(mktemp)
basedpyright >"$log" 2>&1 &
types=$! code=0
trap 'kill "$types" 2>/dev/null || true; rm -f "$log"' EXIT
# The order of the files is chosen by tests/conftest.py.
python -m pytest -n 3 --dist loadfile --no-loadscope-reorder ${chosen[@]+"${chosen[@]}"} "$@" || code=$?
wait "$types" || code=$?
cat "$log"
exit "$code"
