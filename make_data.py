"""Makes alignment data from open instructions with the help of a large model: sft.jsonl and kto.jsonl, in seven steps.

    python make_data.py --sources 'data/*.json*' --teacher http://localhost:8000/v1 \\
        --teacher-model Qwen2.5-7B-Instruct --small Qwen/Qwen2-0.5B-Instruct

The first six steps are 1_collect, 2_dedup, 3_classify, 4_balance, 5_respond and 6_score. Each reads one JSON Lines
file, writes N_NAME.jsonl, and writes the records that it drops to N_NAME.dropped.jsonl, with the reason. The seventh
step writes sft.jsonl and kto.jsonl. report.md and report.json count everything.

A step is not run again while its input and arguments are unchanged. Every reply is kept in replies.jsonl, so a run that
was killed continues. Under torchrun, local checkpoints answer and score on all ranks, and rank 0 does the rest.
"""

import core.interrupt  # noqa: F401  isort: skip (first: Ctrl-C while torch loads ends silently)
import argparse
import contextlib
import shlex
from collections.abc import Iterable

from core.devices import DTYPE, DTYPES
from core.files import InputError, cli, code_hash, same_path
from core.flags import Parser, at_least, number
from core.outputs import check_folder, claimed_folder
from core.records import expand
from core.reply_log import ReplyLog
from curation import labels, local, report, sources, steps
from curation import teacher as models
from curation.costs import price
from curation.endpoint import Endpoint
from curation.prompts import AGAIN_JUDGE, GREETING, JUDGE
from curation.step_files import FILES, STEPS, load_state, write_step
from curation.steps import Asker

OUT, SMALL = "data", "Qwen/Qwen2-0.5B-Instruct"  # the defaults of train_sft.py and train_kto.py


# ---------------------------------------------------------------------------------------------------------------------
# Flags, as a table
# fmt: off


def add_data_flags(p: Parser) -> None:
    add = p.add_argument
    add("--sources", nargs="+", required=True, metavar="F",
        help="files of instructions: JSON Lines, JSON arrays or Parquet, plain or .gz; globs; "
        "hf://datasets/OWNER/NAME[@REVISION]/FILE")
    add("--trust-references", nargs="+", default=[], metavar="F",
        help="the --sources whose references may verify responses: a key `reference`, GSM8K's `#### 72`, AQuA's "
        "options, IFEval's instruction_id_list, MBPP's test_list. References in other files are ignored, because anybody "
        "can write them")
    add("--decontaminate", nargs="+", default=[], metavar="F",
        help="evaluation files; prompts and responses that contain one of their questions are dropped")
    add("--out", default=OUT, help="folder for all files of the run")
    add("--quiet", action="store_true", help="print only the closing summary, not what each step keeps and drops")
    add("--limit", type=at_least(0), default=0,
        help="maximum number of instructions per source, from its beginning; 0: all")
    add("--max-chars", type=at_least(1), default=20_000,
        help="maximum length of prompt and response together, in characters; longer records are dropped")


def add_model_flags(p: Parser) -> None:
    add = p.add_argument
    add("--teacher", required=True,
        help="URL of an OpenAI-compatible endpoint (.../v1), or a checkpoint. The endpoint receives the key in "
        "TEACHER_API_KEY. The key in OPENAI_API_KEY is sent only to https://api.openai.com")
    add("--teacher-model", help="the model's name at the endpoint")
    add("--small", required=True, help="checkpoint of the small model, which writes responses too")
    add("--samples", type=at_least(1, high=16), default=1,
        help="number of responses by the small model, 1 to 16; the first is greedy, the others are sampled")
    add("--temperature", type=number(above=0), default=0.8, help="sampling temperature of the small model, above 0")
    add("--recorded", nargs="+", default=[], metavar="F",
        help="files of responses to use instead of asking a model: records of any shape of --sources, with \"writer\": "
        "\"teacher\" (the default) or \"small\"")
    add("--perplexity", metavar="C", help="checkpoint that computes perplexities; default: the small model")
    add("--dtype", choices=DTYPES, default=DTYPE, help="number format of local checkpoints")
    add("--max-new-tokens", type=at_least(1), default=512,
        help="maximum length of a response, in tokens; longer responses are left out")
    add("--max-len", type=at_least(1), default=2048,
        help="maximum length of prompt and response for a perplexity, in tokens; the rest is cut off")
    add("--batch-size", type=at_least(1), default=32, help="batch size of local checkpoints, in sequences")
    add("--micro-tokens", type=at_least(1), default=8192, help="size of one forward pass for perplexities, in tokens")


def add_endpoint_flags(p: Parser) -> None:
    add = p.add_argument
    add("--concurrency", type=at_least(1), default=16, help="maximum number of requests in flight")
    add("--timeout", type=number(above=0), default=120.0, help="time limit of one whole reply, in seconds")
    add("--retries", type=at_least(0), default=8,
        help="maximum number of retries of a failed request, with growing pauses. A request that fails every time is "
        "set aside and listed in the report")
    add("--requests-per-minute", type=number(0), default=0, help="maximum rate of requests, per minute; 0: no limit")
    add("--tokens-per-minute", type=number(0), default=0,
        help="maximum rate of prompt and reply tokens, per minute; 0: no limit")
    add("--budget", type=number(0), default=0,
        help="maximum cost of all replies in --out, in tokens, or in currency if prices are given. The run stops "
        "before it exceeds this; 0: no limit")
    add("--price-in", type=number(0), help="price of a million prompt tokens")
    add("--price-out", type=number(0), help="price of a million reply tokens")
    add("--dry-run", action="store_true",
        help="run the first two steps, then show counts, sample requests and the likely cost; send no request")


def add_selection_flags(p: Parser) -> None:
    add = p.add_argument
    add("--hamming", type=at_least(0, high=16), default=3,
        help="maximum distance between simhashes of near duplicates, in bits of 64")
    add("--min-category", type=at_least(1), default=10,
        help="minimum size of a secondary category, in instructions; smaller categories are dropped")
    add("--target", type=at_least(1), default=500_000, help="maximum number of instructions after balancing")
    add("--seed", type=int, default=0,
        help="random seed for balancing, sampled responses and the order in which the judge sees responses")


def add_score_flags(p: Parser) -> None:
    add = p.add_argument
    add("--weight-quality", type=number(0), default=0.6, help="weight of the quality grade in the composite score")
    add("--weight-safety", type=number(0), default=0.3, help="weight of the safety grade")
    add("--weight-perplexity", type=number(0), default=0.1,
        help="weight of the fluency score, which is below 1 if the perplexity is far above that of the other responses")
    add("--margin", type=number(0), default=0.25,
        help="minimum difference of composite scores for a KTO pair; above 1, only verification can form pairs")
    add("--min-safety", type=at_least(1, high=5), default=3,
        help="minimum safety grade of the best response, 1 to 5; below it the instruction gives no training example")
    add("--judge-orders", type=int, choices=(1, 2), default=2,
        help="2: judge a second time with the responses in reverse order, because a judge may prefer a position")
    add("--judge-verified", action="store_true",
        help="grade quality even if a program has checked every response; safety is always graded")
    add("--allow-code-execution", action="store_true", help="run the tests of code references, in a sandbox")


# fmt: on
def parse_args() -> argparse.Namespace:
    p = Parser(description=__doc__.split("\n\n")[0])
    add_data_flags(p)
    add_model_flags(p)
    add_endpoint_flags(p)
    add_selection_flags(p)
    add_score_flags(p)
    args = p.parse_args()
    if (args.price_in is None) != (args.price_out is None):
        raise InputError("--price-in and --price-out go together")
    if not args.weight_quality + args.weight_safety + args.weight_perplexity:
        raise InputError("--weight-quality, --weight-safety and --weight-perplexity: at least one must be above 0")
    args.out = args.out.rstrip("/") or "/"
    check_folder(args.out, "make_data.py", FILES)
    args.prices = (args.price_in, args.price_out) if args.price_in is not None else None
    return args


# ---------------------------------------------------------------------------------------------------------------------
# The run


def find_files(args: argparse.Namespace) -> None:
    """Replaces globs and hf:// names in the arguments by file paths."""
    for name in ("sources", "decontaminate", "recorded", "trust_references"):
        setattr(args, name, list(dict.fromkeys(expand(getattr(args, name)))))
    for path in args.trust_references:
        if not any(same_path(path, source) for source in args.sources):
            raise InputError(f"--trust-references {path}: is not one of the --sources; add it there too")


def open_models(args: argparse.Namespace) -> tuple[models.Teacher, local.LocalModel, local.LocalModel]:
    """-> (teacher, small model, scorer of perplexities)."""
    teacher = models.open_teacher(args.teacher, args.teacher_model, args.dtype)
    small = models.open_teacher(args.small, dtype=args.dtype)
    scorer = models.open_teacher(args.perplexity, dtype=args.dtype) if args.perplexity else small
    if isinstance(small, Endpoint) or isinstance(scorer, Endpoint):
        flag, value = ("--small", args.small) if isinstance(small, Endpoint) else ("--perplexity", args.perplexity)
        raise InputError(f"{flag} {value}: is an endpoint; give a local checkpoint, which can compute perplexities")
    return teacher, small, scorer


def pick_args(args: argparse.Namespace, *names: str) -> dict:
    """The named arguments as a dict."""
    return {name: getattr(args, name) for name in names}


def step_arguments(
    args: argparse.Namespace,
    teacher: models.Teacher,
    small: local.LocalModel,
    scorer: local.LocalModel,
    own: str | None,
) -> dict[str, dict]:
    """-> {step: the arguments that determine its result}. A step runs again if they change.

    own: "teacher" or "small" if the scorer is that model, else None."""
    teachers = {"teacher": teacher.identity}
    labels_and_trust = {
        "labels": sources.labels(args.sources),
        "trusted": [any(same_path(source, path) for path in args.trust_references) for source in args.sources],
    }
    sampling = pick_args(args, "samples", "temperature", "seed") if args.samples > 1 else {}
    weights = pick_args(args, "weight_quality", "weight_safety", "weight_perplexity")
    judging = pick_args(args, "judge_orders", "judge_verified", "allow_code_execution", "max_len", "seed")
    scoring = {"scorer": [scorer.identity, own], "prompt": [JUDGE, AGAIN_JUDGE]}
    arguments = {
        "1_collect": pick_args(args, "limit", "max_chars") | labels_and_trust,
        "2_dedup": pick_args(args, "hamming"),
        "3_classify": teachers,
        "4_balance": pick_args(args, "min_category", "target", "seed"),
        "5_respond": pick_args(args, "max_new_tokens") | sampling | teachers | {"small": small.identity},
        "6_score": weights | judging | teachers | scoring,
        "7_label": pick_args(args, "margin", "min_safety"),
    }
    code = code_hash("curation", "verification")
    return {name: {"code": code, **of_step} for name, of_step in arguments.items()}


def run_steps(
    args: argparse.Namespace,
    counts: dict[str, dict],
    log: ReplyLog,
    teacher: models.Teacher,
    small: local.LocalModel,
    scorer: local.LocalModel,
) -> None:
    """Runs the steps in order, with --dry-run only the first two. counts: {step: {}}, filled by the steps."""
    options = pick_args(args, "concurrency", "timeout", "retries", "batch_size")
    options |= pick_args(args, "requests_per_minute", "tokens_per_minute", "budget", "prices")
    grader = Asker(teacher, log, {"max_tokens": args.max_grade_tokens, **options})
    writer, small_writer = (Asker(m, log, {"max_tokens": args.max_new_tokens, **options}) for m in (teacher, small))
    own = {teacher.identity: "teacher", small.identity: "small"}.get(scorer.identity)
    if isinstance(teacher, Endpoint) and not args.dry_run and not log:
        grader.ask([GREETING], "greeting")  # fails at once if URL, model name or key is wrong
    state, arguments = load_state(args.out), step_arguments(args, teacher, small, scorer, own)
    collected, deduplicated, classified, balanced, answered, scored, _ = (f"{args.out}/{name}.jsonl" for name in STEPS)
    exams = args.decontaminate

    def run(name: str, inputs: list[str], lines: Iterable) -> None:
        counts[name] = write_step(args.out, state, name, inputs, arguments[name], lines, counts[name])

    run("1_collect", args.sources, steps.collect_sources(args, args.sources, counts["1_collect"]))
    run("2_dedup", [collected, *exams], steps.deduplicate(args, collected, exams, counts["2_dedup"]))
    if args.dry_run:
        return
    run("3_classify", [deduplicated], steps.classify(deduplicated, grader, counts["3_classify"]))
    run("4_balance", [classified], steps.balance(args, classified, counts["4_balance"]))
    lines = steps.respond(args, balanced, writer, small_writer, exams, counts["5_respond"])
    run("5_respond", [balanced, *args.recorded, *exams], lines)
    run("6_score", [answered], labels.score_responses(args, answered, grader, scorer, own, counts["6_score"]))
    run("7_label", [scored], labels.label_pairs(args, scored, counts["7_label"]))


def next_commands(small: str, out: str, pairs: int) -> list[str]:
    """The shell commands that train on the data, with flags only if they differ from the trainers' defaults."""
    ckpt = [] if small == SMALL else ["--ckpt", small]
    sft, kto = ([] if out == OUT else ["--data", f"{out}/{name}.jsonl"] for name in ("sft", "kto"))
    commands = [["python", "train_sft.py", *ckpt, *sft]]
    if pairs:
        commands.append(["python", "train_kto.py", "--ckpt", "sft.pt", *kto])
    return [shlex.join(words) for words in commands]


def make(args: argparse.Namespace) -> None:
    """The whole run. Only rank 0 calls it."""
    find_files(args)
    teacher, small, scorer = open_models(args)
    out, counts = args.out, {name: {} for name in STEPS}
    args.max_grade_tokens = max(128, 40 * (2 + args.samples))  # length of a reply with a category or grades
    with claimed_folder(out, "make_data.py", FILES), models.open_replies(f"{out}/replies.jsonl") as log:
        with contextlib.redirect_stdout(None) if args.quiet else contextlib.nullcontext():
            run_steps(args, counts, log, teacher, small, scorer)
        if args.dry_run:
            dedup = f"{out}/2_dedup.jsonl"
            return report.dry_run(args, dedup, args.max_grade_tokens, log.spent, len(log))
        report.write_report(out, counts)
    sft, kto = counts["7_label"]["sft"], counts["7_label"]["kto"]
    print(f"\n{sft:,} SFT examples, {kto // 2:,} KTO pairs.")
    if any(log.spent):
        cost = f", {price(log.spent, args.prices):,.2f} in all" if args.prices else ""
        print(f"The teacher's replies in {out}/replies.jsonl: {log.spent[0]:,} tokens in, {log.spent[1]:,} out{cost}.")
    print(f"Written: {out}/sft.jsonl, {out}/kto.jsonl, {out}/report.md. Next:")
    for command in next_commands(args.small, out, kto):
        print(f"  {command}")


def main() -> None:
    args = parse_args()
    if local.join_other_ranks() > 0:
        return local.serve_jobs()
    try:
        make(args)
    except BaseException:
        local.end_other_ranks(failed=True)
        raise
    local.end_other_ranks()


if __name__ == "__main__":
    cli(main)
