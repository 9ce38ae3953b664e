"""No test leaves this machine; a Hub that does not answer costs one question, and the message has both remedies."""

import http.server
import logging
import socket
import threading

import pytest
from huggingface_hub import constants

from amopo_fast import hub
from amopo_fast.cli import main


def test_a_test_cannot_reach_a_network():
    with pytest.raises(AssertionError, match="no test touches a network"):
        socket.create_connection(("192.0.2.1", 80), timeout=0.1)
    with pytest.raises(AssertionError, match="no test touches a network"):
        socket.getaddrinfo("example.org", 80)


@pytest.fixture
def endpoint(monkeypatch):
    """Sets the Hub's address, as for a user who has not chosen the offline mode."""

    def use(url):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        hub._answers.cache_clear()

    yield use
    hub._answers.cache_clear()


@pytest.fixture
def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_an_unreachable_hub_is_asked_once_and_both_remedies_are_named(endpoint, closed_port, tmp_path, capsys, caplog):
    endpoint(f"http://127.0.0.1:{closed_port}")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    options = ["--train_data", str(tmp_path / "pairs.jsonl"), "--output_dir", str(tmp_path / "run")]
    with caplog.at_level(logging.WARNING):
        assert main(["train", "--model_name_or_path", "nobody/nothing", *options]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "nobody/nothing" in error
    assert "give the path of a folder that you have" in error and "HF_ENDPOINT" in error
    assert caplog.text.count("does not answer") == 1 and "Retrying" not in caplog.text


def test_a_hub_that_answers_is_used(endpoint):
    class Answer(http.server.BaseHTTPRequestHandler):
        asked = 0

        def do_HEAD(self):
            type(self).asked += 1
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint(f"http://127.0.0.1:{server.server_port}")
    for _ in range(2):
        hub.prefer_cache_if_unreachable("nobody/nothing")
    server.shutdown()
    assert not constants.HF_HUB_OFFLINE and Answer.asked == 1 and hub.remedy("nobody/nothing") == ""


def test_a_local_path_asks_nobody(endpoint, closed_port, tmp_path):
    endpoint(f"http://127.0.0.1:{closed_port}")
    hub.prefer_cache_if_unreachable(str(tmp_path))
    assert not constants.HF_HUB_OFFLINE
