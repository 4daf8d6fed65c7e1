"""Lets the teacher answer the instructions of a data run, for make_data.py --recorded.

    python -m experiments.teacher_replies --teacher qwen1.5b --prompts OUT/data/2_dedup.jsonl --out OUT/teacher.jsonl

Keeps complete replies only. A run that was interrupted continues, and asks again for replies that were cut off.
"""

import argparse
import json
from pathlib import Path

from tqdm import tqdm

from core.devices import choose_device
from core.files import cli
from core.flags import Parser, add_generation_flags
from core.records import read_jsonl
from generate import generate_iter, load_for_inference


def main() -> None:
    p = Parser(description=__doc__)
    p.add_argument("--teacher", required=True, help="checkpoint that answers")
    p.add_argument("--prompts", required=True, help="records with a prompt, from make_data.py")
    p.add_argument("--out", required=True, help="file of replies to write")
    add_generation_flags(p, max_new_tokens=256)
    args: argparse.Namespace = p.parse_args()
    choose_device(args)
    out = Path(args.out)
    answered = {json.dumps(row["prompt"]) for _, row in read_jsonl(args.out)} if out.exists() else set()
    prompts = [record["prompt"] for _, record in read_jsonl(args.prompts)]
    prompts = [prompt for prompt in prompts if json.dumps(prompt) not in answered]
    model, tokenizer = load_for_inference(args.teacher, args)
    settings = {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size, "temperature": 0.0}
    with out.open("a") as f:
        for i, text, finish in tqdm(
            generate_iter(model, tokenizer, prompts, **settings), total=len(prompts), disable=None
        ):
            if finish == "stop":
                f.write(json.dumps({"prompt": prompts[i], "response": text, "writer": "teacher"}) + "\n")
                f.flush()
    print(f"wrote {out}")


if __name__ == "__main__":
    cli(main)
