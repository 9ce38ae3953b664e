"""The order that tests/parallel.py gives the suite names files that exist."""

from pathlib import Path

from tests.parallel import LONGEST

TESTS = Path(__file__).parents[1]


def test_the_longest_files_are_there():
    assert not [name for name in LONGEST if not (TESTS / name).is_file()] and len(set(LONGEST)) == len(LONGEST)
