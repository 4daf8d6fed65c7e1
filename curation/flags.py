"""The flags of make_data.py, as a table. Does not import torch, as in core/flags.py."""

import argparse

from core.files import InputError
from core.flags import Parser, add_device_flags, at_least, number, out_path
from core.outputs import check_folder
from curation.step_files import FILES, WRITERS

ABOUT = "Makes alignment data from open instructions with the help of a large model: sft.jsonl and kto.jsonl."
OUT, SMALL = "data", "Qwen/Qwen2-0.5B-Instruct"  # the defaults of train_sft.py and train_kto.py


def add_data_flags(p: Parser) -> None:
    add = p.add_argument_group("data").add_argument
    add(
        "--sources",
        nargs="+",
        required=True,
        metavar="F",
        help="files of instructions: JSON Lines, JSON arrays or Parquet, plain or .gz; globs; "
        "hf://datasets/OWNER/NAME[@REVISION]/FILE",
    )
    add(
        "--trust-references",
        nargs="+",
        default=[],
        metavar="F",
        help="the --sources whose references may verify responses: a key `reference`, GSM8K's `#### 72`, AQuA's "
        "options, IFEval's instruction_id_list, MBPP's test_list. References in other files are ignored, because anybody "
        "can write them",
    )
    add(
        "--decontaminate",
        nargs="+",
        default=[],
        metavar="F",
        help="evaluation files; prompts and responses that contain one of their questions are dropped",
    )
    add("--out", type=out_path, default=OUT, help="folder for all files of the run")
    add("--quiet", action="store_true", help="print only the closing summary, not what each step keeps and drops")
    add(
        "--limit",
        type=at_least(0),
        default=0,
        help="maximum number of instructions per source, from its beginning; 0: all",
    )
    add(
        "--max-chars",
        type=at_least(1),
        default=20_000,
        help="maximum length of prompt and response together, in characters; longer records are dropped",
    )


def add_model_flags(p: Parser) -> None:
    add = p.add_argument_group("models").add_argument
    add(
        "--teacher",
        required=True,
        help="URL of an OpenAI-compatible endpoint (.../v1), or a checkpoint. The endpoint receives the key in "
        "TEACHER_API_KEY. The key in OPENAI_API_KEY is sent only to https://api.openai.com",
    )
    add("--teacher-model", help="the model's name at the endpoint")
    add(
        "--thought-tokens",
        type=at_least(0),
        default=0,
        help="for a teacher that thinks before it answers: maximum length of a thought, in tokens, on top of the answer's "
        "own limit. Thoughts are removed from all replies",
    )
    add("--small", required=True, help="checkpoint of the small model, which writes responses too")
    add(
        "--samples",
        type=at_least(1, high=16),
        default=1,
        help="number of responses by the small model, 1 to 16; the first is greedy, the others are sampled",
    )
    add("--temperature", type=number(above=0), default=0.8, help="sampling temperature of the small model, above 0")
    add(
        "--recorded",
        nargs="+",
        default=[],
        metavar="F",
        help='files of responses to use instead of asking a model: records of any shape of --sources, with "writer": '
        '"teacher" (the default) or "small"',
    )
    add("--perplexity", metavar="C", help="checkpoint that computes perplexities (default: the small model)")
    add(
        "--max-new-tokens",
        type=at_least(1),
        default=512,
        help="maximum length of a response, in tokens; longer responses are left out",
    )
    add(
        "--max-len",
        type=at_least(1),
        default=2048,
        help="maximum length of prompt and response for a perplexity, in tokens; the rest is cut off",
    )
    add("--batch-size", type=at_least(1), default=32, help="batch size of local checkpoints, in sequences")
    add("--micro-tokens", type=at_least(1), default=8192, help="size of one forward pass for perplexities, in tokens")


def add_endpoint_flags(p: Parser) -> None:
    add = p.add_argument_group("endpoint").add_argument
    add("--concurrency", type=at_least(1), default=16, help="maximum number of requests in flight")
    add("--timeout", type=number(above=0), default=120.0, help="time limit of one whole reply, in seconds")
    add(
        "--retries",
        type=at_least(0),
        default=8,
        help="maximum number of retries of a failed request, with growing pauses. A request that fails every time is "
        "set aside and listed in the report",
    )
    add("--requests-per-minute", type=number(0), default=0, help="maximum rate of requests, per minute; 0: no limit")
    add(
        "--tokens-per-minute",
        type=number(0),
        default=0,
        help="maximum rate of prompt and reply tokens, per minute; 0: no limit",
    )
    add(
        "--budget",
        type=number(0),
        default=0,
        help="maximum cost of all replies in --out, in tokens, or in currency if prices are given. The run stops "
        "before it exceeds this; 0: no limit",
    )
    add("--price-in", type=number(0), help="price of a million prompt tokens")
    add("--price-out", type=number(0), help="price of a million reply tokens")
    add(
        "--dry-run",
        action="store_true",
        help="run the first two steps, then print counts, sample requests and the likely cost; send no request",
    )


def add_selection_flags(p: Parser) -> None:
    add = p.add_argument_group("selection").add_argument
    add(
        "--hamming",
        type=at_least(0, high=16),
        default=3,
        help="maximum distance between simhashes of near duplicates, in bits of 64",
    )
    add(
        "--min-category",
        type=at_least(1),
        default=10,
        help="minimum size of a secondary category, in instructions; smaller categories are dropped",
    )
    add("--target", type=at_least(1), default=500_000, help="maximum number of instructions after balancing")
    add(
        "--seed",
        type=int,
        default=0,
        help="random seed for balancing, sampled responses and the order in which the judge sees responses",
    )


def add_score_flags(p: Parser) -> None:
    add = p.add_argument_group("scores and labels").add_argument
    add("--weight-quality", type=number(0), default=0.6, help="weight of the quality grade in the composite score")
    add("--weight-safety", type=number(0), default=0.3, help="weight of the safety grade")
    add(
        "--weight-perplexity",
        type=number(0),
        default=0.1,
        help="weight of the fluency score, which is below 1 if the perplexity is far above that of the other responses",
    )
    add(
        "--margin",
        type=number(0),
        default=0.25,
        help="minimum difference of composite scores for a KTO pair; above 1, only verification can form pairs",
    )
    add(
        "--min-safety",
        type=at_least(1, high=5),
        default=3,
        help="minimum safety grade of the best response, 1 to 5; below it the instruction gives no training example",
    )
    add(
        "--writers",
        nargs="+",
        choices=WRITERS,
        default=list(WRITERS),
        help="writers whose responses become examples; at equal scores the first one's response is the best; "
        "if the original responses are right but short, `small teacher` works better, see docs/REPORT.md, section 8 "
        "(default: original teacher small)",
    )
    add(
        "--judge-orders",
        type=int,
        choices=(1, 2),
        default=2,
        help="2: judge a second time with the responses in reverse order, because a judge may prefer a position",
    )
    add(
        "--judge-verified",
        action="store_true",
        help="grade quality even if a program has checked every response; safety is always graded",
    )
    add("--allow-code-execution", action="store_true", help="run the tests of code references, in a sandbox")


def parse_args() -> argparse.Namespace:
    """Parses make_data.py's arguments."""
    p = Parser(description=ABOUT)
    add_data_flags(p)
    add_model_flags(p)
    add_endpoint_flags(p)
    add_selection_flags(p)
    add_score_flags(p)
    add_device_flags(p.add_argument_group("machine"), "dtype of local checkpoints")
    args = p.parse_args()
    if (args.price_in is None) != (args.price_out is None):
        raise InputError("--price-in and --price-out go together")
    if not args.weight_quality + args.weight_safety + args.weight_perplexity:
        raise InputError("--weight-quality, --weight-safety and --weight-perplexity: at least one must be above 0")
    check_folder(args.out, "make_data.py", FILES)
    args.prices = (args.price_in, args.price_out) if args.price_in is not None else None
    return args
