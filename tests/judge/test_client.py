"""The judge's client against a real server that fails in every way a server can."""

import email.utils
import json
import random
import threading
import time

import pytest

from tests.judge.judge_server import (
    closes_halfway,
    completion,
    drips,
    drips_for,
    floods,
    hangs_up,
    resets,
    says,
    sends,
    serving,
    unused_url,
    waits,
)
from vcr1_fast.judge.client import JudgeClient, JudgeUnavailableError, read_completion, retry_after_s
from vcr1_fast.settings.config import ConfigError, JudgeConfig


def client_of(url: str, **options) -> JudgeClient:
    defaults = {"cache": None, "backoff_s": 0.01, "timeout_s": 2.0, "max_retries": 2, "model": "judge-72b"}
    return JudgeClient(JudgeConfig(url=url, **(defaults | options)))


def number(answer: str) -> int:
    return int(answer)


def ask(client: JudgeClient, prompt: str = "how many?") -> int:
    return client.ask(prompt, number, 64, client.new_deadline())


def counts(client: JudgeClient) -> dict[str, float]:
    return {name: value for name, value in client.counters().items() if value and name != "seconds"}


def test_one_question_one_request():
    with serving(says("7")) as server:
        client = client_of(server.url)
        assert ask(client) == 7
    (request,) = server.requests
    assert request["path"] == "/v1/chat/completions"
    assert request["messages"] == [{"role": "user", "content": "how many?"}]
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("judge-72b", 0.0, 64)
    assert "Authorization" not in request["headers"]
    assert counts(client) == {"requests": 1}
    assert 0.0 < client.counters()["seconds"] < 2.0


@pytest.mark.parametrize(
    "trouble",
    [
        sends(500, b"out of memory"),
        sends(503),
        sends(408),
        sends(200, b""),
        sends(200, b"{"),
        sends(200, b"[" * 200_000),
        sends(200, b'{"choices": []}'),
        sends(200, b'{"choices": [{"message": "text"}]}'),
        says(None),
        says("seven"),
        says("7", finish_reason="length"),
        hangs_up,
        closes_halfway,
        resets,
        floods,
    ],
)
def test_trouble_that_passes_is_retried(trouble):
    with serving(trouble, trouble, says("7")) as server:
        client = client_of(server.url)
        assert ask(client) == 7
    seen = counts(client)
    assert (seen["requests"], seen["retries"]) == (3, 2)
    assert "failures" not in seen


@pytest.mark.parametrize("trouble", [waits(5.0, says("7")), drips])
def test_a_slow_server_is_given_up_at_the_time_out(trouble):
    """Also one that sends a byte every 20 ms, which a time-out per read would wait for until the end of time."""
    with serving(trouble, says("7")) as server:
        client = client_of(server.url, timeout_s=0.3)
        started = time.monotonic()
        assert ask(client) == 7
        assert 0.3 < time.monotonic() - started < 1.5
    assert counts(client) == {"requests": 2, "retries": 1}


def test_a_server_that_stops_in_the_middle_gets_only_what_is_left_of_the_time():
    with serving(drips_for(1.3)) as server:
        client = client_of(server.url, timeout_s=1.5, max_retries=0)
        started = time.monotonic()
        with pytest.raises(JudgeUnavailableError, match=r"no complete reply after 1\.5 s"):
            ask(client)
        assert 1.5 <= time.monotonic() - started < 2.6  # 2.8 with a time-out per read


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (sends(500, b"out of memory"), "after 3 attempts: HTTP 500: out of memory"),
        (hangs_up, "after 3 attempts: RemoteDisconnected"),
        (says("seven"), "after 3 attempts: its answer cannot be read: invalid literal"),
        (says("7", finish_reason="length"), "its answer is longer than 64 tokens"),
        (sends(200, b"<html>"), "the reply is not a chat completion with text: it starts '<html>'"),
        (floods, "the reply is longer than 1048576 bytes"),
        (closes_halfway, "bytes before the end of the reply"),
    ],
)
def test_trouble_that_stays_is_an_error_with_its_reason(behaviour, reason):
    with serving(behaviour) as server:
        client = client_of(server.url)
        with pytest.raises(JudgeUnavailableError) as raised:
            ask(client)
    assert str(raised.value).startswith(f"the judge judge-72b at {server.url} gave no verdict")
    assert reason in str(raised.value)
    assert (counts(client)["requests"], counts(client)["failures"]) == (3, 1)


def test_nothing_listens():
    client = client_of(unused_url())
    with pytest.raises(JudgeUnavailableError, match="after 3 attempts: ConnectionRefusedError"):
        ask(client)


def test_a_server_without_tls():
    with serving(says("7")) as server, pytest.raises(JudgeUnavailableError, match="after 3 attempts: SSL"):
        ask(client_of(server.url.replace("http://", "https://")))


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (401, r"check the key in \$MY_KEY"),
        (404, "check judge.url"),
        (302, "redirects are not followed"),
        (400, "see its message"),
    ],
)
def test_a_refusal_is_not_retried(status, advice):
    with serving(sends(status, b"no", Location="http://elsewhere.invalid/")) as server:
        client = client_of(server.url, api_key_env="MY_KEY")
        with pytest.raises(JudgeUnavailableError, match=f"answered HTTP {status}: no; .*{advice}"):
            ask(client)
    assert counts(client) == {"requests": 1, "failures": 1}


def test_retry_after_is_waited_for():
    with serving(sends(429, Retry_After="1"), says("7")) as server:
        client = client_of(server.url)
        started = time.monotonic()
        assert ask(client) == 7
        assert 1.0 <= time.monotonic() - started < 3.0


def test_retry_after_beyond_the_total_time_is_not_waited_for():
    with serving(sends(429, Retry_After="3600"), says("7")) as server:
        client = client_of(server.url, total_timeout_s=5.0)
        started = time.monotonic()
        with pytest.raises(JudgeUnavailableError, match="the time for all captions is nearly over: HTTP 429"):
            ask(client)
        assert time.monotonic() - started < 4.0
    assert len(server.requests) == 1


def test_retry_after_as_number_and_as_date():
    assert retry_after_s("120") == 120.0
    assert retry_after_s(" 0 ") == 0.0
    assert retry_after_s("9" * 400) == 999_999_999.0
    assert retry_after_s(email.utils.formatdate(time.time() + 60, usegmt=True)) == pytest.approx(60.0, abs=2.0)
    assert retry_after_s(email.utils.formatdate(time.time() - 60, usegmt=True)) == 0.0
    for nonsense in ("", "soon", "-5", "\u0661", "Mon, 99 Foo 2026"):
        assert retry_after_s(nonsense) == 0.0


def test_pauses_double_and_half_of_each_is_random():
    with serving(sends(500)) as server:
        client = client_of(server.url, backoff_s=0.1, max_retries=2)
        started = time.monotonic()
        with pytest.raises(JudgeUnavailableError):
            ask(client)
        # 0.1 and 0.2 s, of each at least half
        assert 0.15 <= time.monotonic() - started < 0.3 + 1.0


def test_after_a_failure_others_fail_at_once():
    with serving(sends(500)) as server:
        client = client_of(server.url)
        with pytest.raises(JudgeUnavailableError):
            ask(client)
        with pytest.raises(JudgeUnavailableError, match=r"HTTP 500.*; not asked again for (29|30) s"):
            ask(client, "another question")
        assert len(server.requests) == 3


@pytest.mark.parametrize("trouble", [says("seven"), sends(500)])
def test_a_question_that_alone_goes_wrong_does_not_stop_the_others(trouble):
    is_answered = threading.Event()  # the question after it: without a success since it began all would be given up

    def answer(handler, prompt):
        if prompt == "bad":
            is_answered.wait(1.0)
        (trouble if prompt == "bad" else says("7"))(handler, prompt)
        if prompt == "b":
            is_answered.set()

    with serving(answer) as server:
        client = client_of(server.url, backoff_s=0.1)
        deadline = client.new_deadline()
        results = client.map(lambda prompt: client.ask(prompt, number, 8, deadline), ["a", "bad", "b"])
        assert [results[0], results[2], ask(client, "c")] == [7, 7, 7]
        assert isinstance(results[1], JudgeUnavailableError)


def test_the_total_time_ends_everything():
    with serving(waits(0.6, says("7"))) as server:
        client = client_of(server.url, total_timeout_s=1.2, max_concurrency=1, max_retries=0)
        deadline = client.new_deadline()
        started = time.monotonic()
        results = client.map(lambda prompt: client.ask(prompt, number, 8, deadline), list("abcdef"))
        assert time.monotonic() - started < 2.4  # 3.6 for all
    assert results[0] == 7
    assert all(isinstance(result, JudgeUnavailableError) for result in results[1:])
    assert len(server.requests) == 2  # the second was cut off at 1.2 s


def test_concurrency_is_bounded_and_used():
    with serving(waits(0.1, says("7"))) as server:
        client = client_of(server.url, max_concurrency=3)
        deadline = client.new_deadline()
        assert client.map(lambda prompt: client.ask(prompt, number, 8, deadline), list("abcdef")) == [7] * 6
    assert server.max_active == 3


def test_threads_with_one_question_ask_it_once():
    with serving(waits(0.1, says("7"))) as server:
        client = client_of(server.url, max_concurrency=8)
        assert client.map(lambda _: ask(client), range(8)) == [7] * 8
        assert (len(server.requests), counts(client)["cache_hits"]) == (1, 7)


def test_threads_with_one_question_wait_no_longer_than_the_total_time():
    with serving(waits(2.0, says("7"))) as server:
        client = client_of(server.url, max_concurrency=2, total_timeout_s=0.3)
        deadline, started = client.new_deadline(), time.monotonic()
        results = client.map(lambda _: client.ask("how many?", number, 8, deadline), range(2))
        assert all(isinstance(result, JudgeUnavailableError) for result in results)
        assert time.monotonic() - started < 1.8


def test_a_retry_of_an_unreadable_answer_draws_another_one():
    with serving(says("seven"), says("7")) as server:
        ask(client_of(server.url))
    assert [request["temperature"] for request in server.requests] == [0.0, 0.5]


def test_the_key_comes_from_the_environment_and_appears_nowhere(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("MY_KEY", " sk-secret-123 ")
    echo = lambda handler, prompt: handler.reply(401, handler.headers["Authorization"].encode())  # noqa: E731
    with serving(says("7"), echo) as server:
        client = client_of(server.url, api_key_env="MY_KEY", cache=str(tmp_path / "c.sqlite"))
        assert ask(client) == 7
        with pytest.raises(JudgeUnavailableError, match=r"HTTP 401: Bearer \*\*\*;") as raised:
            ask(client, "again")
    assert [request["headers"]["Authorization"] for request in server.requests] == ["Bearer sk-secret-123"] * 2
    written = (tmp_path / "c.sqlite").read_bytes().decode(errors="replace")
    output = "".join(capfd.readouterr())
    for place in (str(raised.value), repr(client.config), repr(client), repr(vars(client)), written, output):
        assert "secret" not in place


def test_a_server_that_echoes_the_key_with_nonsense(monkeypatch):
    monkeypatch.setenv("VCR1_JUDGE_API_KEY", "sk-" + "secret" * 30)  # longer than what is quoted of a reply
    echo = lambda handler, prompt: handler.reply(200, handler.headers["Authorization"].encode())  # noqa: E731
    with serving(echo) as server, pytest.raises(JudgeUnavailableError, match=r"it starts 'Bearer \*\*\*'") as raised:
        ask(client_of(server.url))
    assert "secret" not in str(raised.value)


def test_a_key_that_no_header_can_hold_is_not_shown(monkeypatch):
    monkeypatch.setenv("VCR1_JUDGE_API_KEY", "sk-secret\nX-Evil: 1")
    with serving(says("7")) as server, pytest.raises(JudgeUnavailableError, match="holds characters") as raised:
        ask(client_of(server.url))
    assert "secret" not in str(raised.value)
    assert server.requests == []


def test_known_answers_are_not_asked_again(tmp_path):
    path = str(tmp_path / "new" / "folder" / "judge.sqlite")
    with serving(says("7"), sends(500)) as server:
        first = client_of(server.url, cache=path)
        assert [ask(first), ask(first)] == [7, 7]
        second = client_of(unused_url(), cache=path)  # another run, the server gone
        assert ask(second) == 7
        assert counts(second) == {"cache_hits": 1}
        with pytest.raises(JudgeUnavailableError):
            ask(client_of(server.url, cache=path, model="another-model"))
    assert counts(first) == {"requests": 1, "cache_hits": 1}


def test_unreadable_answers_are_not_stored(tmp_path):
    with serving(says("seven"), says("7")) as server:
        assert ask(client_of(server.url, cache=str(tmp_path / "c.sqlite"))) == 7
        assert ask(client_of(server.url, cache=str(tmp_path / "c.sqlite"))) == 7
    assert len(server.requests) == 2


def test_nothing_is_opened_before_the_first_question(tmp_path):
    with serving(says("7")) as server:
        client_of(server.url, cache=str(tmp_path / "judge.sqlite"))
        assert list(tmp_path.iterdir()) == []
        assert server.requests == []


def test_the_runs_random_numbers_do_not_depend_on_the_judge():
    random.seed(3)
    expected = random.random()
    random.seed(3)
    with serving(sends(500), says("7")) as server:
        ask(client_of(server.url))
    assert random.random() == expected


def test_a_proxy_of_the_environment_is_used_but_not_for_this_machine(monkeypatch):
    with serving(says("7")) as server:
        monkeypatch.setenv("http_proxy", server.url.removesuffix("/v1"))
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert ask(client_of("http://judge.invalid:8000/v1")) == 7
        assert server.requests[0]["path"] == "http://judge.invalid:8000/v1/chat/completions"
        monkeypatch.setenv("http_proxy", unused_url())
        assert ask(client_of(server.url)) == 7


def test_read_completion():
    assert read_completion(completion("text")) == ("text", False)
    assert read_completion(completion("cut", "length")) == ("cut", True)
    assert read_completion(json.dumps({"choices": [{"message": {"content": "x"}}]}).encode()) == ("x", False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "127.0.0.1:8000/v1"}, "judge.url is not http:// or https://"),
        ({"url": "ftp://a/v1"}, "judge.url is not http"),
        ({"url": "http://a:port/v1"}, "judge.url is not http"),
        ({"url": "http:///v1"}, "judge.url is not http"),
        ({"url": "http://user:pass@a/v1"}, "judge.url holds a user or password"),
        ({"timeout_s": 0.0}, "judge.timeout_s is 0.0, wanted more than 0"),
        ({"max_concurrency": 0}, "judge.max_concurrency is 0, wanted more than 0"),
        ({"max_retries": -1}, "judge.max_retries is -1, wanted >= 0"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(ConfigError, match=message) as raised:
        JudgeConfig(**options)
    assert "pass@" not in str(raised.value)
