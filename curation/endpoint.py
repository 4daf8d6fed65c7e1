"""Sends one request to an OpenAI-compatible endpoint: checks URL and key, reads the reply, classifies failures."""

import json
import os
import re
import time
import unicodedata
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit, urlunsplit

from core.files import InputError
from curation.http_client import Connection, HTTPError, post

RETRY_AFTER_CAP = 120.0  # seconds: the longest wait that a server's Retry-After header can cause
SHORTEST_SECRET = 4  # characters: a shorter key is not masked, because its few characters occur in ordinary words
PLACEHOLDERS = {"EMPTY"}  # not secrets: vLLM's documentation gives this key for local servers
FATAL = {
    401: "set TEACHER_API_KEY (OPENAI_API_KEY is sent to https://api.openai.com only)",
    402: "the account has no credit",
    404: "check the URL and --teacher-model",
}
FILTERED = re.compile(
    r"content[_ ]?(filter|policy)|content management policy|responsible_?ai|moderation|data_?inspection", re.I
)


@dataclass
class Endpoint:
    """An OpenAI-compatible endpoint.

    name: for people. identity: distinguishes models in the keys of the reply log.
    """

    name: str
    identity: str
    url: str  # of the chat API
    model: str | None  # the endpoint's name for it; None: the endpoint serves one model
    key: str | None = field(default=None, repr=False)  # never printed, never written


class RequestFailed(Exception):
    """A request got no usable reply.

    reason: one line. remedy: "retry", "set aside" (only this request is at fault) or "end" (every request would fail).
    status: the HTTP status, None without a reply. wait: seconds that the server asks to wait. used: tokens charged for
    [prompt, reply], None if unknown.
    """

    def __init__(
        self, reason: str, remedy: str, status: int | None = None, wait: float = 0.0, used: list[int] | None = None
    ):
        super().__init__(reason)
        self.reason, self.remedy, self.status, self.wait, self.used = reason, remedy, status, wait, used


# ---------------------------------------------------------------------------------------------------------------------
# The URL and the key


def looks_like_url(source: str) -> bool:
    """True if a --teacher is meant as a URL: it has a scheme, or a user and a password before a host."""
    return bool(re.match(r"\s*(https?:|[a-z][a-z0-9+.-]*:[/\\]|[^/\\]*:[^/\\]*@)", source, re.I))


def mask_url(text: str) -> str:
    """A URL on one line, with every part hidden that may be secret: user, password, odd ports, query, fragment."""
    text = unicodedata.normalize("NFKC", text)  # a fullwidth @ or : separates too
    text = re.sub(r"^(\s*[a-z][a-z0-9+.-]*:[/\\]*)?.*(@|%40)", r"\1[hidden]@", text, flags=re.I | re.S)
    text = re.sub(r"[?#;].*|%3[bf].*", "?[hidden]", text, flags=re.I | re.S)
    text = re.sub(r"//[^/]*%[^/]*", "//[hidden]", text)
    text = re.sub(r"(//(?:\[[^/\]]*\]|[^/:\[\]]*)):(?!\d*(/|\?|$))[^/]*", r"\1:[hidden]", text)
    return "".join(c if c.isprintable() else "?" for c in text)[:200]


def open_endpoint(source: str, model_name: str | None) -> Endpoint:
    """Opens an endpoint. source: the base URL (.../v1) or the URL of the chat API. The key comes from the environment.

    Raises InputError for a URL that cannot be used. Its message shows no password.
    """
    shown = mask_url(source)
    try:
        parts = urlsplit(source)
        port, host = parts.port, parts.hostname or ""
        host.encode("idna")
    except ValueError:  # UnicodeError too
        raise InputError(f"{shown}: is not a valid URL; give one like http://localhost:8000/v1") from None
    if parts.scheme not in ("http", "https"):
        raise InputError(f"{shown}: is neither http:// nor https://; give a URL like http://localhost:8000/v1")
    if re.search(r"[@?#]|%(40|3f|23)", source, re.I):
        raise InputError(f"{shown}: the URL carries a password or a query; set TEACHER_API_KEY to the key instead")
    if not host:
        raise InputError(f"{shown}: this URL has no host; give one like http://localhost:8000/v1")
    host_and_port = re.fullmatch(r"([a-z0-9._-]+|\[[0-9a-f:.]+\])(:\d*)?", parts.netloc.lower())
    if not re.fullmatch(r"[!-~]+", source) or not host_and_port or port == 0:
        raise InputError(f"{shown}: is not a valid URL; give one like http://localhost:8000/v1")
    # the identity leaves out the URL if the model has a name: the same model on another port is the same model
    name = model_name or source
    return Endpoint(name, name, chat_url(parts), model_name, endpoint_key(parts.scheme, host))


def chat_url(parts: SplitResult) -> str:
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path = f"{path or '/v1'}/chat/completions"
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def endpoint_key(scheme: str, host: str) -> str | None:
    """The key for this host: TEACHER_API_KEY for any --teacher, or OPENAI_API_KEY for https://api.openai.com only."""
    name = "TEACHER_API_KEY"
    if not os.environ.get(name) and (scheme, host) == ("https", "api.openai.com"):
        name = "OPENAI_API_KEY"
    key = (os.environ.get(name) or "").strip() or None
    if key and not (key.isascii() and key.isprintable()):
        raise InputError(f"the key in {name} contains a character that keys never contain; set it again")
    return key


def mask_key(text: str, key: str | None) -> str:
    """The text with every spelling of the key replaced by [key].

    A key of fewer than SHORTEST_SECRET characters and the PLACEHOLDERS stay as they are.
    """
    if key and len(key) >= SHORTEST_SECRET and key not in PLACEHOLDERS:
        for spelling in (key, quote(key, safe=""), quote(key), json.dumps(key)[1:-1]):
            text = text.replace(spelling, "[key]")
    return text


# ---------------------------------------------------------------------------------------------------------------------
# One request


def look_up(value: Any, *path: str | int) -> Any:
    """value[path[0]][path[1]]... None if a step is missing or of another type."""
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def read_json_body(body: bytes) -> Any:
    """Parses JSON. Integers of 20 digits or more become None. Raises ValueError or RecursionError."""
    return json.loads(body, parse_int=lambda digits: int(digits) if len(digits) < 20 else None)


def read_completion(body: bytes, key: str | None = None) -> tuple[str, str, list[int] | None]:
    """The body of an HTTP 200 -> (text, finish_reason, usage). The text is masked by mask_key().

    finish_reason: "stop", "length" or "content_filter". usage: tokens [of the prompt, of the reply], None if the
    endpoint gives none that can be true. Raises RequestFailed if the body holds no text.
    """
    try:
        reply = read_json_body(body)
    except (ValueError, RecursionError):
        raise RequestFailed("HTTP 200, but the body is not JSON", "retry", 200) from None
    if look_up(reply, "error"):
        status = look_up(reply, "error", "code")
        raise read_refusal(status if type(status) is int and 400 <= status < 600 else 500, {}, body, key)
    usage = [look_up(reply, "usage", name) for name in ("prompt_tokens", "completion_tokens")]
    if not all(type(n) is int and 0 <= n < 10**9 for n in usage):
        usage = None
    choice = look_up(reply, "choices", 0)
    message, finish_reason = look_up(choice, "message"), look_up(choice, "finish_reason")
    text = read_content(look_up(message, "content"))
    text = text if text is None else mask_key(text, key)
    if look_up(message, "refusal") or finish_reason == "content_filter":
        return text or "", "content_filter", usage
    if text is None and finish_reason == "length":  # a reasoning model that used all tokens before its answer
        return "", "length", usage
    if text is None:
        raise RequestFailed(f"HTTP 200, but {why_no_text(reply, choice, message, key)}", "set aside", 200, used=usage)
    return text, finish_reason if finish_reason == "length" else "stop", usage


def why_no_text(reply: Any, choice: Any, message: Any, key: str | None) -> str:
    block = look_up(reply, "promptFeedback", "blockReason")
    if isinstance(block, str):
        return f"content filter: {one_line(block, key)}"
    if choice is None:
        return "the reply has no choices"
    if message is None:
        return "the reply has no message"
    return "the reply calls a tool" if look_up(message, "tool_calls") else "the reply has no text"


def read_content(content: Any) -> str | None:
    """The text of a message's content, which is a text or a list of parts. None if it has none."""
    if isinstance(content, list):
        parts = [look_up(part, "text") for part in content if look_up(part, "type") == "text"]
        content = "".join(parts) if parts and all(isinstance(part, str) for part in parts) else None
    if not isinstance(content, str):
        return None
    return content.encode("utf-8", "replace").decode()  # JSON may contain half a surrogate pair, files may not


def read_refusal(status: int, headers: dict[str, str], body: bytes, key: str | None = None) -> RequestFailed:
    """Classifies a reply other than HTTP 200. -> the failure to raise, its reason masked by mask_key()"""
    try:
        error = read_json_body(body)
    except (ValueError, RecursionError):
        error = None
    message = look_up(error, "error", "message") or look_up(error, "message") or look_up(error, "error")
    if not isinstance(message, str):
        message = body.decode("utf-8", "replace")
    reason = f"HTTP {status}: {one_line(message, key)}"
    if 300 <= status < 400:
        where = mask_url(mask_key(headers.get("location", "nowhere"), key))
        advice = "which is not followed; if you trust that address, give it as --teacher"
        return RequestFailed(f"HTTP {status}: it redirects to {where}, {advice}", "end", status)
    paths = ("code",), ("type",), ("innererror", "code"), ("metadata", "reasons")
    codes = [look_up(error, "error", *path) for path in paths]
    if status in (400, 403, 422, 451) and FILTERED.search(" ".join(map(str, [*codes, message[:2000]]))):
        return RequestFailed(f"content filter: {reason}", "set aside")
    if "insufficient_quota" in codes:
        status = 402  # some endpoints send 429 here, which would be retried
    if status in FATAL:
        return RequestFailed(f"{reason}; {FATAL[status]}", "end", status)
    if 400 <= status < 500 and status not in (408, 409, 425, 429):
        return RequestFailed(reason, "set aside", status)
    return RequestFailed(reason, "retry", status, wait=retry_after(headers.get("retry-after")))


def retry_after(value: str | None) -> float:
    """The seconds that a Retry-After header asks for (a number or a date), 0 to RETRY_AFTER_CAP. 0 if it is neither."""
    if not value:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError, IndexError):
            return 0.0
    return min(max(seconds, 0.0), RETRY_AFTER_CAP) if seconds == seconds else 0.0


def one_line(text: str, key: str | None) -> str:
    """At most 200 characters of a text on one line, without control characters.

    The key is masked before the text is cut, so that no part of it is left.
    """
    text = mask_key(text, key)[:2000]
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200]


async def send(
    connection: Connection, endpoint: Endpoint, messages: list[dict], parameters: dict, timeout: float
) -> tuple[str, str, list[int] | None]:
    """Sends a request once -> (text, finish_reason, usage or None). Raises RequestFailed."""
    model = {"model": endpoint.model} if endpoint.model else {}
    body = json.dumps({**model, "messages": messages, "stream": False, **parameters}).encode()
    try:
        response = await post(connection, body, timeout)
    except HTTPError as e:
        raise RequestFailed(one_line(str(e), endpoint.key), "retry" if e.retry else "set aside") from None
    if response.status != 200:
        raise read_refusal(response.status, response.headers, response.body, endpoint.key)
    return read_completion(response.body, endpoint.key)
