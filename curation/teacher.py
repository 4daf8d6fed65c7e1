"""Asking a model: any OpenAI-compatible endpoint, or a local checkpoint. Every reply is kept on disk the moment it arrives.

    teacher = open_teacher("http://localhost:8000/v1", model_name="Qwen2.5-7B-Instruct")     # or a checkpoint
    with open_replies("out/replies.jsonl") as log:
        replies = ask(teacher, prompts, log, max_tokens=256)          # prompts: list of message lists

A reply is {"text", "finish_reason"}, or {"error"} for a request that the endpoint refused. A run that is killed and started
again asks only what was not answered yet: the log is keyed by the model, the parameters and the messages. An endpoint's
rates and a budget are kept to; under torchrun a local checkpoint answers on all ranks.
"""

import asyncio
import contextlib
import hashlib
import json
import math
import os
import random
import time
from collections import defaultdict
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import torch.distributed as dist
from tqdm import tqdm

from core.checkpoint import Checkpoint
from core.distributed import join_group, leave_group, own_device
from core.files import InputError
from core.flags import DEVICE, DTYPES
from core.reply_log import ReplyLog
from core.tokenizer import Tokenizer
from generate import generate_iter
from model import Qwen2
from training.logps import sequence_logps

BACKOFF, BACKOFF_CAP = 1.0, 60.0  # seconds before the first retry, doubled each time up to the cap
FATAL = {401: "set TEACHER_API_KEY", 402: "the account has no credit", 403: "the key may not use this model",
         404: "look at the URL and --teacher-model"}  # fmt: skip
BLOCK = 256  # prompts that each rank answers at a time
FIRST_TRIES = (
    3  # while nothing has ever answered, a teacher that drops connections is called unreachable after this many
)


@dataclass
class Teacher:
    """A model that can be asked. `name` is for people; `identity` is what the log's keys depend on."""

    name: str
    identity: str
    url: str | None = None  # None: a local checkpoint
    key: str | None = field(default=None, repr=False)  # never printed, never written
    source: str | None = None
    checkpoint: object = None
    dtype: str = "fp32"
    loaded: tuple | None = None  # (model, tokenizer), once needed


def open_teacher(source, model_name=None, dtype="fp32"):
    """source: http(s) URL of an OpenAI-compatible endpoint (its base, .../v1), or a checkpoint (hub id, directory, .pt).

    The key comes from TEACHER_API_KEY or OPENAI_API_KEY. A local checkpoint is opened and fingerprinted here, and its
    weights are loaded when the first question is not in the log."""
    if source.startswith(("http://", "https://")):
        parts = urlsplit(source)
        if not parts.hostname:
            raise InputError(f"{source}: this URL has no host; give one like http://localhost:8000/v1")
        if parts.username or parts.password or parts.query:
            raise InputError(
                "the teacher's URL carries a password or a query; put the key into TEACHER_API_KEY instead"
            )
        key = (os.environ.get("TEACHER_API_KEY") or os.environ.get("OPENAI_API_KEY") or "").strip() or None
        if key and not (key.isascii() and key.isprintable()):  # the HTTP library would quote it in its complaint
            raise InputError(
                "the key in TEACHER_API_KEY or OPENAI_API_KEY holds a character that no key has; set it anew"
            )
        # the identity leaves the URL out when the model has a name: the same model behind another port is the same model
        return Teacher(model_name or source, model_name or source, url=source, key=key)
    checkpoint = Checkpoint(source)
    name = model_name or os.path.basename(os.path.normpath(source))
    return Teacher(name, f"{checkpoint.fingerprint()} {dtype}", source=source, checkpoint=checkpoint, dtype=dtype)


def load(teacher):
    """The (model, tokenizer) of a local checkpoint, on this rank's GPU when there is one."""
    if teacher.loaded is None:
        device = own_device(DEVICE)
        m = Qwen2.from_pretrained(teacher.checkpoint, DTYPES[teacher.dtype], device).eval()
        teacher.loaded = (m, Tokenizer(teacher.checkpoint))
    return teacher.loaded


def open_replies(path: str) -> ReplyLog:
    """The log of a teacher's replies."""
    return ReplyLog(path, {"text": str, "finish_reason": str})


def reply_key(teacher, messages, parameters):
    """SHA-256 over model, parameters and messages, in hexadecimal."""
    request = json.dumps([teacher.identity, parameters, messages], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(request.encode("utf-8", "surrogatepass")).hexdigest()


def read_reply(record):
    return {"text": record["text"], "finish_reason": record["finish_reason"]}


def keep_reply(log, key, teacher, text, finish_reason, usage=None):
    record = {"model": teacher.name, "text": text, "finish_reason": finish_reason}
    log.append(key, record | ({"usage": usage} if usage else {}))


# ---------------------------------------------------------------------------------------------------------------------
# Asking


def tokens_of(text):
    """A cautious guess at a text's tokens, before an endpoint has counted them: one for every three bytes of UTF-8. English
    has about four bytes a token, Chinese four to five."""
    return len(text.encode("utf-8", "replace")) // 3 + 1


def request_tokens(messages):
    return sum(tokens_of(m["content"]) + 4 for m in messages)  # 4: the role and the marks around a message


def price(tokens, prices):
    """tokens: (of prompts, of replies). prices: currency per million of either -> currency; None -> the tokens' number."""
    return sum(n * p for n, p in zip(tokens, prices)) / 1e6 if prices else sum(tokens)


def ask(
    teacher, prompts, log, max_tokens=256, temperature=0.0, top_p=1.0, seed=0, batch_size=32, desc="asking", **http
):
    """prompts: list of message lists -> list of replies in the same order, each {"text", "finish_reason"} or {"error"}.

    Equal prompts are asked once. finish_reason: "stop"; "length" for a reply cut off at max_tokens; "content_filter" for one
    that the endpoint held back. A teacher that cannot be reached, or refuses the key, or would cost more than the budget,
    raises InputError after the replies that did come are safe in the log, and so does, once all others are answered, a request
    that got none: what passes costs no record. One refused with another 4xx status gets {"error"} and is not kept. http: the
    last arguments of ask_http."""
    parameters = {"max_tokens": max_tokens, "temperature": temperature}
    if temperature > 0:
        parameters |= {"top_p": top_p, "seed": seed}
    keys = [reply_key(teacher, messages, parameters) for messages in prompts]
    todo = {key: messages for key, messages in zip(keys, prompts) if key not in log}
    errors = {}
    if todo:
        with tqdm(total=len(todo), desc=desc, unit="reply", disable=None) as bar:
            if teacher.url:
                asyncio.run(ask_http(teacher, todo, log, errors, parameters, bar, **http))
            else:
                ask_local(teacher, todo, log, errors, parameters, batch_size, bar)
    return [{"error": errors[key]} if key in errors else read_reply(log[key]) for key in keys]


@contextlib.asynccontextmanager
async def open_client(teacher, timeout):
    from huggingface_hub import AsyncInferenceClient, constants

    offline, constants.HF_HUB_OFFLINE = (
        constants.HF_HUB_OFFLINE,
        False,
    )  # it is about the hub, not about an endpoint of ours
    # without a key of ours, the client would send the user's own Hugging Face token to a foreign endpoint
    headers = {} if teacher.key else {"authorization": None}
    client = AsyncInferenceClient(base_url=teacher.url, api_key=teacher.key, headers=headers, timeout=timeout)
    try:
        yield client
    finally:
        constants.HF_HUB_OFFLINE = offline
        with contextlib.suppress(Exception):
            await client.close()


class Limits:
    """An endpoint's rates and the budget; 0 is no limit. A size: tokens [of a prompt, of its reply].

    Requests are spaced evenly, retries included; tokens are counted as guessed before, as charged after. budget: of everything
    the log has cost, in price()'s unit."""

    def __init__(self, log, requests_per_minute=0, tokens_per_minute=0, budget=0, prices=None):
        self.log, self.budget, self.prices = log, budget, prices
        self.requests_per_minute, self.tokens_per_minute = requests_per_minute, tokens_per_minute
        self.next_request = self.next_token = 0.0  # when another one may go
        self.held = [0, 0]  # tokens that the requests in flight may cost

    def spent(self):
        return price(self.log.spent, self.prices)

    def affords(self, size):
        """Whether the longest reply to one more request, and to all in flight, would stay within the budget."""
        return not self.budget or price(map(sum, zip(self.log.spent, self.held, size)), self.prices) <= self.budget

    def hold(self, size):
        self.held = [a + b for a, b in zip(self.held, size)]

    def let_go(self, size):
        self.held = [a - b for a, b in zip(self.held, size)]

    def wait(self, size):
        """The seconds until one more request may go; what comes after it waits for it."""
        now = time.monotonic()
        start = max(now, self.next_request, self.next_token)
        if self.requests_per_minute:
            self.next_request = start + 60 / self.requests_per_minute
        if self.tokens_per_minute:
            self.next_token = start + 60 * sum(size) / self.tokens_per_minute
        return start - now

    def charge(self, size, used):
        """What a request of that size has used in truth."""
        if self.tokens_per_minute:
            self.next_token += 60 * (sum(used) - sum(size)) / self.tokens_per_minute


async def ask_http(teacher, todo, log, errors, parameters, bar, concurrency=16, timeout=120.0, retries=8, **bounds):
    """`concurrency` workers take requests from one queue. What ends the run (an unreachable teacher, a refused key, an empty
    purse) lets the requests in flight finish first: their replies may have cost money.

    timeout: seconds per request. bounds: the arguments of Limits."""
    model = None if teacher.name == teacher.url else teacher.name
    queue, stop = iter(todo.items()), asyncio.Event()
    fatal, unanswered, answered_at = (
        [],
        [],
        [0.0],
    )  # why the run ends; the last failures; when the endpoint last answered
    limits = Limits(log, **bounds)
    before, digits = limits.spent(), 2 if limits.prices else 0

    def end(why):
        fatal.append(why)
        stop.set()

    async def pause(seconds):
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(stop.wait(), seconds)

    async def afford(size):
        while not stop.is_set() and not limits.affords(size):
            if not any(limits.held):  # nothing in flight that could turn out cheaper
                end(
                    f"the budget of {limits.budget:,g} is used up ({limits.spent():,.6g} spent); raise --budget to go on"
                )
            await pause(0.02)
        limits.hold(size)

    def show():
        spent = limits.spent()
        at_end = before + (spent - before) * bar.total / max(bar.n, 1)
        bar.set_postfix_str(f"{spent:,.{digits}f}, about {at_end:,.{digits}f} at its end", refresh=False)

    async def request(key, messages, size):
        tries, started = 0, time.monotonic()
        while not stop.is_set():
            if (seconds := limits.wait(size)) > 0:
                await pause(seconds)
            if stop.is_set():
                return
            try:
                output = await client.chat_completion(messages, model=model, **parameters)
                text, finish_reason, used = read_output(output, messages)
            except Exception as e:  # the client's HTTP library, and so its exceptions, changed between releases
                tries += 1
                status, wait, what = read_failure(e, teacher)
                if status in FATAL:
                    end(f"{what}; {FATAL[status]}")
                elif status is not None and 400 <= status < 500 and status not in (408, 409, 425, 429):
                    errors[key] = what
                    return
                elif tries > retries or (status is None and not answered_at[0] and tries >= FIRST_TRIES):
                    if answered_at[0] > started:  # others were answered meanwhile: it is this request, not the teacher
                        unanswered.append(what)
                        return
                    end(
                        f"no answer after {tries} tries (last: {what}); see that it is running, and that the URL is that of its chat API"
                    )
                else:
                    backoff = min(BACKOFF_CAP, BACKOFF * 2 ** (tries - 1)) * random.uniform(0.5, 1.0)
                    await pause(max(wait, backoff))
            else:
                answered_at[0] = time.monotonic()
                limits.charge(size, used)
                keep_reply(log, key, teacher, text, finish_reason, used)
                return

    async def worker():
        for key, messages in queue:
            size = [request_tokens(messages), parameters["max_tokens"]]
            await afford(size)
            await request(key, messages, size)
            limits.let_go(size)
            if stop.is_set():
                return
            bar.update()
            show()

    async with open_client(teacher, timeout) as client:
        await asyncio.gather(*[worker() for _ in range(min(concurrency, len(todo)))])
    if unanswered and not fatal:
        n = len(unanswered)
        fatal.append(f"{n:,} request{'s' * (n > 1)} got no answer after {retries + 1} tries (last: {unanswered[-1]})")
    if not fatal and len(errors) == len(todo) and not log:
        fatal.append(f"it refused every request: {next(iter(errors.values()))}")
    if fatal:
        raise InputError(
            f"the teacher at {teacher.url}: {fatal[0]}. Every reply so far is kept: run the same command to go on"
        )


def read_output(output, messages):
    """A chat completion -> (text, finish_reason, tokens [of the prompt, of the reply]), guessed where it gives no usage."""
    choice = output.choices[0]
    text, finish_reason = choice.message.content or "", choice.finish_reason
    if not isinstance(text, str):
        raise ValueError("the content of the reply is no text")
    text = text.encode("utf-8", "replace").decode()  # JSON may hold half a surrogate pair, files may not
    if getattr(choice.message, "refusal", None):
        finish_reason = "content_filter"
    usage = getattr(output, "usage", None)
    used = [getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None)]
    if not all(type(n) is int and n >= 0 for n in used):
        used = [request_tokens(messages), tokens_of(text)]
    return text, finish_reason if finish_reason in ("length", "content_filter") else "stop", used


def read_failure(e, teacher):
    """An exception of the client -> (HTTP status or None, seconds to wait that the server asked for, one line of text)."""
    response = getattr(e, "response", None)
    status = getattr(response, "status_code", None)
    wait, what = 0.0, f"{type(e).__name__}: {e}"
    if status is not None:
        with contextlib.suppress(Exception):  # a body that was never read raises
            what = response.text
        what = f"HTTP {status} {what}"
        asked = response.headers.get("retry-after")
        if asked:
            with contextlib.suppress(ValueError, TypeError):
                wait = float(asked) if asked.strip().replace(".", "", 1).isdigit() \
                    else parsedate_to_datetime(asked).timestamp() - time.time()  # fmt: skip
    what = " ".join(what.split())
    if teacher.key:
        what = what.replace(teacher.key, "[key]")
    return status, max(0.0, wait), what[:200]


# ---------------------------------------------------------------------------------------------------------------------
# A local checkpoint, on one device or on all ranks of torchrun: rank 0 runs the steps, the others do what it sends them


def ask_local(teacher, todo, log, errors, parameters, batch_size, bar):
    """One call for all prompts: generate_iter sorts them into batches and computes a prefix they share only once. On several
    ranks BLOCK prompts at a time are dealt to each. A sampled reply's random numbers come of its key, so that neither what was
    answered before a restart nor the number of ranks changes it."""
    m, tokenizer = load(teacher)
    room = m.config.max_position_embeddings - parameters["max_tokens"]
    fits, world = [], world_size()
    for key, messages in todo.items():
        n = len(tokenizer.prompt_ids(messages))
        if n <= room:
            fits.append(key)
        else:
            errors[key] = f"a prompt of {n} tokens leaves no room for the reply"
            bar.update()

    def question(keys):
        return [todo[key] for key in keys], [int(key[:14], 16) for key in keys], parameters, batch_size

    size = BLOCK if world > 1 else max(len(fits), 1)
    blocks = [fits[i : i + size] for i in range(0, len(fits), size)]
    for at in range(0, len(blocks), world):
        some = blocks[at : at + world]
        for keys, replies in zip(some, on_ranks(replies_of, teacher, map(question, some))):
            for i, text, finish_reason in replies:
                keep_reply(log, keys[i], teacher, text, finish_reason)
                bar.update()


def replies_of(teacher, prompts, seeds, parameters, batch_size):
    """Yields (index, text, finish_reason)."""
    sampling = {"temperature": parameters["temperature"], "top_p": parameters.get("top_p", 1.0), "seed": seeds}
    yield from generate_iter(
        *load(teacher), prompts, max_new_tokens=parameters["max_tokens"], batch_size=batch_size, **sampling
    )


def perplexities(scorer, pairs, max_len, micro_tokens):
    """pairs: [(prompt, response text)] -> exp(-mean log p) of each response's tokens under the scorer, its <|im_end|> and
    newline included; None for a prompt that fills max_len tokens alone. Dealt to all ranks, the responses to one prompt
    together, for they share its computation."""
    together = defaultdict(list)  # {prompt: indices}
    for i, (prompt, _) in enumerate(pairs):
        together[json.dumps(prompt)].append(i)
    longest_first = sorted(together.values(), key=lambda indices: -sum(len(pairs[i][1]) for i in indices))
    hands = [[i for indices in longest_first[rank :: world_size()] for i in indices] for rank in range(world_size())]
    hands = [hand for hand in hands if hand]
    shares = [([pairs[i] for i in hand], max_len, micro_tokens) for hand in hands]
    out = [None] * len(pairs)
    for hand, values in zip(hands, on_ranks(perplexities_of, scorer, shares)):
        for i, value in zip(hand, values):
            out[i] = value
    return out


def perplexities_of(scorer, pairs, max_len, micro_tokens):
    m, tokenizer = load(scorer)
    examples = []
    for prompt, text in pairs:
        context, reply = tokenizer.prompt_ids(prompt), tokenizer.completion_ids(text)
        examples.append(((context + reply)[:max_len], ([False] * len(context) + [True] * len(reply))[:max_len]))
    n = [sum(supervised) for _, supervised in examples]
    some = [i for i in range(len(pairs)) if n[i]]
    out = [None] * len(pairs)
    if some:
        for i, logp in zip(some, sequence_logps(m, [examples[i] for i in some], micro_tokens).tolist()):
            out[i] = round(math.exp(min(-logp / n[i], 50.0)), 4)
    return out


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def join_ranks():
    """Under torchrun, joins the others. -> this process's rank."""
    rank, _ = join_group(
        hours=30 * 24
    )  # rank 0 may ask an endpoint, or score, for days before the others are needed again
    return rank


def send(jobs):
    """Rank 0 sends a job to each rank: () is none for now, None is the end. The others give None as jobs. -> one's own job."""
    mine = [None]
    dist.scatter_object_list(mine, jobs, src=0)
    return mine[0]


def gather(replies):
    """Every rank's replies -> on rank 0 a list of them, one a rank."""
    out = [None] * world_size() if dist.get_rank() == 0 else None
    dist.gather_object(replies, out, dst=0)
    return out


def on_ranks(work, teacher, shares):
    """Yields work(teacher, *share), an iterable, for each share. There are no more shares than ranks: rank 0 does the first, as
    it is consumed, while the other ranks do theirs. work: a function of this module, which the ranks know by its name."""
    first, *others = shares
    if others:
        jobs = [(work, teacher.source, teacher.dtype, share) for share in others]
        send([None, *jobs] + [()] * (world_size() - 1 - len(jobs)))
    yield work(teacher, *first)
    if others:
        yield from gather([])[1:]


def serve_rank():
    """What a rank above 0 does: the jobs that rank 0 sends, until the last."""
    opened = {}

    def or_leave(collective, *arguments):
        try:
            return collective(*arguments)
        except RuntimeError:  # rank 0 is gone, and has said why; an orderly end would wait for it
            os._exit(1)

    while (job := or_leave(send, None)) is not None:
        results = []
        if job:
            work, source, dtype, share = job
            if (source, dtype) not in opened:
                opened[source, dtype] = open_teacher(source, dtype=dtype)
            results = list(work(opened[source, dtype], *share))
        or_leave(gather, results)
    or_leave(leave_group)


def leave_ranks(failed=False):
    """Rank 0's last call: it ends the others. failed: it goes without a word, and they notice."""
    if world_size() > 1 and not failed:
        send([None] * world_size())
    leave_group(failed)
