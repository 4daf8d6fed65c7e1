#!/usr/bin/env bash
# bash tools/venv.sh REQUIREMENTS: makes .venv and installs a requirements file into it. Does nothing if that is done.
set -euo pipefail
cd "$(dirname "$0")/.."

python=""
for p in python3 python3.13 python3.12 python3.11 python3.10 python; do
  if command -v "$p" >/dev/null && "$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    python=$p
    break
  fi
done
if [[ -z $python ]]; then
  echo "error: no Python 3.10 or newer with venv on the PATH; install one (Debian: apt install python3 python3-venv)" >&2
  exit 2
fi

want=$({ cat requirements*.txt constraints.txt; "$python" --version; } | cksum)
stamp=.venv/installed-$1
[[ -f $stamp && $(<"$stamp") == "$want" ]] && exit 0
echo "== environment: $1 into .venv, with $("$python" --version)"
[[ -x .venv/bin/python ]] || "$python" -m venv --clear .venv
# Without an NVIDIA GPU, take the CPU build of torch if its index can be reached: it is gigabytes smaller.
index=()
if [[ $(uname -s) == Linux ]] && ! command -v nvidia-smi >/dev/null &&
  "$python" -c 'import urllib.request as u; u.urlopen("https://download.pytorch.org/whl/cpu/", timeout=5)' 2>/dev/null; then
  index=(--extra-index-url https://download.pytorch.org/whl/cpu)
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check ${index[@]+"${index[@]}"} -r "$1" -c constraints.txt
echo "$want" >"$stamp"
