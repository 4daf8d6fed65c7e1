"""Asking a model: any OpenAI-compatible endpoint, or a local checkpoint. Every reply is kept on disk the moment it arrives.

    teacher = open_teacher("http://localhost:8000/v1", model_name="Qwen2.5-7B-Instruct")     # or a checkpoint
    with open_cache("out/replies.jsonl") as cache:
        replies = ask(teacher, prompts, cache, max_tokens=256)          # prompts: list of message lists

A reply is {"text", "finish_reason"}, or {"error"} for a request that the endpoint refused. A run that is killed and started
again asks only what was not answered yet: the cache is keyed by the model, the parameters and the messages.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import random
import time
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from tqdm import tqdm

from model import InputError

BACKOFF, BACKOFF_CAP = 1.0, 60.0  # seconds before the first retry, doubled each time up to the cap
FATAL = {401: "set TEACHER_API_KEY", 402: "the account has no credit", 403: "the key may not use this model",
         404: "look at the URL and --teacher-model"}  # fmt: skip
FIRST_TRIES = 3  # while nothing has ever answered, a teacher that drops connections is called unreachable after this many


@dataclass
class Teacher:
    """A model that can be asked. `name` is for people; `identity` is what the cache keys on."""

    name: str
    identity: str
    url: str | None = None  # None: a local checkpoint
    key: str | None = field(default=None, repr=False)  # never printed, never written
    checkpoint: object = None
    dtype: str = "fp32"
    loaded: tuple | None = None  # (model, tokenizer), once needed


def open_teacher(source, model_name=None, dtype="fp32"):
    """source: http(s) URL of an OpenAI-compatible endpoint (its base, .../v1), or a checkpoint (hub id, directory, .pt).

    The key comes from TEACHER_API_KEY or OPENAI_API_KEY. A local checkpoint is opened and fingerprinted here, and its
    weights are loaded when the first question is not in the cache."""
    if source.startswith(("http://", "https://")):
        parts = urlsplit(source)
        if not parts.hostname:
            raise InputError(f"{source}: this URL has no host; give one like http://localhost:8000/v1")
        if parts.username or parts.password or parts.query:
            raise InputError("the teacher's URL carries a password or a query; put the key into TEACHER_API_KEY instead")
        key = os.environ.get("TEACHER_API_KEY") or os.environ.get("OPENAI_API_KEY")
        # the identity leaves the URL out when the model has a name: the same model behind another port is the same model
        return Teacher(model_name or source, model_name or source, url=source, key=key)
    from model import Checkpoint

    checkpoint = Checkpoint(source)
    name = model_name or os.path.basename(os.path.normpath(source))
    return Teacher(name, f"{checkpoint.fingerprint()} {dtype}", checkpoint=checkpoint, dtype=dtype)


def load(teacher):
    """The (model, tokenizer) of a local checkpoint, on the GPU when there is one."""
    if teacher.loaded is None:
        import torch

        from chat import Tokenizer
        from model import Qwen2

        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[teacher.dtype]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        m = Qwen2.from_pretrained(teacher.checkpoint, dtype=dtype, device=device).eval()
        teacher.loaded = (m, Tokenizer(teacher.checkpoint))
    return teacher.loaded


# ---------------------------------------------------------------------------------------------------------------------
# The cache: append-only JSON Lines, one object a reply


@dataclass
class Cache:
    file: object  # unbuffered, so that a reply is out of this process as soon as it is written
    offsets: dict  # SHA-256 digest -> where its line starts: the texts stay on disk


@contextlib.contextmanager
def open_cache(path):
    """Opens (or starts) the cache for reading and appending. A last line torn by a kill is cut off; a damaged line
    before it raises InputError, and so does a second process that opens the same cache."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{path}: another run is using this folder; wait for it or choose another --out") from None
        offsets, at = {}, 0
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    file.truncate(at)
                    break
                try:
                    reply = json.loads(line)
                    offsets[bytes.fromhex(reply["key"])] = at
                    reply["text"], reply["finish_reason"]
                except (ValueError, KeyError, TypeError):
                    raise InputError(f"{path}:{number}: not a cached reply; delete this line to ask it again") from None
                at += len(line)
        yield Cache(file, offsets)


def cache_key(teacher, messages, parameters):
    """SHA-256 over model, parameters and messages, as bytes."""
    request = json.dumps([teacher.identity, parameters, messages], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(request.encode("utf-8", "surrogatepass")).digest()


def cache_read(cache, key):
    with open(cache.file.name, "rb") as file:
        file.seek(cache.offsets[key])
        reply = json.loads(file.readline())
    return {"text": reply["text"], "finish_reason": reply["finish_reason"]}


def cache_write(cache, key, teacher, text, finish_reason):
    line = {"key": key.hex(), "model": teacher.name, "text": text, "finish_reason": finish_reason}
    at = os.fstat(cache.file.fileno()).st_size
    cache.file.write(json.dumps(line).encode() + b"\n")  # ASCII: a torn write cannot split a character
    cache.offsets[key] = at


# ---------------------------------------------------------------------------------------------------------------------
# Asking


def ask(teacher, prompts, cache, max_tokens=256, temperature=0.0, top_p=1.0, seed=0, concurrency=16, timeout=120.0,
        retries=8, batch_size=32, desc="asking"):  # fmt: skip
    """prompts: list of message lists -> list of replies in the same order, each {"text", "finish_reason"} or {"error"}.

    Equal prompts are asked once. finish_reason is "stop" or, for a reply cut off at max_tokens, "length". A teacher that
    cannot be reached, or refuses the key, raises InputError after the replies that did come are safe in the cache;
    a single request refused with another 4xx status gets {"error"} and is not cached. timeout: seconds per request."""
    parameters = {"max_tokens": max_tokens, "temperature": temperature}
    if temperature > 0:
        parameters |= {"top_p": top_p, "seed": seed}
    keys = [cache_key(teacher, messages, parameters) for messages in prompts]
    todo = {key: messages for key, messages in zip(keys, prompts) if key not in cache.offsets}
    errors = {}
    if todo:
        with tqdm(total=len(todo), desc=desc, unit="reply", disable=None) as bar:
            if teacher.url:
                http = ask_http(teacher, todo, cache, errors, parameters, concurrency, timeout, retries, bar)
                asyncio.run(http)
            else:
                ask_local(teacher, todo, cache, errors, parameters, batch_size, bar)
    return [{"error": errors[key]} if key in errors else cache_read(cache, key) for key in keys]


def ask_local(teacher, todo, cache, errors, parameters, batch_size, bar):
    """One call for all prompts: generate_iter sorts them into batches and computes a prefix they share only once."""
    from generate import generate_iter

    m, tokenizer = load(teacher)
    room = m.config.max_position_embeddings - parameters["max_tokens"]
    fits = []
    for key, messages in todo.items():
        n = len(tokenizer.prompt_ids(messages))
        if n <= room:
            fits.append(key)
        else:
            errors[key] = f"a prompt of {n} tokens leaves no room for the reply"
            bar.update()
    sampling = {"temperature": parameters["temperature"], "top_p": parameters.get("top_p", 1.0),
                "seed": parameters.get("seed", 0)}  # fmt: skip
    replies = generate_iter(m, tokenizer, [todo[key] for key in fits], max_new_tokens=parameters["max_tokens"],
                            batch_size=batch_size, **sampling)  # fmt: skip
    for i, text, finish_reason in replies:
        cache_write(cache, fits[i], teacher, text, finish_reason)
        bar.update()


async def ask_http(teacher, todo, cache, errors, parameters, concurrency, timeout, retries, bar):
    """`concurrency` workers take requests from one queue. What ends the run (an unreachable teacher, a refused key) lets
    the requests in flight finish first: their replies may have cost money."""
    from huggingface_hub import AsyncInferenceClient

    # without a key of ours, the client would send the user's own Hugging Face token to a foreign endpoint
    headers = {} if teacher.key else {"authorization": None}
    client = AsyncInferenceClient(base_url=teacher.url, api_key=teacher.key, headers=headers, timeout=timeout)
    model = None if teacher.name == teacher.url else teacher.name
    queue, stop = iter(todo.items()), asyncio.Event()
    fatal, answered_at = [], [0.0]  # why the run ends; when the endpoint last answered a request

    def end(why):
        fatal.append(why)
        stop.set()

    async def worker():
        for key, messages in queue:
            tries, started = 0, time.monotonic()
            while not stop.is_set():
                try:
                    output = await client.chat_completion(messages, model=model, **parameters)
                    choice = output.choices[0]
                    text, finish_reason = choice.message.content or "", choice.finish_reason or "stop"
                    if not isinstance(text, str):
                        raise ValueError("the content of the reply is no text")
                except Exception as e:  # the client's HTTP library, and so its exceptions, changed between releases
                    tries += 1
                    status, wait, what = read_failure(e, teacher)
                    if status in FATAL:
                        end(f"{what}; {FATAL[status]}")
                    elif status is not None and 400 <= status < 500 and status not in (408, 409, 425, 429):
                        errors[key] = what
                        bar.update()
                        break
                    elif tries > retries or (status is None and not answered_at[0] and tries >= FIRST_TRIES):
                        if answered_at[0] > started:  # others were answered meanwhile: it is this request, not the teacher
                            errors[key] = f"no answer after {tries} tries: {what}"
                            bar.update()
                            break
                        end(f"no answer after {tries} tries (last: {what}); see that it is running")
                    else:
                        backoff = min(BACKOFF_CAP, BACKOFF * 2 ** (tries - 1)) * random.uniform(0.5, 1.0)
                        with contextlib.suppress(asyncio.TimeoutError):
                            await asyncio.wait_for(stop.wait(), max(wait, backoff))
                else:
                    answered_at[0] = time.monotonic()
                    cache_write(cache, key, teacher, text, "length" if finish_reason == "length" else "stop")
                    bar.update()
                    break
            if stop.is_set():
                return

    try:
        await asyncio.gather(*[worker() for _ in range(min(concurrency, len(todo)))])
    finally:
        with contextlib.suppress(Exception):
            await client.close()
    if not fatal and len(errors) == len(todo) and not cache.offsets:
        fatal.append(f"it refused every request: {next(iter(errors.values()))}")
    if fatal:
        raise InputError(f"the teacher at {teacher.url}: {fatal[0]}. Every reply so far is kept: run the same command to go on")


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
