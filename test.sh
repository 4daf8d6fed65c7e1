#!/usr/bin/env bash
# bash test.sh [pytest arguments]: sets up .venv with requirements-dev.txt, lints and runs the tests.
# REAL_CKPT=DIR and DATA_DIR=DIR add the checks that need a real checkpoint and the real benchmarks; TEST_GPU=1 -k gpu is for a GPU.
set -euo pipefail
cd "$(dirname "$0")"
bash tools/venv.sh requirements-dev.txt
.venv/bin/ruff check -q .
.venv/bin/ruff format -q --check .
exec .venv/bin/python -m pytest -q tests "$@"
