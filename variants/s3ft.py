"""S3FT, selective self-to-supervised fine-tuning (arXiv 2502.08130): replaces gold replies by right ones of the model.

    python -m variants.s3ft --ckpt base --data gold.jsonl --out s3ft     # -> s3ft/sft.jsonl
    python train_sft.py --ckpt base --data s3ft/sft.jsonl --out s3ft-ckpt

--mode sdft is self-data distillation (arXiv 2410.09982, 2402.13669): the model rewords every gold response. --ckpt is
then the model before pruning, and the pruned one is trained. SDFT's lead-in for GSM8K is left out. Programs check the
replies against the references of the records, which are trusted. The paper lets the model judge replies without one;
here the gold response stays. S3FT's prompts and temperature were not found: REWORD and greedy replies are ours.
"""

import re
from argparse import Namespace
from collections import Counter

from core.devices import choose_device
from core.files import InputError, cli, print_next
from core.flags import Parser, add_generation_flags, out_path
from core.outputs import claimed_folder
from core.records import expand, write_jsonl
from curation.local import open_local, with_other_ranks
from curation.sources import clean
from curation.steps import collect_sources, why_left_out
from curation.teacher import Asker, open_replies
from verification.answers import checkable, verify

FILES = ("sft.jsonl", "replies.jsonl")
REWORD = """{prompt}

Here is a reference answer to this:
{gold}

Write your own response, in your own words, guided by the reference answer. Give the response alone."""
TELL_TALE = re.compile(r"reference answer|\b(?:my|your) (?:own )?response|now it's your turn|\A\s*your turn", re.I)


def choose_target(gold: str, candidates: dict[str, str], verdicts: dict[str, bool | None]) -> tuple[str, str]:
    """Chooses the training target -> (writer, text): the first candidate that is right, else the gold response.

        target = y1 if J(y1, y),  else y2 if J(y2, y),  else y        y1 = M(x),  y2 = M(x, y: "in your own words")

    gold: y. candidates: {writer: text} in the order of preference, "own" y1 and "reworded" y2. verdicts: {writer: J},
    None if it cannot be checked, which counts as wrong. Self-data distillation has only the candidate y2.
    """
    return next(((w, text) for w, text in candidates.items() if verdicts[w]), ("gold", gold))


def program_verdict(record: dict, text: str, args: Namespace) -> bool | None:
    """J(text, y) by a program, None if it cannot tell. SDFT accepts texts without a reference, but no tell-tale."""
    if args.mode == "sdft" and TELL_TALE.search(text):
        return False
    if args.mode == "sdft" and not record["reference"]:
        return True
    return verify(record["reference"], text, args.allow_code_execution)


def read_gold(args: Namespace) -> list[dict]:
    """Reads --data as step 1 of make_data.py does -> {"prompt", "response", "reference", ...} of each record."""
    options = Namespace(limit=0, max_chars=1 << 30, trust_references=expand(args.data))  # of collect_sources
    found = list(collect_sources(options, options.trust_references, {}))
    records = [record | {"candidates": {}, "verdicts": {}} for kept, record in found if kept]
    for reason, n in Counter(record["reason"] for kept, record in found if not kept).items():
        print(f"dropped {n:,}: {reason}")
    for record in records:
        if record["response"] is None:
            raise InputError(f"--data: record {record['id']} has no response; each record needs a gold response")
    if not any(args.mode == "sdft" or checkable(one["reference"], args.allow_code_execution) for one in records):
        raise InputError(f"{', '.join(args.data)}: no usable record; s3ft needs a `reference` that can be checked")
    return records


def add_candidates(records: list[dict], writer: str, args: Namespace, model: Asker) -> None:
    """Asks for a candidate of each record that has no right one yet. Leaves out empty or cut replies."""
    left, prompts = [record for record in records if not any(record["verdicts"].values())], []
    for record in left:
        *before, last = record["prompt"]
        reword = {"role": "user", "content": REWORD.format(prompt=last["content"], gold=record["response"])}
        prompts.append(record["prompt"] if writer == "own" else [*before, reword])
    for record, reply in zip(left, model.ask(prompts, writer)):
        text = clean(reply.get("text", ""))
        if not why_left_out(reply, text, must_respond=False):
            record["candidates"][writer], record["verdicts"][writer] = text, program_verdict(record, text, args)


def rewrite(args: Namespace) -> None:
    """The command on rank 0: reads the gold data and writes OUT/."""
    out, options = f"{args.out}/sft.jsonl", {"max_tokens": args.max_new_tokens, "batch_size": args.batch_size}
    with claimed_folder(args.out, "variants.s3ft", FILES), open_replies(f"{args.out}/replies.jsonl") as log:
        records = read_gold(args)
        model = Asker(open_local(args.ckpt, dtype=args.dtype, device=args.device), log, options)
        for writer in ("own", "reworded") if args.mode == "s3ft" else ("reworded",):
            add_candidates(records, writer, args, model)
        targets = [choose_target(one["response"], one["candidates"], one["verdicts"]) for one in records]
        rows = ({"prompt": one["prompt"], "completion": t, "writer": w} for one, (w, t) in zip(records, targets))
        write_jsonl(out, rows)
    if unjudged := sum(None in record["verdicts"].values() for record in records):
        print(f"note: {unjudged:,} records have a reply that could not be judged and is not used")
    counts = Counter(writer for writer, _ in targets)
    shares = ", ".join(f"{counts[w] / len(records):.1%} {w}" for w in ("own", "reworded", "gold") if w in counts)
    print(f"wrote {out}: {len(records):,} examples, {shares}")
    print_next("python", "train_sft.py", "--ckpt", args.ckpt, "--data", out)


def main() -> None:
    p = Parser(description=__doc__)
    p.add_argument("--ckpt", required=True, help="hub id, folder or .pt file of the model that answers and rewords")
    p.add_argument("--data", nargs="+", required=True, metavar="F", help="gold data, in any shape of train_sft.py")
    p.add_argument("--out", type=out_path, help="folder for sft.jsonl and replies.jsonl (default: the name of --mode)")
    p.add_argument("--mode", choices=("s3ft", "sdft"), default="s3ft", help="sdft: only reword the gold response")
    p.add_argument("--allow-code-execution", action="store_true", help="run tests of code references, in a sandbox")
    add_generation_flags(p, max_new_tokens=512)
    args = p.parse_args()
    args.out = args.out or args.mode
    choose_device(args)
    with_other_ranks(lambda: rewrite(args))


if __name__ == "__main__":
    cli(main)
