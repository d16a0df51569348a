#!/usr/bin/env bash
# Lint and tests in an environment of their own (.test-environment). Arguments go to pytest:
#   bash scripts/run_tests.sh tests/model/test_model.py -k cache     (two processes; -n 0: none but one)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

extras=dev,export,gguf,push,quickstart,corpora,ray,serve
# To compile for TPUs and GPUs without one; the only builds are for this platform.
[ "$(uname -sm)" != "Linux x86_64" ] || extras+=,tpu,cuda-compiler
make_environment .test-environment "$extras"
ruff check .
ruff format --check .
python -m pytest -n 2 --dist loadfile "$@"
