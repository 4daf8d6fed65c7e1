"""Makes alignment data from open instructions with the help of a large model: sft.jsonl and kto.jsonl, in seven steps.

    python make_data.py --sources 'data/*.json*' --teacher http://localhost:8000/v1 \\
        --teacher-model Qwen2.5-7B-Instruct --small Qwen/Qwen2-0.5B-Instruct

The first six steps are 1_collect, 2_dedup, 3_classify, 4_balance, 5_respond and 6_score. Each reads one JSON Lines
file, writes N_NAME.jsonl, and writes the records that it drops to N_NAME.dropped.jsonl, with the reason. The seventh
step writes sft.jsonl and kto.jsonl. report.md and report.json count everything. Steps 1 to 5 are in curation/steps.py,
6 and 7, with the composite score, in curation/labels.py.

A step is not run again while its input and arguments are unchanged. Every reply is kept in replies.jsonl, so a run that
was killed continues. Under torchrun, local checkpoints answer and score on all ranks, and rank 0 does the rest.
"""

import core.interrupt  # noqa: F401  isort: skip (first: Ctrl-C while torch loads ends silently)
from core.files import InputError, check_arguments, cli, code_hash, print_next, same_path
from curation.flags import OUT, SMALL, parse_args

if __name__ == "__main__":
    check_arguments(parse_args)  # before torch is loaded, so that --help and wrong flags are answered at once

import argparse
import contextlib
import os
from collections.abc import Iterable
from typing import NamedTuple

from core.devices import choose_device
from core.outputs import claimed_folder
from core.records import expand
from core.reply_log import ReplyLog
from curation import labels, report, sources, steps
from curation.costs import price
from curation.endpoint import Endpoint
from curation.local import LocalModel, with_other_ranks
from curation.prompts import AGAIN_JUDGE, JUDGE
from curation.step_files import FILES, STEPS, load_state, write_step
from curation.teacher import Asker, Teacher, greet, greet_after, open_replies, open_teacher

# ---------------------------------------------------------------------------------------------------------------------
# The run


def find_files(args: argparse.Namespace) -> None:
    """Replaces globs and hf:// names in the arguments with file paths, each file once. InputError for an own output."""
    own = {os.path.realpath(os.path.join(args.out, name)) for name in FILES}
    for name in ("sources", "decontaminate", "recorded", "trust_references"):
        files = {}
        for path in expand(getattr(args, name)):
            files.setdefault(os.path.realpath(path), path)
        setattr(args, name, list(files.values()))
        for path in files.keys() & own:
            flag = f"--{name.replace('_', '-')} {files[path]}"
            raise InputError(f"{flag}: this run would replace its own input; give another --out")
    for path in args.trust_references:
        if not any(same_path(path, source) for source in args.sources):
            raise InputError(f"--trust-references {path}: is not one of the --sources; add it there too")


def check_files(args: argparse.Namespace) -> None:
    """InputError for a malformed file of --decontaminate or --recorded, which the steps read later."""
    for path in args.decontaminate:
        sources.evaluation_questions(path)
    for path in args.recorded:
        for _ in sources.read_recorded(path):
            pass


class Models(NamedTuple):
    """The models of a run. scorer: computes perplexities."""

    teacher: Teacher
    small: LocalModel
    scorer: LocalModel

    def scorer_writer(self) -> str | None:
        """The writer, "teacher" or "small", that is the same model as the scorer. None if neither is."""
        return {self.teacher.identity: "teacher", self.small.identity: "small"}.get(self.scorer.identity)


def open_models(args: argparse.Namespace) -> Models:
    teacher = open_teacher(args.teacher, args.teacher_model, args.dtype, args.device)
    small = open_teacher(args.small, None, args.dtype, args.device)
    scorer = open_teacher(args.perplexity, None, args.dtype, args.device) if args.perplexity else small
    if isinstance(small, Endpoint) or isinstance(scorer, Endpoint):
        flag, value = ("--small", args.small) if isinstance(small, Endpoint) else ("--perplexity", args.perplexity)
        raise InputError(f"{flag} {value}: is an endpoint; give a local checkpoint, which can compute perplexities")
    return Models(teacher, small, scorer)


def pick_args(args: argparse.Namespace, *names: str) -> dict:
    """The named arguments as a dict."""
    return {name: getattr(args, name) for name in names}


def step_arguments(args: argparse.Namespace, models: Models) -> dict[str, dict]:
    """-> {step: the arguments that determine its result}. A step runs again if they change."""
    teacher = {"teacher": models.teacher.identity, "thought_tokens": args.thought_tokens}
    small = {"small": models.small.identity}
    names_and_trust = {
        "labels": sources.short_names(args.sources),
        "trusted": [any(same_path(source, path) for path in args.trust_references) for source in args.sources],
    }
    sampling = pick_args(args, "samples", "temperature", "seed") if args.samples > 1 else {}
    weights = pick_args(args, "weight_quality", "weight_safety", "weight_perplexity")
    judging = pick_args(args, "judge_orders", "judge_verified", "allow_code_execution", "max_len", "seed")
    scoring = {"scorer": [models.scorer.identity, models.scorer_writer()], "prompt": [JUDGE, AGAIN_JUDGE]}
    scoring |= {"perplexities": code_hash("model.py", "training/logps.py", "training/examples.py")}
    arguments = {
        "1_collect": pick_args(args, "limit", "max_chars") | names_and_trust,
        "2_dedup": pick_args(args, "hamming"),
        "3_classify": teacher,
        "4_balance": pick_args(args, "min_category", "target", "seed"),
        "5_respond": pick_args(args, "max_new_tokens") | sampling | teacher | small,
        "6_score": weights | judging | teacher | scoring,
        "7_label": pick_args(args, "margin", "min_safety", "writers"),
    }
    code = code_hash("core", "curation", "verification")  # replies are kept, also if model.py or generate.py changes
    return {name: {"code": code, **values} for name, values in arguments.items()}


def run_steps(args: argparse.Namespace, models: Models, log: ReplyLog, counts: dict[str, dict]) -> None:
    """Runs the steps in order, with --dry-run only the first two. counts: {step: {}}, filled by the steps."""
    options = pick_args(args, "concurrency", "timeout", "retries", "batch_size")
    options |= pick_args(args, "requests_per_minute", "tokens_per_minute", "budget", "prices")
    grader = Asker(models.teacher, log, {"max_tokens": args.max_grade_tokens, **options})
    teacher = Asker(models.teacher, log, {"max_tokens": args.max_new_tokens + args.thought_tokens, **options})
    small = Asker(models.small, log, {"max_tokens": args.max_new_tokens, **options})
    state, arguments = load_state(args.out), step_arguments(args, models)
    collected, deduplicated, classified, balanced, answered, scored, _ = (f"{args.out}/{name}.jsonl" for name in STEPS)
    eval_files, scorer_writer = args.decontaminate, models.scorer_writer()

    def run(name: str, inputs: list[str], lines: Iterable) -> None:
        counts[name] = write_step(args.out, state, name, inputs, arguments[name], lines, counts[name])

    lines = steps.collect_sources(args, args.sources, counts["1_collect"])
    run("1_collect", args.sources, lines if args.dry_run else greet_after(lines, grader))
    run("2_dedup", [collected, *eval_files], steps.deduplicate(args, collected, eval_files, counts["2_dedup"]))
    if args.dry_run:
        return
    greet(grader)  # nothing is sent if step 1 has just done it
    run("3_classify", [deduplicated], steps.classify(deduplicated, grader, counts["3_classify"]))
    run("4_balance", [classified], steps.balance(args, classified, counts["4_balance"]))
    lines = steps.respond(args, balanced, teacher, small, eval_files, counts["5_respond"])
    run("5_respond", [balanced, *args.recorded, *eval_files], lines)
    lines = labels.score_responses(args, answered, grader, models.scorer, scorer_writer, counts["6_score"])
    run("6_score", [answered], lines)
    run("7_label", [scored], labels.label_pairs(args, scored, counts["7_label"]))


def next_commands(small: str, out: str, pairs: int) -> list[list[str]]:
    """The commands that train on the data, as lists of words, without flags that equal the trainers' defaults."""
    ckpt = [] if small == SMALL else ["--ckpt", small]
    sft, kto = ([] if out == OUT else ["--data", f"{out}/{name}.jsonl"] for name in ("sft", "kto"))
    commands = [["python", "train_sft.py", *ckpt, *sft]]
    if pairs:
        commands.append(["python", "train_kto.py", "--ckpt", "sft.pt", *kto])
    return commands


def make(args: argparse.Namespace) -> None:
    """The whole run. Only rank 0 calls it."""
    find_files(args)
    check_files(args)
    models = open_models(args)
    out, counts = args.out, {name: {} for name in STEPS}
    # length of a reply with a category or all grades
    args.max_grade_tokens = max(128, 40 * (2 + args.samples)) + args.thought_tokens
    with claimed_folder(out, "make_data.py", FILES), open_replies(f"{out}/replies.jsonl") as log:
        with contextlib.redirect_stdout(None) if args.quiet else contextlib.nullcontext():
            run_steps(args, models, log, counts)
        if args.dry_run:
            dedup = f"{out}/2_dedup.jsonl"
            return report.dry_run(args, dedup, args.max_grade_tokens, log.spent, len(log))
        report.write_report(out, counts)
    sft, kto = counts["7_label"]["sft"], counts["7_label"]["kto"]
    if not sft:
        raise InputError(f"{out}/sft.jsonl: no instruction gave an example; {out}/report.md counts the outcomes")
    print(f"\n{sft:,} SFT examples, {kto // 2:,} KTO pairs.")
    if any(log.spent):
        cost = f", {price(log.spent, args.prices):,.2f} in all" if args.prices else ""
        print(f"The teacher's replies in {out}/replies.jsonl: {log.spent[0]:,} tokens in, {log.spent[1]:,} out{cost}.")
    print(f"wrote {out}/sft.jsonl, {out}/kto.jsonl and {out}/report.md")
    report.print_unanswered(out, counts)
    for words in next_commands(args.small, out, kto):
        print_next(*words)


def main() -> None:
    args = parse_args()
    choose_device(args)
    with_other_ranks(lambda: make(args))


if __name__ == "__main__":
    cli(main)
