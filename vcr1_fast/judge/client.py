"""Asks a language model behind an OpenAI-compatible server: bounded in time, retried, cached, counted.

In: a prompt and a parser of its answer. Out: what the parser made of it, or JudgeUnavailableError. Called by
entailment.py. Nothing is contacted, read or written before the first question.
"""

from __future__ import annotations

import contextlib
import email.utils
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from vcr1_fast.judge.cache import AnswerCache, cache_key
from vcr1_fast.judge.transport import Reply, TransportError, post_json
from vcr1_fast.settings.config import JudgeConfig

T = TypeVar("T")
Item = TypeVar("Item")

MAX_BACKOFF_S = 30.0
# After a failure for good, questions fail at once for this long. Scoring goes group by group after the first failure,
# and without this each of 64 groups would wait through all its retries (7.5 s each with the defaults) again.
COOLDOWN_S = 30.0
RETRY_TEMPERATURE = 0.5  # an unreadable answer at temperature 0 would only come again
TRANSIENT_STATUSES = frozenset({408, 409, 425, 429})


class JudgeUnavailableError(Exception):
    """There is no verdict: the judge is down, too slow, refuses, or says nothing that can be read."""


class _AttemptError(Exception):
    """One attempt failed in a way that another may not."""

    def __init__(self, reason: str, retry_after_s: float = 0.0, is_outage: bool = True) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s
        self.is_outage = is_outage  # False: the server is well, only this answer is not


@dataclass
class JudgeCounters:
    """What the judge cost so far, in this process."""

    requests: int = 0
    retries: int = 0
    cache_hits: int = 0
    invalid: int = 0  # answers that could not be read
    failures: int = 0  # questions without a verdict
    seconds: float = 0.0  # in requests, summed over threads


class JudgeClient:
    """Thread-safe. Settings and their meaning: config.JudgeConfig."""

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config
        self._lock = threading.Lock()
        self._counters = JudgeCounters()
        self._random = random.Random()  # its own: the run's random numbers must not depend on the judge's hiccups
        self._down_until = 0.0
        self._down_reason = ""
        self._last_success = float("-inf")
        self._opened_cache: AnswerCache | None = None
        self._turns: dict[str, tuple[threading.Lock, int]] = {}  # question -> its lock and how many hold or want it

    @property
    def _cache(self) -> AnswerCache:
        with self._lock:
            if self._opened_cache is None:
                self._opened_cache = AnswerCache(Path(self.config.cache).expanduser() if self.config.cache else None)
            return self._opened_cache

    def counters(self) -> dict[str, float]:
        """A copy of the counters, for logs."""
        with self._lock:
            return asdict(self._counters)

    def new_deadline(self) -> float:
        """total_timeout_s from now, on the clock time.monotonic()."""
        return time.monotonic() + self.config.total_timeout_s

    def map(self, ask: Callable[[Item], T], items: Sequence[Item]) -> list[T | JudgeUnavailableError]:
        """ask(item) for each item, max_concurrency at a time; what had no verdict comes as its error."""
        if not items:
            return []

        def one(item: Item) -> T | JudgeUnavailableError:
            try:
                return ask(item)
            except JudgeUnavailableError as error:
                return error

        with ThreadPoolExecutor(min(self.config.max_concurrency, len(items)), "judge") as pool:
            return list(pool.map(one, items))

    def ask(self, prompt: str, parse: Callable[[str], T], max_tokens: int, deadline: float) -> T:
        """What `parse` makes of the answer to `prompt`. `parse` raises ValueError for an answer it cannot read.

        `deadline`: of new_deadline. Raises JudgeUnavailableError.
        """
        key = cache_key(self.config.model, prompt)
        with self._one_at_a_time(key, deadline):
            return self._ask(key, prompt, parse, max_tokens, deadline)

    @contextlib.contextmanager
    def _one_at_a_time(self, key: str, deadline: float) -> Iterator[None]:
        """Threads with the same question wait for each other, so that the second finds the first one's answer."""
        with self._lock:
            turn, count = self._turns.get(key, (threading.Lock(), 0))
            self._turns[key] = (turn, count + 1)
        is_mine = turn.acquire(timeout=max(0.0, deadline - time.monotonic()))  # else the request says what is over
        try:
            yield
        finally:
            if is_mine:
                turn.release()
            with self._lock:
                turn, count = self._turns.pop(key)
                if count > 1:
                    self._turns[key] = (turn, count - 1)

    def _ask(self, key: str, prompt: str, parse: Callable[[str], T], max_tokens: int, deadline: float) -> T:
        known = self._cache.get(key)
        if known is not None:
            try:
                result = parse(known)
            except ValueError:
                pass  # stored by a version whose parser took more
            else:
                self._count(cache_hits=1)
                return result
        started = time.monotonic()
        for attempt in range(self.config.max_retries + 1):
            try:
                self._check_up()
                answer = self._request(prompt, max_tokens, attempt, deadline)
                result = self._parsed(answer, parse)
            except _AttemptError as error:
                self._pause_or_give_up(error, attempt, started, deadline)
            except JudgeUnavailableError:
                self._count(failures=1)
                raise
            else:
                self._cache.put(key, answer)
                return result
        raise AssertionError("the last attempt either returns or raises")

    def _check_up(self) -> None:
        left_s = self._down_until - time.monotonic()
        if left_s > 0:
            raise JudgeUnavailableError(f"{self._down_reason}; not asked again for {left_s:.0f} s")

    def _pause_or_give_up(self, error: _AttemptError, attempt: int, started: float, deadline: float) -> None:
        ceiling_s = min(MAX_BACKOFF_S, self.config.backoff_s * 2.0**attempt)
        pause_s = max(error.retry_after_s, ceiling_s * self._random.uniform(0.5, 1.0))
        is_last = attempt == self.config.max_retries
        if not is_last and time.monotonic() + pause_s < deadline:
            self._count(retries=1)
            time.sleep(pause_s)
            return
        end = f"after {attempt + 1} attempts" if is_last else "and the time for all captions is nearly over"
        reason = f"the judge {self.config.model} at {self.config.url} gave no verdict {end}: {error}"
        is_down = error.is_outage and self._last_success < started  # else it answered others: this question goes wrong
        if is_down or not is_last:
            self._mark_down(reason)
        self._count(failures=1)
        raise JudgeUnavailableError(reason) from None

    def _mark_down(self, reason: str) -> None:
        with self._lock:
            self._down_until, self._down_reason = time.monotonic() + COOLDOWN_S, reason

    def _request(self, prompt: str, max_tokens: int, attempt: int, deadline: float) -> str:
        """The text of one answer. Raises _AttemptError, or JudgeUnavailableError where another try is useless."""
        timeout_s = min(self.config.timeout_s, deadline - time.monotonic())
        if timeout_s <= 0:
            reason = (
                f"judge.total_timeout_s = {self.config.total_timeout_s} s ended before all was asked: raise it, or "
                "judge.max_concurrency"
            )
            self._mark_down(reason)
            raise JudgeUnavailableError(reason)
        payload = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0.0 if attempt == 0 else RETRY_TEMPERATURE,
            "max_tokens": max_tokens,
        }
        started = time.monotonic()
        try:
            url = self.config.url.rstrip("/") + "/chat/completions"
            reply = post_json(url, payload, self._headers(), timeout_s)
        except TransportError as error:
            raise _AttemptError(str(error)) from None
        finally:
            self._count(requests=1, seconds=time.monotonic() - started)
        body = self._without_key(reply.body)
        if reply.status != 200:
            raise self._refusal(reply, body)
        try:
            content, is_cut = read_completion(body)
        except ValueError as error:
            self._count(invalid=1)
            raise _AttemptError(str(error)) from None
        with self._lock:
            self._last_success = time.monotonic()
        if is_cut:
            self._count(invalid=1)
            raise _AttemptError(f"its answer is longer than {max_tokens} tokens", is_outage=False)
        return content

    def _refusal(self, reply: Reply, body: bytes) -> Exception:
        text = " ".join(body[:2000].decode(errors="replace").split())[:300]
        what = f"HTTP {reply.status}: {text or 'no text'}"
        if reply.status in TRANSIENT_STATUSES or reply.status >= 500:
            return _AttemptError(what, retry_after_s(reply.headers.get("retry-after", "")))
        advice = {
            401: f"check the key in ${self.config.api_key_env}",
            403: f"check the key in ${self.config.api_key_env}",
            404: "check judge.url (it ends in /v1) and judge.model",
            400: "see its message; often the judge's context is too short for the question and the longest answer",
        }.get(reply.status, "check judge.url and judge.model; redirects are not followed")
        reason = f"the judge {self.config.model} at {self.config.url} answered {what}; {advice}"
        if reply.status in (401, 403, 404) or reply.status < 400:
            self._mark_down(reason)  # holds for every question
        return JudgeUnavailableError(reason)

    def _parsed(self, answer: str, parse: Callable[[str], T]) -> T:
        try:
            return parse(answer)
        except ValueError as error:
            self._count(invalid=1)
            raise _AttemptError(f"its answer cannot be read: {error}", is_outage=False) from None

    def _headers(self) -> dict[str, str]:
        key = self._key()
        if not key:
            return {}
        if not (key.isascii() and key.isprintable()):  # http.client would put the key into its error message
            raise JudgeUnavailableError(f"${self.config.api_key_env} holds characters that no API key has: set it anew")
        return {"Authorization": f"Bearer {key}"}

    def _key(self) -> str:
        return os.environ.get(self.config.api_key_env, "").strip()

    def _without_key(self, body: bytes) -> bytes:
        """Servers quote the key in their refusals, and these end up in logs."""
        key = self._key().encode()
        return body.replace(key, b"***") if key else body

    def _count(self, **increments: float) -> None:
        with self._lock:
            for name, value in increments.items():
                setattr(self._counters, name, getattr(self._counters, name) + value)


def read_completion(body: bytes) -> tuple[str, bool]:
    """Text of a chat completion's first choice, and whether it was cut at max_tokens. ValueError for anything else."""
    try:
        choice = json.loads(body)["choices"][0]
        content, finish_reason = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        content, finish_reason = None, None
    if not isinstance(content, str):
        start = body[:80].decode(errors="replace")
        raise ValueError(f"the reply is not a chat completion with text: it starts {start!r}")
    return content, finish_reason == "length"


def retry_after_s(value: str) -> float:
    """Seconds that a Retry-After header asks for, as a number or a date; 0 when it says nothing."""
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError):
        return 0.0
