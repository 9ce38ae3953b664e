"""Bad inputs of every kind: each ends with what is wrong by name, the remedy and its exit code, without a traceback.

docs/errors.md has their number.
"""

import pytest
from bad_input import what_is_wrong
from good_files import make_inputs, make_outputs
from numbers_as_input import NUMBERS


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def work(inputs):
    make_outputs(inputs)
    return inputs


ALL = NUMBERS


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=[case.name for case in ALL])
def test_a_bad_input_is_named(case, work, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    assert what_is_wrong(case, work, tmp_path / "here", capsys) == ""
