#!/usr/bin/env bash
# Runs the paper's whole recipe: alignment data -> SFT, KTO, SFT then KTO -> weight fusion -> evaluation.
#
#   bash run.sh                              # the demo: a tiny model and its teacher, minutes on 2 CPU cores
#   bash run.sh --ckpt Qwen/Qwen2-0.5B-Instruct --teacher http://HOST:8000/v1 --teacher-model Qwen2.5-7B-Instruct \
#               --sources 'data/*.jsonl'     # the same recipe on a real model
#
# After a failure or Ctrl-C, run the same command again: finished steps are not repeated.
#
# Flags. In brackets: the demo's defaults. A real run takes the scripts' defaults, the paper's where it gives any.
# For a few hundred examples a larger rate of SFT works better: docs/REPORT.md, section 7. For verifiable data with short
# responses, such as GSM8K, --writers small teacher works better: section 8.
#   run            --ckpt C [demo/base]  --out DIR [runs/demo; runs/NAME-OF-CKPT]
#   data           --sources F...  --teacher URL|C  --teacher-model NAME  --small C (default: --ckpt)  --target N [2400]
#                  --trust-references F...  --decontaminate F...  --writers W...  --concurrency N
#                  --data-max-new-tokens N [48]
#   training       --sft-lr X [5e-4]  --kto-lr X [1e-4]  --epochs N [2]  --kto-epochs N [1]  --batch-size N [32]
#                  --kto-batch-size N [32]  --max-len N [512]  --warmup N [10]  --beta X [0.1]  --seed N
#                  --dtype fp32|bf16
#   evaluation     --tasks T... [demo]  --data-dir D [.]  --limit N  --max-new-tokens N [48]  --allow-code-execution
set -euo pipefail
started=$SECONDS
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

absolute() { # makes an existing path absolute; hub ids and URLs stay as they are
  if [[ $1 != /* && -e $1 && $PWD != "$here" ]]; then echo "$PWD/$1"; else echo "$1"; fi
}
fail() { echo "error: $*" >&2; exit 2; }
say() { printf '\n== %s\n' "$*"; }

# ---- arguments: one array of flags per script

ckpt="" teacher="" run="" small="" sources=() data=() train=() sft=() kto=() score=() tasks=()
while (($#)); do
  flag=$1; shift
  case $flag in
    -h | --help) awk 'NR > 1 && !/^#/ {exit} NR > 1 {sub(/^# ?/, ""); print}' "$here/run.sh"; exit 0 ;;
    --allow-code-execution) score+=("$flag"); continue ;;
  esac
  values=()
  while (($#)) && [[ $1 != --* ]]; do values+=("$1"); shift; done
  ((${#values[@]})) || fail "$flag: needs a value, or is no flag of run.sh; bash run.sh --help lists them"
  case $flag in
    --sources) # may hold globs, so not every value is an existing path
      for value in "${values[@]}"; do
        [[ $value == /* || $PWD == "$here" ]] || value=$PWD/$value
        sources+=("$value")
      done
      continue ;;
    --tasks) tasks+=("${values[@]}"); continue ;;
    --writers) data+=("$flag" "${values[@]}"); continue ;;
    --decontaminate | --trust-references)
      data+=("$flag")
      for value in "${values[@]}"; do data+=("$(absolute "$value")"); done
      continue ;;
  esac
  ((${#values[@]} == 1)) || fail "$flag: takes one value, was given ${values[*]}"
  value=${values[0]}
  case $flag in
    --ckpt) ckpt=$(absolute "$value") ;;
    --out) run=$value; [[ $run == /* || $PWD == "$here" ]] || run=$PWD/$run ;;
    --small) small=$(absolute "$value") ;;
    --teacher) teacher=$(absolute "$value") ;;
    --teacher-model | --target | --concurrency) data+=("$flag" "$value") ;;
    --data-max-new-tokens) data+=(--max-new-tokens "$value") ;;
    --sft-lr) sft+=(--lr "$value") ;;
    --kto-lr) kto+=(--lr "$value") ;;
    --epochs) sft+=("$flag" "$value") ;;
    --kto-epochs) kto+=(--epochs "$value") ;;
    --batch-size) sft+=("$flag" "$value") ;;
    --kto-batch-size) kto+=(--batch-size "$value") ;;
    --beta) kto+=("$flag" "$value") ;;
    --max-len | --warmup) train+=("$flag" "$value") ;;
    --seed) train+=("$flag" "$value"); data+=("$flag" "$value") ;;
    --dtype) train+=("$flag" "$value"); data+=("$flag" "$value"); score+=("$flag" "$value") ;;
    --data-dir) score+=("$flag" "$(absolute "$value")") ;;
    --limit | --max-new-tokens) score+=("$flag" "$value") ;;
    *) fail "unknown flag $flag; bash run.sh --help lists them" ;;
  esac
done

demo=""
if [[ -z $ckpt && -z $teacher && ${#sources[@]} == 0 ]]; then
  demo=yes ckpt=$here/demo/base run=${run:-runs/demo}
  export CUDA_VISIBLE_DEVICES= # run on the CPU, so that everybody gets the README's table
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # two threads save a sixth, but crawl beside other work
  ((${#tasks[@]})) || tasks=(demo)
  # The user's flags come last, because in argparse the last value of a flag wins. These learning rates suit the tiny
  # model only; they would ruin a real one.
  data=(--target 2400 --max-new-tokens 48 --judge-verified --teacher-model demo-teacher --decontaminate demo/heldout.jsonl
    ${data[@]+"${data[@]}"})
  train=(--max-len 512 --warmup 10 ${train[@]+"${train[@]}"})
  sft=(--lr 5e-4 --epochs 2 --batch-size 32 ${sft[@]+"${sft[@]}"})
  kto=(--lr 1e-4 --epochs 1 --batch-size 32 ${kto[@]+"${kto[@]}"})
  score=(--data-dir . --max-new-tokens 48 --batch-size 64 ${score[@]+"${score[@]}"})
else
  [[ -n $ckpt ]] || fail "--ckpt is missing: the model to start from, such as Qwen/Qwen2-0.5B-Instruct"
  [[ -n $teacher ]] || fail "--teacher is missing: the URL of an OpenAI-compatible endpoint (.../v1), or a checkpoint"
  ((${#sources[@]})) || fail "--sources is missing: JSON Lines files of instructions"
  name=$(basename "${ckpt%.pt}")
  run=${run:-runs/$name}
  ((${#tasks[@]})) || tasks=(gsm8k mmlu cmmlu ceval humaneval)
fi
cd "$here"
mkdir -p "$run/steps"

bash tools/venv.sh requirements.txt
py=.venv/bin/python

# ---- steps. $run/steps/NAME is the stamp of a finished step: its command, a checksum of its code, and checksums of the
# stamps of the steps it depends on. A step runs again if its stamp would change.

code_of() { # SCRIPT: prints the script and the rooms that it imports
  case $1 in
    train_*) cat model.py core/*.py training/*.py "$1" ;;
    merge.py) cat core/*.py merging/*.py "$1" ;;
    demo/*) cat core/*.py demo/*.py ;;
    *) fail "$1: run.sh does not know which rooms it imports; add it to code_of" ;;
  esac
}
stamp() { # "STEPS IT DEPENDS ON" SCRIPT ARGUMENTS...
  local dep
  for dep in $1; do cksum <"$run/steps/$dep"; done
  code_of "$2" | cksum
  shift
  printf '%s\n' "$@"
}
step() { # NAME "STEPS IT DEPENDS ON" SCRIPT ARGUMENTS...
  local name=$1 began=$SECONDS now
  shift
  now=$(stamp "$@")
  shift
  if [[ -f $run/steps/$name && $(<"$run/steps/$name") == "$now" ]]; then
    say "$name: finished before; to repeat it: rm $run/steps/$name"
    return
  fi
  # An interrupted training run continues from its last save if its command has not changed.
  if [[ -f $run/$name.run/state.json && -f $run/steps/$name.begun && $(<"$run/steps/$name.begun") == "$now" ]]; then
    set -- "$@" --resume
  fi
  [[ $1 == demo/* ]] && { local module=${1%.py}; shift; set -- -m "${module//\//.}" "$@"; }
  say "$name: python $*"
  rm -f "$run/steps/$name"
  printf '%s\n' "$now" >"$run/steps/$name.begun"
  "$py" "$@"
  [[ $1 != train_* || -e $run/$name ]] || fail "$name: was stopped; run the same command again to continue"
  mv "$run/steps/$name.begun" "$run/steps/$name"
  echo "($name: $((SECONDS - began)) s)"
}

if [[ ! -e $ckpt ]]; then
  say "base: fetching $ckpt"
  ckpt=$("$py" -c 'import sys; from core.checkpoint import download; from core.files import cli
cli(lambda: print(download(sys.argv[1])))' "$ckpt")
fi
base=$run/base
[[ $ckpt == *.pt ]] && base=$run/base.pt
target=$(cd "$(dirname "$ckpt")" && pwd)/$(basename "$ckpt")
if [[ $target != "$(cd "$run" && pwd)/$(basename "$base")" ]]; then # else --ckpt is the link of an earlier run
  if [[ -e $base && ! -L $base ]] || [[ -L $base && ! -f $run/steps/base && $(readlink "$base") != "$target" ]]; then
    fail "$base: exists and was not made by run.sh; give another --out"
  fi
  ln -sfn "$target" "$base"
fi
if [[ -d $base ]]; then cat "$base"/config.json "$base"/*.safetensors; else cat "$base"; fi | cksum >"$run/steps/base"

# ---- 1. alignment data

if [[ -n $demo ]]; then
  step sources "" demo/world.py --out "$run/sources.jsonl"
  sources=("$run/sources.jsonl")
  data+=(--trust-references "${sources[@]}")
  rm -f "$run/teacher.url"
  "$py" -m demo.teacher --url-file "$run/teacher.url" --with-parent >"$run/teacher.log" 2>&1 &
  server=$!
  trap 'kill "$server" 2>/dev/null || true' EXIT
  for _ in $(seq 600); do # up to two minutes, because torch may load from a slow disk
    if [[ -s $run/teacher.url ]] || ! kill -0 "$server" 2>/dev/null; then break; fi
    sleep 0.2
  done
  if [[ ! -s $run/teacher.url ]]; then
    cat "$run/teacher.log" >&2
    fail "the demo's teacher did not start; its output is above and in $run/teacher.log"
  fi
  teacher=$(<"$run/teacher.url")
fi
# make_data.py skips its own finished steps, so it runs each time.
say "data: make_data.py with the teacher at $teacher"
began=$SECONDS
"$py" make_data.py --sources "${sources[@]}" --teacher "$teacher" --small "${small:-$base}" --out "$run/data" \
  ${data[@]+"${data[@]}"}
cat "$run/data/sft.jsonl" "$run/data/kto.jsonl" | cksum >"$run/steps/data"
echo "(data: $((SECONDS - began)) s)"

# ---- 2. training: sft; kto from the base; sft-kto from sft; sft-kto-own, which trains on the SFT model's own responses

step sft "base data" train_sft.py --ckpt "$base" --data "$run/data/sft.jsonl" --out "$run/sft" \
  ${train[@]+"${train[@]}"} ${sft[@]+"${sft[@]}"}

# Labels the SFT model's own responses. The copied folder holds the teacher's replies, so only new requests are sent.
# It appears whole: an interrupted copy stays in steps/ and is made again.
say "own-data: make_data.py with the SFT model's responses"
began=$SECONDS
if [[ ! -d $run/own-data ]]; then
  mkdir -p "$run/steps/own-data.copy"
  cp -r "$run/data/." "$run/steps/own-data.copy"
  mv "$run/steps/own-data.copy" "$run/own-data"
elif [[ -f $run/data/replies.jsonl && -f $run/own-data/replies.jsonl ]]; then
  # adds what the teacher has answered since, for a larger --target; a line that a kill cut off is left out
  awk -F'"' '/}$/ && !seen[$4]++' "$run/own-data/replies.jsonl" "$run/data/replies.jsonl" >"$run/steps/replies.jsonl"
  mv "$run/steps/replies.jsonl" "$run/own-data/replies.jsonl"
fi
"$py" make_data.py --sources "${sources[@]}" --teacher "$teacher" --small "$run/sft" --out "$run/own-data" \
  ${data[@]+"${data[@]}"}
cat "$run/own-data/sft.jsonl" "$run/own-data/kto.jsonl" | cksum >"$run/steps/own-data"
echo "(own-data: $((SECONDS - began)) s)"
if [[ -n $demo ]]; then kill "$server"; trap - EXIT; fi # the steps below need no teacher

for arm in kto sft-kto sft-kto-own; do
  from=$run/sft before="data sft" feedback=$run/data
  [[ $arm == kto ]] && from=$base before="base data"
  [[ $arm == sft-kto-own ]] && before="own-data sft" feedback=$run/own-data
  step "$arm" "$before" train_kto.py --ckpt "$from" --data "$feedback/kto.jsonl" --out "$run/$arm" \
    --desirable-weight auto ${train[@]+"${train[@]}"} ${kto[@]+"${kto[@]}"}
done

# ---- 3. weight fusion. The paper fuses two models of one base, A and the further trained B: 0.5 A + 0.5 B and
# 0.05 A + 0.95 B. Here A is sft and B is sft-kto. TIES merges sft and kto, which were both trained from the base.

step mean "sft sft-kto" merge.py --method linear --models "$run/sft:0.5" "$run/sft-kto:0.5" --out "$run/mean"
step mean-05-95 "sft sft-kto" merge.py --method linear --models "$run/sft:0.05" "$run/sft-kto:0.95" \
  --out "$run/mean-05-95"
step ties "base sft kto" merge.py --method ties --models "$run/sft" "$run/kto" --base "$base" --density 0.5 \
  --out "$run/ties"

# ---- 4. evaluation. eval.py keeps all replies, so repeating it costs little

say "eval: ${tasks[*]}"
arms=("$base")
for arm in sft kto sft-kto sft-kto-own mean mean-05-95 ties; do arms+=("$run/$arm"); done
"$py" eval.py --ckpt "${arms[@]}" --tasks "${tasks[@]}" --out "$run/eval" ${score[@]+"${score[@]}"}

"$py" -m tools.page "$run" --out "$run/page.html" >/dev/null

say "done in $((SECONDS - started)) s"
echo "data      $run/data/report.md"
echo "results   $run/eval/results.md, results.json, samples.jsonl"
if [[ -n $demo ]]; then
  echo "next, a real model:  bash run.sh --ckpt Qwen/Qwen2-0.5B-Instruct --teacher http://HOST:8000/v1 \\"
  echo "                       --teacher-model Qwen2.5-7B-Instruct --sources 'data/*.jsonl'"
else
  echo "next, other fusions (python merge.py --help) or more questions (--limit)"
fi
echo "open      $run/page.html in a browser"
