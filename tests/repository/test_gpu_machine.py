"""The GPU tests can be collected where nothing optional is installed, and would not pass there interpreted.

`benchmarks/lookalike.sh` runs the same, and more, in an environment of that machine's versions.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from interpreted import interpreted_kernels

import amopo_kernels.rows.segment_sum as segment_sum

ROOT = Path(__file__).parents[2]
# Neither in the image of the GPU machine nor needed by what runs there.
ABSENT = ("torchao", "datasets", "bitsandbytes", "liger_kernel", "jsonschema", "trl", "cut_cross_entropy", "flash_attn",
          "deepspeed", "ruff", "mypy")  # fmt: skip


def test_gpu_tests_are_collected_without_optional_packages():
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("tests/helpers", ".", "kernels"))
    environment = os.environ | {"PYTHONPATH": paths, "WITHOUT_PACKAGES": ",".join(ABSENT)}
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
    marked = [str(path.relative_to(ROOT)) for path in files if "pytest.mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-p", "without_packages", "--collect-only", "--assert=plain",
               "-m", "gpu", *marked]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    collected = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert len(marked) > 10 and collected == set(marked)


def test_one_place_sets_the_interpreter_and_it_is_seen():
    """What conftest.py asserts of GPU tests is false here, where there is no GPU."""
    assert (f"{segment_sum.__name__}.segment_sum_kernel" in interpreted_kernels()) != torch.cuda.is_available()
    setting = re.compile(r"""TRITON_INTERPRET["']\]?( *=|, *["']1)""")
    setters = [path for path in (ROOT / "tests").rglob("*.py")
               if any(setting.search(line) for line in path.read_text().splitlines())]  # fmt: skip
    assert setters == [ROOT / "tests" / "conftest.py"]


def test_no_module_of_tests_needs_an_optional_package_to_be_imported():
    """A run of some tests imports all files; importorskip at the top of one says that it may be absent."""
    needing = set()
    for path in (ROOT / "tests").rglob("*.py"):
        text = path.read_text()
        for node in ast.parse(text).body:
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            packages = {name.split(".")[0] for name in names} & set(ABSENT)
            needing |= {(path.name, each) for each in packages if f'importorskip("{each}"' not in text}
    assert needing == set()
