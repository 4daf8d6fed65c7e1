#!/usr/bin/env bash
# bash tools/gpu.sh [flags of tools.gpu]: checks and measures the engine on this machine's GPU, in at most 9 minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[[ -x $python ]] || python=python3
exec "$python" -m tools.gpu "$@"
