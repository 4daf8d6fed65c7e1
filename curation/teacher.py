"""Asks a teacher: an OpenAI-compatible endpoint or a local checkpoint. Every reply is written to disk at once.

    teacher = open_teacher("http://localhost:8000/v1", model_name="Qwen2.5-7B-Instruct")     # or a checkpoint
    with open_replies("out/replies.jsonl") as log:
        replies = ask_model(teacher, prompts, log, max_tokens=256)          # prompts: list of message lists

A run that was killed and is started again requests only the replies that are missing.
"""

import asyncio
import hashlib
import json
from typing import Any

from tqdm import tqdm

from core.reply_log import ReplyLog
from curation.endpoint import Endpoint, looks_like_url, open_endpoint
from curation.local import LocalModel, ask_local, open_local
from curation.workers import ask_endpoint

Teacher = Endpoint | LocalModel


def open_teacher(source: str, model_name: str | None = None, dtype: str = "fp32") -> Teacher:
    """source: http(s) URL of an OpenAI-compatible endpoint (.../v1), or a checkpoint (hub id, folder, .pt).

    dtype: of a local checkpoint, a key of DTYPES. An endpoint's key is in TEACHER_API_KEY, or for
    https://api.openai.com in OPENAI_API_KEY. InputError for a bad URL or checkpoint. Makes no connection yet."""
    if looks_like_url(source):
        return open_endpoint(source, model_name)
    return open_local(source, model_name, dtype)


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

    Equal prompts are sent once. finish_reason: "stop"; "length" if cut off at max_tokens; "content_filter" if the
    endpoint held text back. Errors are not kept in the log, so the next run asks again. batch_size: of a local
    checkpoint, in sequences. endpoint_options: the last arguments of ask_endpoint(), which also lists the errors
    raised."""
    parameters = {"max_tokens": max_tokens, "temperature": temperature}
    if temperature > 0:
        parameters |= {"top_p": top_p, "seed": seed}
    keys = [reply_key(teacher, messages, parameters) for messages in prompts]
    todo = {key: messages for key, messages in zip(keys, prompts) if key not in log}
    errors = {}
    if todo:
        with tqdm(total=len(todo), desc=desc, unit="reply", disable=None) as bar:
            if isinstance(teacher, Endpoint):
                asyncio.run(ask_endpoint(teacher, todo, log, errors, parameters, bar, **endpoint_options))
            else:
                ask_local(teacher, todo, log, errors, parameters, batch_size, bar)
    return [{"error": errors[key]} if key in errors else pick_reply(log[key]) for key in keys]


def pick_reply(record: dict) -> dict:
    return {"text": record["text"], "finish_reason": record["finish_reason"]}
