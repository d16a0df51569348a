#!/usr/bin/env bash
# Lint and tests in an environment of their own (.test-environment). Arguments go to pytest:
#   bash scripts/run_tests.sh tests/test_model.py -k cache
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

make_environment .test-environment dev,export,quickstart,corpora,ray
ruff check .
ruff format --check .
python -m pytest "$@"
