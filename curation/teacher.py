"""Asks a teacher: an OpenAI-compatible endpoint or a local checkpoint. Every reply is written to disk at once.

    teacher = open_teacher("http://localhost:8000/v1", model_name="Qwen2.5-7B-Instruct")     # or a checkpoint
    with open_replies("out/replies.jsonl") as log:
        replies = ask_model(teacher, prompts, log, max_tokens=256)          # prompts: list of message lists

A run that was killed and is started again requests only the replies that are missing.
"""

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from core.devices import DEVICE
from core.progress import ReplyBar
from core.reply_log import ReplyLog
from curation.endpoint import Endpoint, looks_like_url, open_endpoint
from curation.local import LocalModel, ask_local, open_local
from curation.prompts import CUT_OFF, GREETING, UNANSWERED, UNPARSED, clip, escape_control_tokens
from curation.workers import ask_endpoint
from verification.thoughts import without_thought

Teacher = Endpoint | LocalModel


def open_teacher(source: str, model_name: str | None = None, dtype: str = "fp32", device: str = DEVICE) -> Teacher:
    """source: http(s) URL of an OpenAI-compatible endpoint (.../v1), or a checkpoint (hub id, folder, .pt).

    dtype, device: of a local checkpoint; dtype is a key of DTYPES. An endpoint's key is in TEACHER_API_KEY, or for
    https://api.openai.com in OPENAI_API_KEY. InputError for a bad URL or checkpoint. Makes no connection yet.
    """
    if looks_like_url(source):
        return open_endpoint(source, model_name)
    return open_local(source, model_name, dtype, device)


def open_replies(path: str) -> ReplyLog:
    """Opens the log of all teachers' replies."""
    return ReplyLog(path, {"text": str, "finish_reason": str})


def reply_key(teacher: Teacher, messages: list[dict], parameters: dict) -> str:
    """The reply log's key of a request: SHA-256 of model, parameters and messages, in hexadecimal."""
    request = json.dumps([teacher.identity, parameters, messages], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(request.encode("utf-8", "surrogatepass")).hexdigest()


def ask_model(
    teacher: Teacher,
    prompts: list[list[dict]],
    log: ReplyLog,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    desc: str = "asking",
    **endpoint_options: Any,
) -> list[dict]:
    """Asks for a reply to each prompt (a list of messages) -> in order {"text", "finish_reason"}, or {"error": reason}.

    Equal prompts are sent once. text: the reply without its thought. finish_reason: "stop"; "length" if cut off at
    max_tokens; "content_filter" if the endpoint held text back. Errors are not kept in the log, so the next run asks
    again. batch_size: of a local checkpoint, in sequences. endpoint_options: the last arguments of ask_endpoint(),
    whose docstring lists the errors.
    """
    parameters = {"max_tokens": max_tokens, "temperature": temperature}
    if temperature > 0:
        parameters |= {"top_p": top_p, "seed": seed}
    keys = [reply_key(teacher, messages, parameters) for messages in prompts]
    todo = {key: messages for key, messages in zip(keys, prompts) if key not in log}
    errors = {}
    if todo:
        with ReplyBar(len(todo), desc) as bar:
            if isinstance(teacher, Endpoint):
                asyncio.run(ask_endpoint(teacher, todo, log, errors, parameters, bar, **endpoint_options))
            else:
                ask_local(teacher, todo, log, errors, parameters, batch_size, bar)
    return [{"error": errors[key]} if key in errors else pick_reply(log[key]) for key in keys]


def pick_reply(record: dict) -> dict:
    """The reply of a record of the log, which keeps thoughts."""
    return {"text": without_thought(record["text"]), "finish_reason": record["finish_reason"]}


# ---------------------------------------------------------------------------------------------------------------------
# Requests whose replies are parsed


class Asker(NamedTuple):
    """A model with its reply log and options, so that ask() needs only prompts. options: arguments of ask_model()."""

    model: Teacher
    log: ReplyLog
    options: dict

    def ask(self, prompts: list[list[dict]], desc: str, **sampling: float) -> list[dict]:
        return ask_model(self.model, prompts, self.log, desc=desc, **sampling, **self.options)


def greet(asker: Asker) -> None:
    """Sends a greeting to an endpoint that has not replied yet: a wrong URL, model name or key ends the run at once."""
    if isinstance(asker.model, Endpoint) and not asker.log:
        asker.ask([GREETING], "greeting")


def greet_after(lines: Iterator, asker: Asker) -> Iterator:
    """Yields the lines of step 1, then greets.

    So a broken source is found before the first request. A greeting that fails leaves no file of the step.
    """
    yield from lines
    greet(asker)


def ask_parsed(asker: Asker, requests: list[list[dict]], parse: Callable, again: str, desc: str) -> tuple[list, int]:
    """Asks for replies and parses them. If a reply does not parse, asks once more with the words `again`.

    parse(i, text) -> value, or None if the text does not parse. A reply that was cut off inside its thought is not
    asked for again. -> ([(value or None, reason if None)], number of requests that were sent again)
    """
    replies = asker.ask(requests, desc)
    out = [(parse(i, r.get("text", "")), why_unusable(r)) for i, r in enumerate(replies)]
    failed = [
        i
        for i, (value, reason) in enumerate(out)
        if value is None and (reason == UNPARSED or reason == CUT_OFF and replies[i]["text"])
    ]
    second = []
    for i in failed:
        first_try = escape_control_tokens(clip(replies[i]["text"], 500)) or "(nothing)"
        second.append([*requests[i], {"role": "assistant", "content": first_try}, {"role": "user", "content": again}])
    for i, reply in zip(failed, asker.ask(second, f"{desc}, again")):
        out[i] = (parse(i, reply.get("text", "")), why_unusable(reply))
    return out, len(failed)


def why_unusable(reply: dict) -> str:
    """The reason why a teacher's reply did not parse."""
    held_back = reply.get("finish_reason") == "content_filter" and "held back by the endpoint"
    if why := reply.get("error") or held_back:
        return f"{UNANSWERED}: {why}"
    return CUT_OFF if reply["finish_reason"] == "length" else UNPARSED
