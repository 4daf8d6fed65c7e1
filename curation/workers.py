"""Many requests to an endpoint at once: workers, retries, limits, and what ends a run.

Each worker sends one request after the other over its own connection. A request that fails for a passing reason (no
connection, a timeout, HTTP 408, 429 or 5xx) is sent again after a pause. If it fails every time, the endpoint is sent a
greeting: if that is answered, the request is set aside with its reason; if not, the run ends, and the same command goes
on later. HTTP 429 says nothing against a request, so it gets several such rounds. A request that the endpoint refuses
(another HTTP 4xx, a reply without text) is set aside at once.
"""

import asyncio
import contextlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from tqdm import tqdm

from core.files import InputError
from core.reply_log import ReplyLog
from curation.costs import Limits, request_tokens, tokens_of
from curation.endpoint import Endpoint, RequestFailed, send
from curation.http_client import Connection
from curation.prompts import GREETING

BACKOFF, BACKOFF_CAP = 1.0, 60.0  # seconds before the first retry; doubled for each further one, up to the cap
FIRST_TRIES = 3  # tries before a server that was never reached counts as unreachable
THROTTLED_ROUNDS = 4  # times that all tries are made for a request that fails with HTTP 429 while others are answered
GREETING_TOKENS = 16  # longest reply to the greeting that tests whether an endpoint still answers


@dataclass
class Session:
    """What the workers of one ask_endpoint() share."""

    endpoint: Endpoint
    log: ReplyLog
    errors: dict[str, str]
    parameters: dict
    limits: Limits
    bar: tqdm
    timeout: float
    retries: int
    spent_before: float
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    ended_by: str = ""  # why the run ends before all is asked
    answered: bool = False  # whether the endpoint has given any reply with a text


async def ask_endpoint(
    endpoint: Endpoint,
    todo: dict[str, list[dict]],
    log: ReplyLog,
    errors: dict[str, str],
    parameters: dict,
    bar: tqdm,
    concurrency: int = 16,
    timeout: float = 120.0,
    retries: int = 8,
    **limits,
) -> None:
    """Asks for all of todo, {key: messages}. Replies go into the log; errors gets {key: reason} where there is none.

    concurrency: requests in flight. Each of so many workers takes the next request as soon as its last one is answered.
    timeout: seconds for one whole reply. retries: further tries of a failed request. limits: the arguments of Limits.

    Raises InputError if the endpoint cannot be reached, refuses the key or answers nothing at all, and when the budget
    is used up. Requests in flight are finished first, because they may have cost money."""
    bounds = Limits(log, **limits)
    session = Session(endpoint, log, errors, parameters, bounds, bar, timeout, retries, bounds.spent())
    queue = iter(todo.items())
    await asyncio.gather(*[work(session, queue) for _ in range(min(concurrency, len(todo)))])
    if not session.ended_by and len(errors) == len(todo) and not session.answered:
        if GREETING in todo.values() or not await still_answers(session):
            session.ended_by = f"it refused every request: {next(iter(errors.values()))}"
    if session.ended_by:
        kept = "Every reply so far is kept: run the same command to go on"
        raise InputError(f"the teacher at {endpoint.url}: {session.ended_by}. {kept}")


async def work(session: Session, queue: Iterator) -> None:
    """One worker: asks for the rest of the queue, one request after the other."""
    with contextlib.closing(new_connection(session.endpoint)) as connection:
        for key, messages in queue:
            await ask_or_set_aside(session, connection, key, messages)
            if session.stop.is_set():
                return
            session.bar.update()
            show_spent(session)


async def ask_or_set_aside(session: Session, connection: Connection, key: str, messages: list[dict]) -> None:
    """Puts the reply into the log, or the reason why there is none into the errors, or ends the run."""
    for last_round in (*[False] * (THROTTLED_ROUNDS - 1), True):
        try:
            reply = await ask_until_answered(session, connection, messages, session.parameters)
        except RequestFailed as e:
            whose_fault = e.remedy == "retry" or e.status == 403  # this request's, or the endpoint's?
            if e.remedy == "end" or (whose_fault and messages == GREETING):
                return end(session, with_hint(e))
            if whose_fault and not await still_answers(session):
                return
            if e.status == 429 and not last_round:
                continue  # other requests were served first
            session.errors[key] = e.reason
            session.limits.set_aside = [a + b for a, b in zip(session.limits.set_aside, e.used or (0, 0))]
        else:
            if reply:
                text, finish_reason, usage = reply
                record = {"model": session.endpoint.name, "text": text, "finish_reason": finish_reason, "usage": usage}
                session.log.append(key, record)
        return


async def ask_until_answered(
    session: Session, connection: Connection, messages: list[dict], parameters: dict
) -> tuple[str, str, list[int]] | None:
    """Sends a request until it is answered -> (text, finish_reason, usage); None if the run ends meanwhile.

    Raises RequestFailed when it is refused, or has failed for the last time."""
    size = [request_tokens(messages), parameters["max_tokens"]]
    if not await afford(session, size):
        return None
    session.limits.hold(size)
    try:
        for tries in itertools.count(1):
            await pause(session, session.limits.wait(size), "the rate limit")
            if session.stop.is_set():
                return None
            try:
                text, finish_reason, usage = await send(
                    connection, session.endpoint, messages, parameters, session.timeout
                )
            except RequestFailed as e:
                if e.remedy != "retry":
                    raise
                unreachable = not session.answered and tries >= FIRST_TRIES and e.status is None
                if tries > session.retries or unreachable:
                    e.reason = f"no answer after {tries} {'tries' if tries > 1 else 'try'} (last: {e.reason})"
                    raise
                backoff = min(BACKOFF_CAP, BACKOFF * 2 ** (tries - 1)) * random.uniform(0.5, 1.0)
                await pause(session, max(e.wait, backoff), e.reason)
            else:
                session.answered = True
                usage = usage or [size[0], tokens_of(text)]
                session.limits.charge(size, usage)
                return text, finish_reason, usage
    finally:
        session.limits.let_go(size)


async def still_answers(session: Session) -> bool:
    """Sends a greeting, to tell a request that always fails from an endpoint that is down. Ends the run if it fails."""
    with contextlib.closing(new_connection(session.endpoint)) as connection:
        try:
            reply = await ask_until_answered(
                session, connection, GREETING, {"max_tokens": GREETING_TOKENS, "temperature": 0.0}
            )
        except RequestFailed as e:
            end(session, with_hint(e))
            return False
    if reply:
        session.limits.set_aside = [a + b for a, b in zip(session.limits.set_aside, reply[2])]
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
    """Waits until the budget allows one more request of this size. False if the run ends, because it never will."""
    limits = session.limits
    while not session.stop.is_set() and not limits.affords(size):
        if not any(limits.held):  # nothing in flight that could turn out cheaper
            end(
                session,
                f"the budget of {limits.budget:,g} is used up ({limits.spent():,.6g} spent); raise --budget to go on",
            )
        await pause(session, 0.02)
    return not session.stop.is_set()


def end(session: Session, reason: str) -> None:
    session.ended_by = session.ended_by or reason
    session.stop.set()


async def pause(session: Session, seconds: float, reason: str = "") -> None:
    """Sleeps, at most until the run ends. The bar shows a wait of a second or more."""
    if seconds >= 1:
        session.bar.set_postfix_str(f"waiting {seconds:.0f} s: {reason[:60]}")
    if seconds > 0:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(session.stop.wait(), seconds)


def show_spent(session: Session) -> None:
    limits, bar = session.limits, session.bar
    spent, digits = limits.spent(), 2 if limits.prices else 0
    at_end = session.spent_before + (spent - session.spent_before) * bar.total / max(bar.n, 1)
    bar.set_postfix_str(f"{spent:,.{digits}f}, about {at_end:,.{digits}f} at its end", refresh=False)
