"""Sends many requests to an endpoint at once, with retries, rate limits and a budget.

Each worker sends one request after the other over its own connection. A request that fails for a temporary reason (no
connection, a timeout, HTTP 408, 429 or 5xx) is sent again after a pause. If all tries fail, the worker sends a
greeting:
- If the greeting is answered, only this request is at fault. It is set aside with its reason.
- If not, the endpoint is down. The run ends, and the same command continues it later.

HTTP 429 is not the request's fault, so such a request gets THROTTLED_ROUNDS rounds of tries. A request that the
endpoint refuses (another HTTP 4xx, a reply without text) is set aside at once.
"""

import asyncio
import contextlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from core.files import InputError
from core.progress import ReplyBar
from core.reply_log import ReplyLog
from curation.costs import Limits, estimate_tokens, request_tokens
from curation.endpoint import Endpoint, RequestFailed, send
from curation.http_client import Connection
from curation.prompts import GREETING, NO_ANSWER

BACKOFF, BACKOFF_CAP = 1.0, 60.0  # seconds before the first retry, doubled for each further one; the longest pause
FIRST_TRIES = 3  # tries after which a server that has never sent a completion, nor an HTTP error, is no endpoint
THROTTLED_ROUNDS = 4  # rounds of tries for a request that fails with HTTP 429 while the endpoint answers greetings
GREETING_TOKENS = 16  # maximum tokens of the reply to the greeting


@dataclass
class Session:
    """The state that the workers of one ask_endpoint() share."""

    endpoint: Endpoint
    log: ReplyLog
    errors: dict[str, str]
    parameters: dict
    limits: Limits
    bar: ReplyBar
    timeout: float
    retries: int
    spent_before: float
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    ended_by: str = ""  # the reason if the run ends early
    answered: bool = False  # True once the endpoint has sent any text


async def ask_endpoint(
    endpoint: Endpoint,
    todo: dict[str, list[dict]],
    log: ReplyLog,
    errors: dict[str, str],
    parameters: dict,
    bar: ReplyBar,
    concurrency: int = 16,
    timeout: float = 120.0,
    retries: int = 8,
    **limits: Any,
) -> None:
    """Sends all requests in todo, {key: messages}. Adds replies to the log, and {key: reason} to errors for the others.

    concurrency: number of workers. A worker takes the next request as soon as its last one is answered. timeout: for
    one whole reply, in seconds. retries: further tries of a failed request. limits: the arguments of Limits.

    Raises InputError if the endpoint cannot be reached, refuses the key or answers nothing, or if the budget is used
    up. Requests in flight are finished first, because they may cost money.
    """
    bounds = Limits(log, **limits)
    session = Session(endpoint, log, errors, parameters, bounds, bar, timeout, retries, bounds.spent())
    queue = iter(todo.items())
    await asyncio.gather(*[run_worker(session, queue) for _ in range(min(concurrency, len(todo)))])
    if not session.ended_by and len(errors) == len(todo) and not session.answered:
        if GREETING in todo.values() or not await still_answers(session):
            session.ended_by = f"it refused every request: {next(iter(errors.values()))}"
    if session.ended_by:
        kept = "Every reply so far is kept: run the same command to continue"
        raise InputError(f"the teacher at {endpoint.url}: {session.ended_by}. {kept}")


async def run_worker(session: Session, queue: Iterator) -> None:
    """One worker: takes requests from the queue until it is empty or the run ends."""
    with contextlib.closing(new_connection(session.endpoint)) as connection:
        for key, messages in queue:
            await ask_or_set_aside(session, connection, key, messages)
            if session.stop.is_set():
                return
            session.bar.update()
            show_spent(session)


async def ask_or_set_aside(session: Session, connection: Connection, key: str, messages: list[dict]) -> None:
    """Adds the reply to the log, or the reason without a reply to the errors, or ends the run."""
    for round_of_tries in range(1, THROTTLED_ROUNDS + 1):
        try:
            reply = await ask_until_answered(session, connection, messages, session.parameters)
        except RequestFailed as e:
            suspect = e.remedy == "retry" or e.status == 403  # the endpoint may be at fault; a greeting shows it
            if e.remedy == "end" or (suspect and messages == GREETING):
                return end_run(session, with_hint(e))
            if suspect and not await still_answers(session):
                return
            if e.status == 429 and round_of_tries < THROTTLED_ROUNDS:
                continue
            session.errors[key] = e.reason
            session.limits.discard(e.used or [0, 0])
        else:
            if reply:
                text, finish_reason, usage = reply
                record = {"model": session.endpoint.name, "text": text, "finish_reason": finish_reason, "usage": usage}
                session.log.append(key, record)
        return


async def ask_until_answered(
    session: Session, connection: Connection, messages: list[dict], parameters: dict
) -> tuple[str, str, list[int]] | None:
    """Sends a request until it is answered -> (text, finish_reason, usage). None if the run ends before that.

    Raises RequestFailed if the request is refused or its last try fails.
    """
    size = [request_tokens(messages), parameters["max_tokens"]]
    if not await afford(session, size):
        return None
    session.limits.begin(size)
    try:
        for tries in itertools.count(1):
            await pause(session, session.limits.reserve_slot(size), "the rate limit")
            if session.stop.is_set():
                return None
            try:
                text, finish_reason, usage = await send(
                    connection, session.endpoint, messages, parameters, session.timeout
                )
            except RequestFailed as e:
                if e.remedy != "retry":
                    raise
                # 200: not JSON, so probably a web page and not a chat API
                unreachable = not session.answered and tries >= FIRST_TRIES and e.status in (None, 200)
                if tries > session.retries or unreachable:
                    e.reason = f"{NO_ANSWER} {tries} {'tries' if tries > 1 else 'try'} (last: {e.reason})"
                    raise
                backoff = min(BACKOFF_CAP, BACKOFF * 2 ** min(tries - 1, 10)) * random.uniform(0.5, 1.0)
                await pause(session, max(e.wait, backoff), e.reason)
            else:
                session.answered = True
                usage = usage or [size[0], estimate_tokens(text)]
                session.limits.correct_rate(size, usage)
                return text, finish_reason, usage
    finally:
        session.limits.finish(size)


async def still_answers(session: Session) -> bool:
    """Sends a greeting to find out whether the endpoint is down. Ends the run if the greeting fails."""
    with contextlib.closing(new_connection(session.endpoint)) as connection:
        try:
            reply = await ask_until_answered(
                session, connection, GREETING, {"max_tokens": GREETING_TOKENS, "temperature": 0.0}
            )
        except RequestFailed as e:
            end_run(session, with_hint(e))
            return False
    if reply:
        session.limits.discard(reply[2])
    return reply is not None


def with_hint(failure: RequestFailed) -> str:
    hint = ""
    if failure.status == 403:
        hint = "; the key may not use this model"
    elif failure.status == 429:
        hint = "; lower --concurrency, or try later"
    elif failure.remedy == "retry":
        hint = "; check that it is running and that the URL is that of its chat API"
    return failure.reason + hint


def new_connection(endpoint: Endpoint) -> Connection:
    return Connection(endpoint.url, {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {})


async def afford(session: Session, size: list[int]) -> bool:
    """Waits until the budget allows one more request of this size. False if the run ends, also for lack of budget."""
    limits = session.limits
    while not session.stop.is_set() and not limits.affords(size):
        if not any(limits.in_flight):  # no request is in flight that may cost less than its limit
            spent = f"the budget of {limits.budget:,g} is used up ({limits.spent():,.6g} spent)"
            end_run(session, f"{spent}; raise --budget to continue")
        await pause(session, 0.02)
    return not session.stop.is_set()


def end_run(session: Session, reason: str) -> None:
    session.ended_by = session.ended_by or reason
    session.stop.set()


async def pause(session: Session, seconds: float, reason: str = "") -> None:
    """Sleeps until the time is over or the run ends. The progress bar shows pauses of a second or more."""
    if seconds >= 1:
        session.bar.set_postfix_str(f"waiting {seconds:.0f} s: {reason[:60]}")
    if seconds > 0:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(session.stop.wait(), seconds)


def show_spent(session: Session) -> None:
    limits, bar = session.limits, session.bar
    spent, digits = limits.spent(), 2 if limits.prices else 0
    at_end = session.spent_before + (spent - session.spent_before) * bar.total / max(bar.done, 1)
    unit = "" if limits.prices else " tokens"
    bar.set_postfix_str(f"{spent:,.{digits}f}{unit} spent, about {at_end:,.{digits}f} at its end", refresh=False)
