"""Requests to a server that speaks OpenAI's chat protocol: several at a time, tried again, paid for once.

    prompts -> keys -> cache, or threads -> POST /chat/completions -> cache -> replies

The standard library alone: what huggingface_hub installs beside itself changes between its releases. A key is read from
the environment, stands in a header and nowhere else, and is sent to no other address than the one that was named.
"""

from __future__ import annotations

import email.utils
import json
import queue
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from amopo_fast.errors import JudgeError, OptionError
from amopo_fast.judges.cache import Reply, ReplyCache, key_of
from amopo_fast.judges.judge import Usage, nothing

FIRST_PAUSE = 1.0  # seconds; each further try waits twice as long
LONGEST_PAUSE = 120.0  # a server that asks for more is left
GRACE = 5.0  # for the requests that are under way when another one fails: they are paid for
MOST_BYTES = 16 << 20  # of a reply
MOST_REFUSED = 8  # in a row: then it is not one answer that the server cannot take

_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529)
_REFUSED = (400, 413, 422)  # of this one request, such as one that is too long for the model
_REMEDY = {
    401: "set the environment variable {key} to a valid key",
    403: "set the environment variable {key} to a key that may use this model",
    404: "give the address up to and with /v1, and a model that the server has",
}


class _TryAgain(Exception):
    """A failure that may pass; `pause`: seconds that the server asks for, None where it does not."""

    def __init__(self, found: str, pause: float | None = None):
        super().__init__(found)
        self.pause = pause


class _Refused(Exception):
    """The server does not take this request."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would send the key on to wherever a server points."""

    def redirect_request(self, *args, **kwargs):
        return None


_opener = urllib.request.build_opener(_NoRedirects())


@dataclass
class ChatClient:
    """
    Attributes:
        url: up to and with /v1. model: "" takes the one that the server has.
        key: "" for none; key_name: the environment variable that holds it, for messages.
        concurrency: requests at a time. timeout: seconds for a reply. retries: further tries of a request that failed.
        request: further fields of the body; null removes one.

    Raises OptionError for an address that cannot be used, or a key that no header can hold.
    """

    url: str
    model: str = ""
    key: str = field(default="", repr=False)
    key_name: str = "JUDGE_API_KEY"
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 6
    request: Mapping[str, Any] = field(default_factory=dict)
    cache: ReplyCache = field(default_factory=ReplyCache, repr=False)
    usage: Usage = field(default_factory=Usage)

    def __post_init__(self):
        try:
            parts = urllib.parse.urlsplit(self.url)
            known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0  # a wrong port raises
        except ValueError as error:
            raise OptionError(f"judge {self.url!r} is no address: {error}; write it as http://localhost:8000/v1",
                              "judge") from None  # fmt: skip
        if not known:
            raise OptionError(f"judge {self.url!r} is no address; write it as http://localhost:8000/v1", "judge")
        if parts.username or parts.password or parts.query or parts.fragment:
            shown = f"{parts.scheme}://{parts.hostname}"
            raise OptionError(
                f"judge {shown}...: an address with a name, a password or a query in it would be printed and stored; "
                f"put the key into the environment variable {self.key_name}", "judge",
            )  # fmt: skip
        self.url = self.url.rstrip("/").removesuffix("/chat/completions")
        if not all("!" <= character <= "~" for character in self.key):
            raise OptionError(f"the key in {self.key_name} has a blank, a line end or another character that no header "
                              "can hold; set it again", "judge_key_env")  # fmt: skip
        self._pause_until = 0.0
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._refused_in_a_row = 0

    def find_model(self) -> str:
        """The model's name; where none is given the only one that the server has.

        Raises:
            OptionError: the server has several. JudgeError: it does not answer.
        """
        if not self.model:
            found = self._tried(lambda: self._exchange("/models", None))
            names = [str(each["id"]) for each in found.get("data") or () if isinstance(each, dict) and "id" in each]
            if len(names) != 1:
                listed = ", ".join(names[:10]) or "none"
                raise OptionError(f"{self.url} has {len(names)} models ({listed}): name one with --judge_model",
                                  "judge_model")  # fmt: skip
            self.model = names[0]
        return self.model

    def body(self, prompt: str) -> dict[str, Any]:
        body = {"model": self.find_model(), "messages": [{"role": "user", "content": prompt}], "temperature": 0,
                "max_tokens": 256, **self.request}  # fmt: skip
        return {name: value for name, value in body.items() if value is not None}

    def replies(self, prompts: Sequence[str], done: Callable[[int], None] = nothing) -> list[str | None]:
        """A reply to each prompt; None where the server refuses it, which `usage` counts.

        Equal prompts are asked once, and what the cache holds is not asked at all.

        Raises:
            JudgeError: the server cannot be reached or used. What it answered before is in the cache.
        """
        bodies = [self.body(prompt) for prompt in prompts]
        keys = [key_of(body) for body in bodies]
        times: dict[str, int] = {}
        for key in keys:
            times[key] = times.get(key, 0) + 1
        found: dict[str, Reply | None] = {}
        todo: queue.SimpleQueue = queue.SimpleQueue()
        waiting = 0
        for key, body in zip(keys, bodies, strict=True):
            if key in found:
                continue
            found[key] = self.cache.get(key)
            if found[key] is None:
                todo.put((key, body))
                waiting += 1
            else:
                self.usage.cached += times[key]
                done(times[key])
        if waiting:
            for key, reply in self._asked(todo, waiting):
                found[key] = reply
                done(times[key])
        return [None if (reply := found[key]) is None else reply.text for key in keys]

    def _asked(self, todo: queue.SimpleQueue, waiting: int):
        """(key, reply) of the requests of a queue, as they come."""
        finished: queue.SimpleQueue = queue.SimpleQueue()
        self._stop.clear()
        threads = [
            # Daemons: a server that hangs does not hold up the end of a program that was told to stop.
            threading.Thread(target=self._work, args=(todo, finished), name=f"judge {number}", daemon=True)
            for number in range(min(self.concurrency, waiting))
        ]
        for thread in threads:
            thread.start()
        try:
            for _ in range(waiting):
                key, result = finished.get()
                if isinstance(result, BaseException):
                    raise result
                yield key, result
        finally:
            self._stop.set()
            until = time.monotonic() + GRACE
            for thread in threads:
                thread.join(max(until - time.monotonic(), 0))

    def _work(self, todo: queue.SimpleQueue, finished: queue.SimpleQueue) -> None:
        while not self._stop.is_set():
            try:
                key, body = todo.get_nowait()
            except queue.Empty:
                return
            try:
                finished.put((key, self._reply(key, body)))
            except BaseException as error:
                finished.put((key, error))
                return

    def _reply(self, key: str, body: Mapping[str, Any]) -> Reply | None:
        try:
            reply = self._tried(lambda: _reply_of(self._exchange("/chat/completions", body)))
        except _Refused as error:
            with self._lock:
                self.usage.count_unknown("the server refused the request", str(error))
                self._refused_in_a_row += 1
                if self._refused_in_a_row < MOST_REFUSED:
                    return None
            raise JudgeError(f"{self.url} refused {MOST_REFUSED} requests in a row, the last: {error}; correct "
                             "judge_model, judge_request or the template") from None  # fmt: skip
        self.cache.add(key, reply)
        with self._lock:
            self._refused_in_a_row = 0
            self.usage.requests += 1
            self.usage.prompt_tokens += reply.prompt_tokens
            self.usage.completion_tokens += reply.completion_tokens
        return reply

    def _tried(self, once: Callable[[], Any]) -> Any:
        for attempt in range(self.retries + 1):
            self._wait()
            try:
                return once()
            except _TryAgain as error:
                if (error.pause or 0) > LONGEST_PAUSE:
                    raise JudgeError(f"{self.url}: {error}, and asks to wait for {error.pause:.0f} s: start again then "
                                     "with the same command; what was answered is kept") from None  # fmt: skip
                if attempt == self.retries:
                    raise JudgeError(f"{self.url}: {error}, at the last of {attempt + 1} tries: start again with the "
                                     "same command when it answers; what was answered is kept") from None  # fmt: skip
                pause = error.pause
                if pause is None:  # of different lengths, so that not all requests come back at once
                    pause = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1)
                    self._stop.wait(pause)
                else:
                    with self._lock:  # a limit is of all requests
                        self._pause_until = max(self._pause_until, time.monotonic() + pause)
        raise AssertionError("unreachable")

    def _wait(self) -> None:
        while (left := self._pause_until - time.monotonic()) > 0 and not self._stop.wait(left):
            pass
        if self._stop.is_set():
            raise JudgeError(f"{self.url}: stopped")

    def _exchange(self, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        """POST of a body, GET without one; the JSON object that comes back."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        if self.key:
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        deadline = time.monotonic() + self.timeout
        try:
            with _opener.open(request, timeout=self.timeout) as response:
                text = self._read(response, deadline)
        except urllib.error.HTTPError as error:
            raise self._failure(error, deadline) from None
        except TimeoutError:
            raise _TryAgain(f"no reply in {self.timeout:g} s") from None
        except (OSError, EOFError, ValueError) as error:  # of urllib and http.client, whatever breaks a connection
            if isinstance(getattr(error, "reason", None), TimeoutError):
                raise _TryAgain(f"no reply in {self.timeout:g} s") from None
            raise _TryAgain(self._hidden(f"no reply ({getattr(error, 'reason', None) or error})")) from None
        except Exception as error:  # http.client's own are no OSError
            raise _TryAgain(self._hidden(f"no reply ({type(error).__name__})")) from None
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise _TryAgain(f"a reply that is no JSON object: {self._hidden(_excerpt(text))}")
        return found

    @staticmethod
    def _read(response, deadline: float) -> bytes:
        """The whole body, by the deadline: a server that sends a byte now and then would never time out."""
        parts, size = [], 0
        while part := response.read1(1 << 16):
            size += len(part)
            if size > MOST_BYTES:
                raise _TryAgain(f"a reply of more than {MOST_BYTES >> 20} MiB")
            if time.monotonic() > deadline:
                raise TimeoutError
            parts.append(part)
        return b"".join(parts)

    def _failure(self, error: urllib.error.HTTPError, deadline: float) -> Exception:
        """What a status other than 200 means."""
        try:
            said = _excerpt(self._read(error, deadline))
        except Exception:  # a body that cannot be read says nothing
            said = ""
        found = self._hidden(f"status {error.code} {error.reason}" + (f": {said}" if said else ""))
        if error.code in _AGAIN:
            return _TryAgain(found, _retry_after(error.headers.get("Retry-After")))
        if error.code in _REFUSED:
            return _Refused(found)
        if 300 <= error.code < 400:
            return JudgeError(f"{self.url}: {found}, which points to {error.headers.get('Location', 'nowhere')}: give "
                              "that address, if it is the one that you mean")  # fmt: skip
        remedy = _REMEDY.get(error.code, "see what the server says").format(key=self.key_name)
        return JudgeError(f"{self.url}: {found}; {remedy}")

    def _hidden(self, text: str) -> str:
        """A server may repeat the key that it was given."""
        return text.replace(self.key, f"<${self.key_name}>") if self.key else text


def _reply_of(found: Mapping[str, Any]) -> Reply:
    try:
        text = found["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise _TryAgain(f"a reply without choices: {json.dumps(found)[:200]}") from None
    if text is not None and not isinstance(text, str):
        raise _TryAgain(f"a reply whose content is no text: {json.dumps(text)[:200]}")
    usage = found.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    counts = [value if isinstance(value := usage.get(name), int) else 0 for name in ("prompt_tokens",
              "completion_tokens")]  # fmt: skip
    return Reply(text or "", *counts)


def _excerpt(data: bytes) -> str:
    text = " ".join(data[:4000].decode("utf-8", "replace").split())
    return "".join(character if character.isprintable() else "?" for character in text)[:300]


def _retry_after(value: str | None) -> float | None:
    """Seconds, of a number of them or a date (RFC 9110, section 10.2.3)."""
    if not value:
        return None
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return None
