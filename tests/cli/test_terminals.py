"""What a command writes to and reads from: a terminal without UTF-8, a reader that leaves, an input that is closed."""

import errno
import io
import os
import sys
from types import SimpleNamespace

import pytest

from amopo_fast.cli import data, main
from amopo_fast.demo.data import DIMENSIONS, HELDOUT_FILE
from amopo_fast.evaluation import generation

VALIDATE = ["validate", str(HELDOUT_FILE), "--dimensions", *DIMENSIONS]


def test_a_terminal_without_utf_8(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(VALIDATE) == 0
    sys.stdout.flush()
    assert b"no bad records" in written.getvalue() and b"?" in written.getvalue()  # a bar


@pytest.mark.parametrize(
    "number, said", [(errno.EPIPE, ""), (errno.ENOSPC, "the output: No space left on device; check")]
)
def test_an_output_that_takes_nothing_more(number, said, monkeypatch, capsys):
    """`| head`, which has read enough, and a file on a full disk."""

    class Output(io.StringIO):
        def write(self, text):
            raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Output())
        patch.setattr(data, "run_validate", lambda arguments: print("a line"))
        assert main(VALIDATE) == 1
    error = capsys.readouterr().err
    assert said in error and "Errno" not in error and bool(said) == bool(error)


@pytest.fixture
def chat(monkeypatch):
    """The messages that a stand-in for a model is given in a conversation with `input`."""

    def talk(text):
        given = []

        def prompt(messages, target):
            if "refused" in messages[-1]["content"]:
                raise ValueError("the template refuses it")
            given.append([message["content"] for message in messages])
            return [1]

        model = SimpleNamespace(model=None, tokenizer=None, prompt=prompt)
        monkeypatch.setattr(generation.TrainedModel, "load", lambda *args, **kwargs: model)
        monkeypatch.setattr(generation, "generate", lambda *args, **kwargs: ["yes"])
        monkeypatch.setattr(sys, "stdin", None if text is None else io.TextIOWrapper(io.BytesIO(text)))
        return main(["chat", "model"]), given

    return talk


def test_a_chat_goes_on_after_bytes_that_are_no_text_and_after_what_is_refused(chat, capsys):
    code, given = chat(b"a\xffb\nrefused\nmore\n")
    assert code == 0 and given[1:] == [["a\ufffdb"], ["a\ufffdb", "yes", "more"]]
    assert "the template refuses it" in capsys.readouterr().out


def test_a_chat_without_an_input_is_refused(chat, capsys):
    assert chat(None)[0] == 2
    assert "its input is closed: give generate --prompt" in capsys.readouterr().err
