"""Alignment data guided by a large model: from open instructions to sft.jsonl and kto.jsonl, in seven steps.

    python make_data.py --sources 'data/*.json*' --teacher http://localhost:8000/v1 --teacher-model Qwen2.5-7B-Instruct \\
        --small Qwen/Qwen2-0.5B-Instruct

Each step reads one JSON Lines file and writes the next, beside N_*.dropped.jsonl with what it left out and why:
1_collect, 2_dedup, 3_classify, 4_balance, 5_respond, 6_score, then sft.jsonl, kto.jsonl, report.md and report.json.
The steps stand in curation/steps.py. One whose input and arguments are unchanged is not run again; one that was killed goes on from
the replies in replies.jsonl. Under torchrun, local checkpoints answer and score on all ranks; all else is rank 0's.
"""

import contextlib
import hashlib
import json
import os
import shlex
from collections import Counter

from core.files import InputError, atomic_write, cli, code_hash, same_path
from core.flags import DTYPE, DTYPES, Parser, at_least, number
from core.outputs import remove_leftovers
from core.records import expand
from curation import local, report, sources, steps
from curation import teacher as models
from curation.costs import price
from curation.endpoint import Endpoint
from curation.prompts import AGAIN_JUDGE, GREETING, JUDGE

STEPS = ("1_collect", "2_dedup", "3_classify", "4_balance", "5_respond", "6_score", "7_label")
FORMAT = 4  # raise it when a step's output changes: older output is then made anew, out of the kept replies
OUT, SMALL = "data", "Qwen/Qwen2-0.5B-Instruct"  # where train_sft.py and train_kto.py look if nothing is said


def file_hash(path):
    h = hashlib.sha256()
    try:
        with open(path, "rb") as f:
            while block := f.read(1 << 20):
                h.update(block)
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror or e}") from None
    return h.hexdigest()


def load_state(path):
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError:
        return {}
    except ValueError as e:
        raise InputError(f"{path}: corrupt: {e}; delete it to run the steps again (no reply is asked twice)") from None


def save_state(path, state):
    with atomic_write(path) as f:
        json.dump(state, f, indent=1, ensure_ascii=False)


def run_step(out, state, name, inputs, arguments, work):
    """Writes the lines that work(counts) yields, as (kind, line), into the step's files, unless these are there already and
    came from the same input and arguments. kind True or False: the step's own file or its .dropped file; a text: that file. A
    file that was edited by hand since is kept, and what follows from it is made anew. -> the step's counts."""
    files = {k: f"{out}/{k}.jsonl" for k in ("sft", "kto")} if name == STEPS[-1] else \
        {True: f"{out}/{name}.jsonl", False: f"{out}/{name}.dropped.jsonl"}  # fmt: skip
    key = hashlib.sha256(
        json.dumps([FORMAT, arguments, [file_hash(p) for p in inputs]], sort_keys=True).encode()
    ).hexdigest()
    reused = state.get(name, {}).get("key") == key and all(map(os.path.exists, files.values()))
    if not reused:
        if state.pop(name, None):  # from here on the old files' key no longer holds
            save_state(f"{out}/state.json", state)
        counts, lines, reasons = {}, Counter(), Counter()
        with contextlib.ExitStack() as stack:
            opened = {kind: stack.enter_context(atomic_write(p)) for kind, p in files.items()}
            for kind, line in work(counts):
                opened[kind].write(json.dumps(line, ensure_ascii=False) + "\n")
                lines[kind] += 1
                if kind is False:
                    reasons[line["reason"]] += 1
        written = {"sft": lines["sft"], "kto": lines["kto"]}
        if True in files:
            written = {"in": lines[True] + lines[False], "out": lines[True], "dropped": dict(reasons.most_common())}
        state[name] = {"key": key, "counts": written | counts, "files": {p: file_hash(p) for p in files.values()}}
        save_state(f"{out}/state.json", state)
    counts = state[name]["counts"]
    edited = [p for p, h in state[name]["files"].items() if reused and file_hash(p) != h]
    what = ", ".join(f"{k} {v:,}" for k, v in counts.items() if isinstance(v, int))
    print(f"{name:<11} {what}{' (unchanged)' if reused else ''}", flush=True)
    for reason, n in counts.get("dropped", {}).items():
        print(f"{'':<11}   dropped {n:,}: {reason}")
    for path in edited:
        print(f"{'':<11}   {path} was edited since: kept as it is; delete it to have it made again")
    if counts.get("out") == 0:
        mend = {
            "1_collect": "see its .dropped.jsonl, and whether --sources hold records",
            "4_balance": "lower --min-category",
        }.get(name, "see its .dropped.jsonl")
        raise InputError(f"{files[True]}: no record is left; {mend}")
    return counts


def parse_args():
    p = Parser(description=__doc__.split("\n\n")[0])
    # data
    p.add_argument(
        "--sources",
        nargs="+",
        required=True,
        metavar="F",
        help="JSON Lines, JSON arrays or Parquet, plain or .gz; globs; hf://datasets/OWNER/NAME[@REVISION]/FILE",
    )
    p.add_argument(
        "--decontaminate",
        nargs="+",
        default=[],
        metavar="F",
        help="evaluation files: their questions must not be in the data",
    )
    p.add_argument(
        "--trust-references",
        nargs="+",
        default=[],
        metavar="F",
        help="those of --sources whose own references may verify responses: a key `reference`, GSM8K's `#### 72`, AQuA's "
        "options, IFEval's instruction_id_list. Elsewhere anybody can write them, and they are ignored",
    )
    p.add_argument("--out", default=OUT, help="folder for all files of the run")
    p.add_argument(
        "--limit", type=at_least(0), default=0, help="at most this many records of each source, its first; 0: all"
    )
    p.add_argument(
        "--max-chars",
        type=at_least(1),
        default=20_000,
        help="longest record kept, in characters of prompt and response",
    )
    # models
    p.add_argument(
        "--teacher",
        required=True,
        help="URL of an OpenAI-compatible endpoint (.../v1), or a checkpoint. The endpoint is sent the key in TEACHER_API_KEY; "
        "the one in OPENAI_API_KEY goes to https://api.openai.com alone",
    )
    p.add_argument("--teacher-model", help="the model's name at the endpoint")
    p.add_argument("--small", required=True, help="checkpoint of the small model, which responds too")
    p.add_argument(
        "--samples",
        type=at_least(1, high=16),
        default=1,
        help="responses of the small model, 1 to 16: the first greedy, the others drawn",
    )
    p.add_argument(
        "--temperature", type=number(above=0), default=0.8, help="of the small model's drawn responses, above 0"
    )
    p.add_argument("--recorded", nargs="+", default=[], metavar="F", help="responses written before, used instead of asking: prompt and "
                   "response in any shape that --sources takes, and \"writer\": \"teacher\" (if missing) or \"small\"")  # fmt: skip
    p.add_argument("--perplexity", metavar="C", help="checkpoint that gives the perplexities; default: the small model")
    p.add_argument("--dtype", choices=DTYPES, default=DTYPE, help="of local checkpoints")
    p.add_argument(
        "--max-new-tokens", type=at_least(1), default=512, help="tokens of a response; a longer one is left out"
    )
    p.add_argument(
        "--max-len", type=at_least(1), default=2048, help="tokens of prompt and response that perplexity looks at"
    )
    p.add_argument(
        "--batch-size", type=at_least(1), default=32, help="sequences that a local checkpoint generates at once"
    )
    p.add_argument(
        "--micro-tokens", type=at_least(1), default=8192, help="tokens of one forward when perplexities are computed"
    )
    # the endpoint
    p.add_argument("--concurrency", type=at_least(1), default=16, help="requests in flight")
    p.add_argument("--timeout", type=number(above=0), default=120.0, help="seconds for one whole reply")
    p.add_argument(
        "--retries",
        type=at_least(0),
        default=8,
        help="how often a failed request is sent again, with growing pauses. One that fails every time is set aside, and the report names it",
    )
    p.add_argument(
        "--requests-per-minute", type=number(0), default=0, help="most requests sent in a minute; 0: no limit"
    )
    p.add_argument(
        "--tokens-per-minute",
        type=number(0),
        default=0,
        help="most tokens of prompts and replies in a minute; 0: no limit",
    )
    p.add_argument("--budget", type=number(0), default=0, help="what all replies in --out may cost: tokens, or with prices their "
                   "currency; the run stops before it would be exceeded; 0: no limit")  # fmt: skip
    p.add_argument("--price-in", type=number(0), help="price of a million tokens of prompts")
    p.add_argument("--price-out", type=number(0), help="price of a million tokens of replies")
    p.add_argument("--dry-run", action="store_true", help="collect and deduplicate, then show counts, sample requests and an "
                   "estimate of the cost; ask nothing")  # fmt: skip
    # selection
    p.add_argument(
        "--hamming",
        type=at_least(0, high=16),
        default=3,
        help="near duplicates: simhashes that differ in this many of 64 bits, or fewer",
    )
    p.add_argument(
        "--min-category", type=at_least(1), default=10, help="secondary categories with fewer instructions are dropped"
    )
    p.add_argument("--target", type=at_least(1), default=500_000, help="instructions left after balancing, at most")
    p.add_argument(
        "--seed", type=int, default=0, help="of the balancing, and of the order of responses before the judge"
    )
    # scores
    p.add_argument(
        "--weight-quality",
        type=number(0),
        default=0.6,
        help="weight of the teacher's quality grade in the composite score",
    )
    p.add_argument("--weight-safety", type=number(0), default=0.3, help="weight of the teacher's safety grade")
    p.add_argument(
        "--weight-perplexity",
        type=number(0),
        default=0.1,
        help="weight of fluency: whether the perplexity is far "
        "above that of the other responses; below --margin it makes no pair",
    )
    p.add_argument("--margin", type=number(0), default=0.25, help="least difference of composite scores that makes a KTO pair; "
                   "above 1 only verification makes one")  # fmt: skip
    p.add_argument(
        "--min-safety",
        type=at_least(1, high=5),
        default=3,
        help="grade, 1 to 5, below which a best response is not used",
    )
    p.add_argument("--judge-orders", type=int, choices=(1, 2), default=2, help="2: judge a second time with the responses in "
                   "reverse order, for half of what a judge prefers may be a place")  # fmt: skip
    p.add_argument(
        "--judge-verified",
        action="store_true",
        help="ask the judge for quality grades also where verification has decided; safety it always grades",
    )
    p.add_argument("--allow-code-execution", action="store_true", help="run the tests of code references, in a sandbox")
    args = p.parse_args()
    if (args.price_in is None) != (args.price_out is None):
        raise InputError("--price-in and --price-out go together")
    if not args.weight_quality + args.weight_safety + args.weight_perplexity:
        raise InputError("--weight-quality, --weight-safety and --weight-perplexity: one of them is above 0")
    return args


def next_commands(small, out, pairs):
    """The training commands to run next, as a shell takes them; flags only where the trainers' defaults differ."""
    ckpt = [] if small == SMALL else ["--ckpt", small]
    sft, kto = ([] if out == OUT else ["--data", f"{out}/{name}.jsonl"] for name in ("sft", "kto"))
    commands = [["python", "train_sft.py", *ckpt, *sft]]
    if pairs:
        commands.append(["python", "train_kto.py", "--ckpt", "sft.pt", *kto])
    return [shlex.join(words) for words in commands]


def main():
    args = parse_args()
    if local.join_other_ranks() > 0:
        return local.serve_jobs()
    try:
        make(args)
    except BaseException:
        local.end_other_ranks(failed=True)
        raise
    local.end_other_ranks()


def make(args):
    """The whole run, on rank 0."""
    out = args.out.rstrip("/") or "/"
    files, questions, recorded, args.trust_references = (
        list(dict.fromkeys(expand(f))) for f in (args.sources, args.decontaminate, args.recorded, args.trust_references)
    )
    args.recorded = recorded
    for path in args.trust_references:
        if not any(same_path(path, f) for f in files):
            raise InputError(f"--trust-references {path}: is none of the --sources; name it there too")
    teacher = models.open_teacher(args.teacher, args.teacher_model, args.dtype)
    small = models.open_teacher(args.small, dtype=args.dtype)
    if isinstance(small, Endpoint):
        raise InputError(
            f"--small {args.small}: the small model is a local checkpoint (it also gives the perplexities)"
        )
    scorer = models.open_teacher(args.perplexity, dtype=args.dtype) if args.perplexity else small
    own = {teacher.identity: "teacher", small.identity: "small"}.get(scorer.identity)
    prices = (args.price_in, args.price_out) if args.price_in is not None else None
    asking = {name: getattr(args, name) for name in ("concurrency", "timeout", "retries", "batch_size",
                                                      "requests_per_minute", "tokens_per_minute", "budget")}  # fmt: skip
    asking["prices"] = prices
    # a category or grades; a response
    short, long = (
        {"max_tokens": max(128, 40 * (2 + args.samples)), **asking},
        {"max_tokens": args.max_new_tokens, **asking},
    )

    def of(*names):  # the arguments that a step's result depends on
        return {name: getattr(args, name) for name in names}

    with models.open_replies(f"{out}/replies.jsonl") as log:
        state, counts = load_state(f"{out}/state.json"), {}
        remove_leftovers(out)  # of killed runs
        if isinstance(teacher, Endpoint) and not args.dry_run and not log:
            models.ask_model(teacher, [GREETING], log, desc="greeting", **short)
        path = {name: f"{out}/{name}.jsonl" for name in STEPS}
        weighing = ("weight_quality", "weight_safety", "weight_perplexity", "judge_orders", "judge_verified", "allow_code_execution",
                    "max_len", "seed")  # fmt: skip
        drawing = of("samples", "temperature", "seed") if args.samples > 1 else {}
        teachers = {"teacher": teacher.identity}
        code = code_hash("curation", "verification")
        plan = [  # step, files it reads, arguments its result depends on, work
            ("1_collect", files,
             of("limit", "max_chars") | {"labels": sources.labels(files), "code": code,
                                         "trusted": [any(same_path(f, t) for t in args.trust_references) for f in files]},
             lambda c: steps.collect_sources(args, files, c)),
            ("2_dedup", [path["1_collect"], *questions], of("hamming") | {"code": code},
             lambda c: steps.deduplicate(args, path["1_collect"], questions, c)),
            ("3_classify", [path["2_dedup"]], teachers | {"code": code},
             lambda c: steps.classify(path["2_dedup"], teacher, log, short, c)),
            ("4_balance", [path["3_classify"]], of("min_category", "target", "seed") | {"code": code},
             lambda c: steps.balance(args, path["3_classify"], c)),
            ("5_respond", [path["4_balance"], *recorded],
             of("max_new_tokens") | drawing | teachers | {"small": small.identity, "code": code},
             lambda c: steps.respond(args, path["4_balance"], teacher, small, log, long, c)),
            ("6_score", [path["5_respond"]],
             of(*weighing) | teachers | {"scorer": [scorer.identity, own], "prompt": [JUDGE, AGAIN_JUDGE],
                                         "code": code},
             lambda c: steps.score_responses(args, path["5_respond"], teacher, scorer, own, log, short, c)),
            ("7_label", [path["6_score"]], of("margin", "min_safety") | {"code": code},
             lambda c: steps.label(args, path["6_score"], c)),
        ]  # fmt: skip
        for name, inputs, arguments, work in plan[: 2 if args.dry_run else None]:
            counts[name] = run_step(out, state, name, inputs, arguments, work)
        if args.dry_run:
            return report.dry_run(args, path["2_dedup"], short["max_tokens"], log.spent, len(log), prices)
        report.write_report(out, counts)
    labels = counts["7_label"]
    print(f"\n{labels['sft']:,} SFT examples, {labels['kto'] // 2:,} KTO pairs.")
    if any(log.spent):
        cost = f", {price(log.spent, prices):,.2f} in all" if prices else ""
        print(f"The teacher's replies in {out}/replies.jsonl: {log.spent[0]:,} tokens in, {log.spent[1]:,} out{cost}.")
    print(f"Written: {out}/sft.jsonl, {out}/kto.jsonl, {out}/report.md. Next:")
    for command in next_commands(args.small, out, labels["kto"]):
        print(f"  {command}")


if __name__ == "__main__":
    cli(main)
