#!/usr/bin/env bash
# bash test.sh [pytest arguments, such as tests/core -x]: sets up .venv with requirements-dev.txt, lints, runs the tests.
# REAL_CKPT=DIR and DATA_DIR=DIR add tests on a real checkpoint and on the real benchmarks. TEST_GPU=1 bash test.sh -k gpu
# adds the tests that need a GPU.
set -euo pipefail
cd "$(dirname "$0")"
bash tools/venv.sh requirements-dev.txt
.venv/bin/ruff check -q .
.venv/bin/ruff format -q --check .
processes=(-n logical --maxprocesses 4 --dist worksteal) # one for each core, at most four; -n 0: this one alone
if [[ -n ${TEST_GPU:-}${REAL_CKPT:-} ]]; then
  processes=(-n 0) # the tests need the memory and all cores
else
  export OMP_NUM_THREADS=1
fi
exec .venv/bin/python -m pytest -q "${processes[@]}" "$@" # all of tests/ unless a path is given
