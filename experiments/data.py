"""Makes the studies' data: instructions, replies of the teacher and the student, and labels by program.

    python -m experiments.data --student smollm2-135m-instruct --teacher qwen1.5b

Writes OUT/data/sft.jsonl and kto.jsonl (make_data.py), and the training files of studies 3 and 4.
"""

import json
import random
from pathlib import Path

from core.files import atomic_write, cli
from core.records import read_jsonl
from experiments.steps import command, make_labels, run_step, study_flags


def write_teacher_replies(samples: str, path: str) -> None:
    """Writes the complete replies in samples.jsonl of eval.py, for make_data.py --recorded."""
    with atomic_write(path) as f:
        for _, row in read_jsonl(samples):
            if row["finish_reason"] == "stop":
                line = {"prompt": row["prompt"][-1]["content"], "response": row["reply"], "writer": "teacher"}
                f.write(json.dumps(line) + "\n")


def write_sft_file(path: str, chosen: list[tuple[list[dict], str]]) -> None:
    """Writes prompts and replies for train_sft.py."""
    with atomic_write(path) as f:
        for prompt, reply in chosen:
            f.write(json.dumps({"messages": [*prompt, {"role": "assistant", "content": reply}]}) + "\n")


def write_controls(out: str, seed: int) -> None:
    """Writes the training files of studies 3 and 4.

    Study 3: as many examples as sft.jsonl has, with unverified replies of the teacher or of any writer. Study 4:
    kto.jsonl with wrong labels, and its desirable half.
    """
    rng = random.Random(seed)
    records = [record for _, record in read_jsonl(f"{out}/data/5_respond.jsonl")]
    n = sum(1 for _ in open(f"{out}/data/sft.jsonl"))
    drawn = rng.sample(records, n)
    with_teacher = [record for record in records if "teacher" in record["responses"]]
    teacher = rng.sample(with_teacher, min(n, len(with_teacher)))
    write_sft_file(f"{out}/data/sft-teacher.jsonl", [(r["prompt"], r["responses"]["teacher"]["text"]) for r in teacher])
    anybody = [(r["prompt"], rng.choice(list(r["responses"].values()))["text"]) for r in drawn]
    write_sft_file(f"{out}/data/sft-random.jsonl", anybody)

    rows = [row for _, row in read_jsonl(f"{out}/data/kto.jsonl")]
    order = rng.sample(range(len(rows)), len(rows))
    for percent in (10, 30):
        flipped = set(order[: len(rows) * percent // 100])
        with atomic_write(f"{out}/data/kto-noise-{percent}.jsonl") as f:
            for i, row in enumerate(rows):
                f.write(json.dumps({**row, "label": row["label"] ^ (i in flipped)}) + "\n")
    with atomic_write(f"{out}/data/kto-desirable.jsonl") as f:
        f.write("".join(json.dumps(row) + "\n" for row in rows if row["label"]))


def main() -> None:
    p = study_flags(__doc__)
    p.add_argument("--teacher", required=True, help="checkpoint that answers the training instructions")
    args = p.parse_args()
    out = args.out
    run_step(out, "instructions", command("experiments.instructions", out=f"{out}/instructions"))
    words = command(
        "eval.py",
        ckpt=args.teacher,
        tasks="ifeval",
        data_dir=f"{out}/instructions/train",
        batch_size=64,
        out=f"{out}/teacher",
        dtype=args.dtype,
        max_new_tokens=args.reply_tokens,
    )
    run_step(out, "teacher", words)
    write_teacher_replies(f"{out}/teacher/samples.jsonl", f"{out}/teacher.jsonl")
    make_labels(args, "data", args.student)
    write_controls(out, args.seed)
    print(f"wrote {Path(out, 'data')}\nnext: python -m experiments.paper_table --student {args.student} --out {out}")


if __name__ == "__main__":
    cli(main)
