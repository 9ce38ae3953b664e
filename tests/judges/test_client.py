"""A server that fails, hangs, answers garbage or asks to wait; a key that leaks nowhere; a cache that pays once."""

import json
import logging
import threading
import time

import pytest
from judge_server import Cut, Dribble, Hang, JudgeServer

from amopo_fast.errors import JudgeError, OptionError
from amopo_fast.judges import client
from amopo_fast.judges.cache import Reply, ReplyCache, key_of
from amopo_fast.judges.client import ChatClient, _retry_after

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(client, "GRACE", 1.0)


def ask(server, prompts, **options):
    options = {"model": "judge", "timeout": 5.0, "retries": 3, **options}
    made = ChatClient(server.url, **options)
    return made.replies(prompts), made


def echo(body, number):
    return f"about {body['messages'][-1]['content']}"


def test_replies_come_in_the_order_of_the_prompts_several_at_a_time():
    def slow(body, number):
        time.sleep(0.05)
        return echo(body, number)

    prompts = [f"p{i}" for i in range(12)]
    with JudgeServer(slow) as server:
        found, made = ask(server, prompts, concurrency=4, request={"max_tokens": None, "top_p": 0.5})
    assert found == [f"about {prompt}" for prompt in prompts]
    assert 2 <= server.most_at_once <= 4
    assert made.usage.requests == 12 and made.usage.prompt_tokens == 12 and made.usage.completion_tokens == 24
    assert server.bodies[0]["temperature"] == 0 and server.bodies[0]["top_p"] == 0.5
    assert "max_tokens" not in server.bodies[0] and server.bodies[0]["model"] == "judge"


GARBAGE = [
    (503, {}, b"overloaded"),
    (200, {}, b"<html>a proxy's page</html>"),
    (200, {}, b'{"error": "no"}'),
    (200, {}, b'{"choices": [{"message": {"content": 5}}]}'),
    (200, {}, b'["a list"]'),
    (200, {}, b"\xff\xfe"),
    Cut(),
]


@pytest.mark.parametrize("failure", GARBAGE, ids=str)
def test_what_may_pass_is_tried_again(failure):
    def twice_bad(body, number):
        if number > 2:
            return "fine"
        if isinstance(failure, Exception):
            raise failure
        return failure

    with JudgeServer(twice_bad) as server:
        found, made = ask(server, ["p"])
    assert found == ["fine"] and len(server.bodies) == 3 and made.usage.requests == 1


@pytest.mark.parametrize("failure", [*GARBAGE[:3], Cut()], ids=str)
def test_what_does_not_pass_ends_with_what_the_server_said(failure):
    def bad(body, number):
        if isinstance(failure, Exception):
            raise failure
        return failure

    with JudgeServer(bad) as server, pytest.raises(JudgeError, match="at the last of 3 tries") as raised:
        ask(server, ["p"], retries=2)
    assert len(server.bodies) == 3 and "what was answered is kept" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("failure", [Hang, Dribble])
def test_a_server_that_hangs_is_left(failure):
    def hang(body, number):
        raise failure

    begin = time.monotonic()
    with JudgeServer(hang) as server, pytest.raises(JudgeError, match="no reply in 0.2 s, at the last of 2 tries"):
        ask(server, ["p"], timeout=0.2, retries=1)
    assert len(server.bodies) == 2 and time.monotonic() - begin < 8


def test_nobody_there():
    with JudgeServer(echo) as server:
        pass
    with pytest.raises(JudgeError, match="no reply .*refused"):
        ask(server, ["p"], retries=1)


def test_retry_after_holds_back_every_request():
    def limited(body, number):
        return (429, {"Retry-After": "1"}, b"slow down") if number == 1 else "fine"

    with JudgeServer(limited) as server:
        found, _ = ask(server, ["a"], retries=1)
        first, second = server.times
        ask(server, ["b", "c"])
    assert found == ["fine"] and second - first >= 0.99

    made = ChatClient("http://127.0.0.1:1/v1", "judge")
    made._pause_until = time.monotonic() + 0.3
    begin = time.monotonic()
    made._wait()  # what every request does first
    assert time.monotonic() - begin >= 0.29


def test_a_server_that_asks_for_hours_is_left_at_once():
    def limited(body, number):
        return 429, {"Retry-After": "7200"}, b"quota"

    with JudgeServer(limited) as server, pytest.raises(JudgeError, match="quota, and asks to wait for 7200 s"):
        ask(server, ["p"])
    assert len(server.bodies) == 1


def test_retry_after_is_a_number_or_a_date():
    assert _retry_after("1.5") == 1.5 and _retry_after("-3") == 0 and _retry_after("") is None
    assert _retry_after("soon") is None and _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "MY_JUDGE_KEY to a valid"), (403, "may use this model"), (404, "up to and with /v1"), (418, "status 418")],
)
def test_what_no_second_try_mends_is_said_at_once(status, message):
    def bad(body, number):
        return status, {}, b"no"

    with JudgeServer(bad) as server, pytest.raises(JudgeError, match=message):
        ask(server, ["p"], key_name="MY_JUDGE_KEY")
    assert len(server.bodies) == 1


def test_an_answer_that_is_refused_costs_that_answer_alone():
    def too_long(body, number):
        return (400, {}, b"context length") if "long" in body["messages"][0]["content"] else "fine"

    with JudgeServer(too_long) as server:
        found, made = ask(server, ["a", "long", "b"])
    assert found == ["fine", None, "fine"]
    assert made.usage.unknown == {"the server refused the request": 1} and "context length" in made.usage.notes()[0]


def test_a_server_that_refuses_everything_is_left():
    def bad(body, number):
        return 422, {}, b"no such field"

    with JudgeServer(bad) as server, pytest.raises(JudgeError, match="refused 8 requests in a row.*no such field"):
        ask(server, [f"p{i}" for i in range(100)], concurrency=2)
    assert len(server.bodies) < 12


# the key


def test_the_key_is_sent_and_stands_nowhere_else(tmp_path, caplog, capsys):
    caplog.set_level(logging.DEBUG)

    def bad(body, number):
        if number < 3:
            return "fine"
        return 401, {}, f"Incorrect API key provided: {KEY}".encode()

    with JudgeServer(bad) as server:
        made = ChatClient(server.url, "judge", KEY, "JUDGE_API_KEY", cache=ReplyCache(tmp_path / "cache.jsonl"))
        made.replies(["a", "b"])
        with pytest.raises(JudgeError) as raised:
            made.replies(["c"])
    assert server.keys == [f"Bearer {KEY}"] * 3
    said = [str(raised.value), repr(made), (tmp_path / "cache.jsonl").read_text(), caplog.text, *capsys.readouterr()]
    assert "<$JUDGE_API_KEY>" in said[0] and not any(KEY in text for text in said)


@pytest.mark.parametrize("status", [302, 307])  # urllib follows the first with a GET
def test_the_key_does_not_follow_a_redirect(status):
    with JudgeServer(echo) as other:

        def elsewhere(body, number):
            return status, {"Location": f"{other.url}/chat/completions"}, b""

        with JudgeServer(elsewhere) as server, pytest.raises(JudgeError, match="points to http://127.0.0.1"):
            ask(server, ["p"], key=KEY)
    assert other.keys == [] and other.gets == []


@pytest.mark.parametrize("key", [f"{KEY}\nX-Header: 1", f"{KEY} ", "schlüssel-0123456"])
def test_a_key_that_no_header_can_hold_is_refused_without_being_shown(key):
    with pytest.raises(OptionError, match="JUDGE_API_KEY has a blank") as raised:
        ChatClient("http://localhost/v1", "judge", key)
    assert key.split()[0] not in str(raised.value)


@pytest.mark.parametrize("url", [f"http://me:{KEY}@localhost/v1", f"http://localhost/v1?key={KEY}"])
def test_a_key_in_the_address_is_refused_without_being_shown(url):
    with pytest.raises(OptionError, match="would be printed") as raised:
        ChatClient(url, "judge")
    assert KEY not in str(raised.value)


def test_the_servers_only_model_needs_no_name():
    with JudgeServer(echo) as server:
        assert ask(server, ["p"], model="")[0] == ["about p"] and server.bodies[0]["model"] == "judge"
    with JudgeServer(echo, models=("a", "b")) as server, pytest.raises(OptionError, match=r"2 models \(a, b\)"):
        ask(server, ["p"], model="")


# the cache


def test_nothing_is_paid_twice(tmp_path):
    prompts = [f"p{i}" for i in range(20)]
    failing = threading.Event()

    def fails(body, number):
        if number > 7 and not failing.is_set():
            return 401, {}, b"expired"
        return echo(body, number)

    path = tmp_path / "cache.jsonl"
    with JudgeServer(fails) as server:
        with pytest.raises(JudgeError):
            ask(server, [*prompts, *prompts], cache=ReplyCache(path), concurrency=3)
        paid = len(path.read_text().splitlines())
        assert paid == 7
        failing.set()
        before = len(server.bodies)
        found, made = ask(server, [*prompts, *prompts], cache=ReplyCache(path), concurrency=3)
        assert found == [f"about {prompt}" for prompt in [*prompts, *prompts]]
        assert len(server.bodies) - before == 13 and made.usage.cached == 14
        assert ask(server, prompts, cache=ReplyCache(path))[1].usage.requests == 0
        asked = [body["messages"][0]["content"] for body in server.bodies[before:]]
        assert len(set(asked)) == 13
        ask(server, ["p0"], cache=ReplyCache(path), request={"temperature": 1})
        assert len(server.bodies) == before + 14  # another request is another reply


def test_a_line_that_a_kill_cut_short_is_asked_again(tmp_path):
    path = tmp_path / "cache.jsonl"
    cache = ReplyCache(path)
    bodies = [{"model": "m", "n": number} for number in range(3)]
    for body in bodies:
        cache.add(key_of(body), Reply("x\ud800", 1, 2))
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    again = ReplyCache(path)
    assert [again.get(key_of(body)) is not None for body in bodies] == [True, True, False]
    again.add(key_of(bodies[2]), Reply("y", 1, 2))
    whole = ReplyCache(path)
    assert whole.get(key_of(bodies[2])) == Reply("y", 1, 2) and whole.get(key_of(bodies[0])) == Reply("x\ud800", 1, 2)
    assert all(json.loads(line) for line in path.read_text().splitlines()[:2])
