"""A server that speaks as much of OpenAI's chat protocol as a judge needs, and fails in the ways that servers do.

    with JudgeServer(answer) as server: ... server.url, server.bodies, server.keys

`answer(body, number)` gives a text, or (status, headers, body bytes), or raises `Hang` or `Cut`.
"""

from __future__ import annotations

import http.server
import json
import threading
import time


class Hang(Exception):
    """The server says nothing until it is closed."""


class Cut(Exception):
    """The server closes the connection in the middle of a reply."""


class Dribble(Exception):
    """The server sends a byte now and then, for ever."""


class JudgeServer:
    def __init__(self, answer, models=("judge",)):
        self.answer, self.models = answer, models
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.gets: list[str | None] = []  # keys of GET requests
        self.times: list[float] = []
        self.most_at_once = self._at_once = 0
        self._lock, self._closed = threading.Lock(), threading.Event()
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            _inside = False

            def do_GET(self):
                owner.gets.append(self.headers.get("Authorization"))
                self._send(200, {}, json.dumps({"data": [{"id": name} for name in owner.models]}).encode())

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner._lock:
                    owner.bodies.append(body)
                    owner.keys.append(self.headers.get("Authorization"))
                    owner.times.append(time.monotonic())
                    number = len(owner.bodies)
                    owner._at_once += 1
                    self._inside = True
                    owner.most_at_once = max(owner.most_at_once, owner._at_once)
                try:
                    found = owner.answer(body, number)
                    if isinstance(found, str):
                        prompt = body["messages"][-1]["content"]
                        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(found.split())}
                        found = {"choices": [{"message": {"role": "assistant", "content": found}}], "usage": usage}
                        found = 200, {}, json.dumps(found).encode()
                    self._send(*found)
                except Hang:
                    owner._closed.wait(20)
                except Cut:
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    self.wfile.write(b'{"choices": [')
                    self.close_connection = True
                except Dribble:
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    try:
                        while not owner._closed.wait(0.05):
                            self.wfile.write(b" ")
                    except OSError:
                        pass
                finally:
                    self._leave()

            def _leave(self):
                with owner._lock:
                    owner._at_once -= self._inside
                    self._inside = False

            def _send(self, status, headers, body):
                self._leave()  # a client that has the reply sends its next request before this thread goes on
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> JudgeServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()


def word_score(body, number=0) -> str:
    """A score that the words of the request decide, for tests that compare runs."""
    prompt = body["messages"][-1]["content"]
    return f"Score: {len(prompt.split()) % 6}"
