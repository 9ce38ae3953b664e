"""Bad inputs of every kind: each ends with what is wrong by name, the remedy and its exit code, without a traceback.

docs/errors.md has their number.
"""

from pathlib import Path

import pytest
from bad_input import Bad, what_is_wrong
from files_as_input import FILES_GIVEN
from good_files import make_inputs, make_outputs
from numbers_as_input import NUMBERS, TRAIN
from odd_files_as_input import ODD_FILES
from paths_as_input import PATHS_GIVEN
from records_as_input import RECORDS_GIVEN
from words_as_input import WORDS

PAGE = Path(__file__).parents[3] / "docs" / "errors.md"
ALL = [*NUMBERS, *PATHS_GIVEN, *FILES_GIVEN, *RECORDS_GIVEN, *WORDS, *ODD_FILES]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def work(inputs):
    make_outputs(inputs)
    return inputs


@pytest.fixture
def wrong(tmp_path, monkeypatch, capsys):
    """What is wrong with the end of a case, or ""."""
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.syspath_prepend(tmp_path / "here")  # where judges lie
    return lambda case, folder: what_is_wrong(case, folder, tmp_path / "here", capsys)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=[case.name for case in ALL])
def test_a_bad_input_is_named(case, work, wrong):
    assert wrong(case, work) == ""


# A few of each kind, of those that end before a model is loaded.
SLOWER = ("trained", "adapter", "64 MB", "gzip bomb")
SOME = [*NUMBERS[::37], *PATHS_GIVEN[:6], *RECORDS_GIVEN[::23], *WORDS[::31]]
QUICK = [case for case in SOME if not callable(case.command) and not any(part in f"{case}" for part in SLOWER)]


@pytest.mark.parametrize("case", QUICK, ids=[case.name for case in QUICK])
def test_some_of_them(case, inputs, wrong):
    assert wrong(case, inputs) == ""


def test_what_is_not_named_is_seen(inputs, wrong):
    good = Bad("good", ("validate", "{work}/pairs.json", "--dimensions", "helpfulness"), ("nothing",), 1)
    assert wrong(good, inputs).startswith("exit code 0")
    beta = ("train", "--beta", "-1")
    assert wrong(Bad("another name", beta, ("gamma",)), inputs).startswith("says nothing of ['gamma']")
    assert wrong(Bad("another code", beta, ("beta",), 1), inputs).startswith("exit code 2")
    assert wrong(Bad("named", (*TRAIN, *beta[1:]), ("beta",)), inputs) == ""
    failing = Bad("a failing call", lambda work, here: {}["key"], ())
    assert wrong(failing, inputs) == "a traceback: KeyError: 'key'"


def test_the_page_has_their_number():
    assert len({case.name for case in ALL}) == len(ALL)
    assert f"{len(ALL):,} of {len(ALL):,} bad inputs" in PAGE.read_text(encoding="utf-8")
