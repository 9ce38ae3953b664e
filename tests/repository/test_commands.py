"""The commands of README are the ones that CI and CONTRIBUTING run."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_ci_and_contributing_run_the_command_of_the_readme():
    commands = re.findall(r"^ {4}(python -m pip install .* && .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    [tests] = [command for command in commands if command.endswith("python -m pytest")]
    assert len(commands) == 2
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert script[-1] == tests
    assert [line.split("=")[0] for line in script if line.startswith("export")] == ["export PATH"]
    assert f"    {tests}\n" in (ROOT / "CONTRIBUTING.md").read_text()
