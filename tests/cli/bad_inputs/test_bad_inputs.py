"""Bad inputs of every kind: each ends with what is wrong by name, the remedy and its exit code, without a traceback.

docs/errors.md has their number.
"""

import pytest
from bad_input import what_is_wrong
from files_as_input import FILES_GIVEN
from good_files import make_inputs, make_outputs
from numbers_as_input import NUMBERS
from paths_as_input import PATHS_GIVEN
from records_as_input import RECORDS_GIVEN
from words_as_input import WORDS


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def work(inputs):
    make_outputs(inputs)
    return inputs


ALL = [*NUMBERS, *PATHS_GIVEN, *FILES_GIVEN, *RECORDS_GIVEN, *WORDS]


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=[case.name for case in ALL])
def test_a_bad_input_is_named(case, work, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.syspath_prepend(tmp_path / "here")  # where judges lie
    assert what_is_wrong(case, work, tmp_path / "here", capsys) == ""
