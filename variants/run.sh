#!/usr/bin/env bash
# Compares the variants: trains each of them, plain SFT and plain KTO on the demo's data, and writes one table.
#
#   bash variants/run.sh              all arms, in about 45 minutes on one CPU core
#   bash variants/run.sh sft dft      these arms only; when the data exist, two such commands may run at once
#
# Plan:
#   data        the demo's curated data (make_data.py). Eight of its tasks are withheld from training, and 300 of its
#               instructions are kept for validation (demo/split.py). 1,723 examples are left, and 1,418 preference pairs.
#   budget      two epochs in steps of 32 examples; for preference data one epoch in steps of 32 replies. All arms start from the base.
#   rate        two learning rates per arm, one seed each. The better one on the validation questions gets three seeds.
#   score       528 held-out instructions of the tasks that are trained on.
#   forgetting  of the instructions of withheld tasks that the base answers right, the share that an arm still answers right.
# Checkpoints and replies go to runs/variants/, results to runs/variants/results/*.json, the table to runs/variants/table.md.
# Finished arms are not repeated. To repeat an arm, remove runs/variants/ARM and its result. The variables RUN and PYTHON
# set another folder and another interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1:-} in -h | --help) awk 'NR > 1 && !/^#/ {exit} NR > 1 {sub(/^# ?/, ""); print}' variants/run.sh; exit 0 ;; esac
[[ -n ${PYTHON:-} ]] || bash tools/venv.sh requirements.txt
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # two cores run two commands faster than one with two threads
py=${PYTHON:-.venv/bin/python} run=${RUN:-runs/variants} only=" $* "
mkdir -p "$run"

# ---- data: as run.sh makes them

if [[ ! -f $run/questions/demo/heldout.jsonl ]]; then
  $py -m demo.world --out "$run/sources.jsonl"
  rm -f "$run/teacher.url"
  $py -m demo.teacher --url-file "$run/teacher.url" --with-parent >"$run/teacher.log" 2>&1 &
  server=$!
  trap 'kill "$server" 2>/dev/null || true' EXIT
  until [[ -s $run/teacher.url ]]; do
    kill -0 "$server" || { cat "$run/teacher.log" >&2; exit 2; }
    sleep 0.2
  done
  $py make_data.py --sources "$run/sources.jsonl" --teacher "$(<"$run/teacher.url")" --teacher-model demo-teacher \
    --small demo/base --out "$run/data" --target 2400 --max-new-tokens 48 --judge-verified \
    --decontaminate demo/heldout.jsonl --trust-references "$run/sources.jsonl"
  kill "$server"
  trap - EXIT
  $py -m demo.split --data "$run/data" --out "$run"
fi

# ---- an arm

evaluate() { # FOLDER CHECKPOINT...; existing replies are reused
  $py eval.py --ckpt "${@:2}" --tasks demo --data-dir "$run/questions" --max-new-tokens 48 --batch-size 64 --out "$1/eval" >/dev/null
}
arms=" "
chosen() { # true if this arm must run
  arms+="$1 "
  [[ $only == "  " || $only == *" $1 "* ]] && [[ ! -f $run/results/$1.json ]]
}
record() { $py -m variants.compare record "$run/$1" --out "$run/results" "${@:2}"; }

train() { # FOLDER RATE SEED COMMAND...: writes the checkpoint FOLDER/RATE-SEED and the CPU seconds of its training
  local out=$1/$2-$3
  [[ -f $out.seconds ]] && return
  echo "== ${*:4} --lr $2 --seed $3"
  local TIMEFORMAT='%U %S'
  { time "${@:4}" --ckpt demo/base --max-len 512 --warmup 10 --lr "$2" --seed "$3" --out "$out" >"$out.log" 2>&1; } \
    2>"$out.time" || { tail -n 5 "$out.log" >&2; exit 1; }
  [[ -e $out ]] || exit 143 # SIGTERM
  mv "$out.time" "$out.seconds"
}

arm() { # NAME BASELINE "RATE RATE" COMMAND...: trains an arm at both rates, then with two more seeds at the better one
  local name=$1 baseline=$2 rates=$3 folder=$run/$1 rate seed
  shift 3
  chosen "$name" || return 0
  mkdir -p "$folder"
  for rate in $rates; do train "$folder" "$rate" 0 "$@"; done
  evaluate "$folder" "$folder"/*-0
  rate=$($py -m variants.compare best "$folder")
  for seed in 1 2; do train "$folder" "$rate" "$seed" "$@"; done
  evaluate "$folder" "$folder"/*-[012]
  record "$name" --rate "$rate" --baseline "$baseline" --command "$@"
}

# ---- the arms. Matrices of full rank take 5e-4 or 2e-3 here (SFT forgets half at 4e-3), thin or sparse ones four times that.

sft=(--data "$run/sft.jsonl" --epochs 2 --batch-size 32)
pairs=(--data "$run/pairs.jsonl" --epochs 1)
full="5e-4 2e-3" thin="2e-3 8e-3" preference="1e-4 4e-4"

lt_sft() { # two phases of one epoch each; the arguments end with --out OUT
  $py train_sft.py "$@"-moved && $py -m variants.lt_sft --moved "${!#}-moved" "$@"
}
s3ft() { # writes its data, then trains on them
  $py -m variants.s3ft --ckpt demo/base --data "$run/sft.jsonl" --max-new-tokens 48 --out "${!#}-data" &&
    $py train_sft.py --data "${!#}-data/sft.jsonl" "$@"
}
got() { # chooses half of the examples for the validation instructions
  $py -m variants.got --ckpt demo/base --candidates "$run/sft.jsonl" --targets "$run/validation.jsonl" --keep 862 --out "${!#}-data" &&
    $py train_sft.py --data "${!#}-data/sft.jsonl" "$@"
}

if chosen base; then evaluate "$run/base" demo/base && record base; fi
arm sft base "$full" $py train_sft.py "${sft[@]}"
arm kto base "$preference" $py train_kto.py "${pairs[@]}" --batch-size 32
arm dpo kto "$preference" $py -m variants.dpo "${pairs[@]}" --batch-size 16
arm adpo kto "$preference" $py -m variants.adpo --data "$run/groups.jsonl" --max-steps 88 --batch-size 14 # about 32 replies
for name in dft asft masked_thought half_finetuning; do arm $name sft "$full" $py -m variants.$name "${sft[@]}"; done
arm otr sft "$full" $py -m variants.otr --beta -0.1 "${sft[@]}"
arm sorted_finetuning sft "$full" $py -m variants.sorted_finetuning --exits 3 4 --export 3 "${sft[@]}"
if chosen first_3_blocks; then # of 5: the exported exits of the arm above
  mkdir -p "$run/first_3_blocks"
  for out in "$run"/sorted_finetuning/*-[12]-3; do
    rate=$(basename "$out") && rate=${rate%-[12]-3}
  done
  for seed in 0 1 2; do
    ln -sfn "../sorted_finetuning/$rate-$seed-3" "$run/first_3_blocks/$rate-$seed"
    cp "$run/sorted_finetuning/$rate-$seed.seconds" "$run/first_3_blocks"
  done
  evaluate "$run/first_3_blocks" "$run"/first_3_blocks/*-[012]
  record first_3_blocks --rate "$rate" --baseline sorted_finetuning --command $py -m variants.sorted_finetuning --exits 3 4 --export 3 "${sft[@]}"
fi
arm lora sft "$thin" $py -m variants.lora "${sft[@]}"
arm corda sft "$thin" $py -m variants.corda --mode learn --rank 8 "${sft[@]}"
arm lt_sft sft "$thin" lt_sft --data "$run/sft.jsonl" --epochs 1 --batch-size 32
arm poft sft "$full" $py -m variants.poft --others "$run"/kto/*-2 "${sft[@]}" # the aligned model is the KTO model
arm s3ft sft "$full" s3ft --epochs 2 --batch-size 32
if chosen token_weights && [[ ! -f $run/weighted.jsonl ]]; then
  # The demo calls no tools. The paper's rule is applied to the answers of a task instead of the names of tools: tokens
  # at which two answers diverge get the higher weight.
  $py - "$run" <<'END'
import collections
import sys

from core.records import read_jsonl, write_jsonl
from core.tokenizer import Tokenizer
from variants.token_weights import key_tokens, rule_weights

tokenizer, rows = Tokenizer("demo/base"), [row for _, row in read_jsonl(f"{sys.argv[1]}/sft.jsonl")]
answers = collections.defaultdict(dict)  # {task: {answer: token ids}}
for row in rows:
    row["answer"] = row["messages"][-1]["content"]
    answers[row["category"]][row["answer"]] = tokenizer.encode(row["answer"])
for row in rows:
    others = dict(answers[row["category"]])
    key = key_tokens(others.pop(row["answer"]), list(others.values()))
    row["token_weights"] = rule_weights(len(tokenizer.completion_ids(row.pop("answer"))), key, closing=set())
write_jsonl(f"{sys.argv[1]}/weighted.jsonl", rows)
END
fi
arm token_weights sft "$full" $py -m variants.token_weights --data "$run/weighted.jsonl" --epochs 2 --batch-size 32
arm uds sft "$full" $py -m variants.uds --share 0.5 --data "$run/sft.jsonl" --epochs 4 --batch-size 64
[[ -f $run/half.jsonl ]] || head -n 862 "$run/sft.jsonl" >"$run/half.jsonl" # the files are in random order
arm random_half sft "$full" $py train_sft.py --data "$run/half.jsonl" --epochs 4 --batch-size 32
arm got random_half "$full" got --epochs 4 --batch-size 32

for name in "$@"; do
  [[ $arms == *" $name "* ]] || { echo "error: no arm $name; the arms are$arms" >&2; exit 2; }
done
$py -m variants.compare table "$run/results" --out "$run/table.md"
