"""amopo-kernels as a distribution: it builds, installs alone, and needs nothing of the trainer."""

import ast
import email
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import amopo_kernels

SOURCE = Path(__file__).parents[2] / "kernels"
PACKAGE = SOURCE / "amopo_kernels"
# What a room may import of its neighbours; all of them take what lies beside them (dispatch, errors, types, ...).
BELOW = {"head": set(), "rows": set(), "cross_entropy": {"head"}, "statistics": {"head"},
         "loss": {"head", "statistics"}, "integrations": {"head"}}  # fmt: skip

ALONE = """
import importlib.abc, json, sys

class Absent(importlib.abc.MetaPathFinder):
    names = {"transformers", "peft", "datasets", "matplotlib", "accelerate", "amopo_fast"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}: it is absent here", name=name)

sys.meta_path.insert(0, Absent())
import torch

before = set(sys.modules)
import amopo_kernels
imported = set(sys.modules) - before

torch.manual_seed(0)
lengths = [3, 2, 4, 1]
hidden = torch.randn(10, 8, dtype=torch.float64, requires_grad=True)
weight = torch.randn(30, 8, dtype=torch.float64, requires_grad=True)
labels = torch.randint(30, (10,))
cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
options = {"order": "alternating", "num_dimensions": 2, "beta": 0.8, "gamma": 1.5, "weighting": "mean"}
gradients = []
for functions in (amopo_kernels, amopo_kernels.reference):
    loss = functions.linear_amopo_loss(hidden, weight, labels, cu_seqlens, **options).loss
    gradients.append(torch.autograd.grad(loss, (hidden, weight)))
error = max(((a - b).norm() / b.norm()).item() for a, b in zip(*gradients))
print(json.dumps({"file": amopo_kernels.__file__, "version": amopo_kernels.__version__, "error": error,
                  "runs": list(amopo_kernels.dispatch.runs()), "imported": sorted(imported),
                  "loaded": sorted(set(sys.modules) - before)}))
"""


def run(*command, cwd, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    result = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist), built without a network from a copy: a build leaves files beside its sources."""
    folder = tmp_path_factory.mktemp("build")
    shutil.copytree(SOURCE, folder / "kernels", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    run("-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "kernels", cwd=folder)
    [wheel], [sdist] = (list((folder / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    return wheel, sdist


def test_wheel_and_sdist_hold_the_package_and_nothing_else(built):
    wheel, sdist = built
    wanted = {str(path.relative_to(SOURCE)) for path in PACKAGE.rglob("*") if path.suffix in (".py", ".typed")}
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = email.message_from_bytes(archive.read(next(name for name in names if name.endswith("/METADATA"))))
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert any(name.endswith("LICENSE") for name in names)
    assert metadata["Name"] == "amopo-kernels" and metadata["Version"] == amopo_kernels.__version__
    requirements = [re.sub(r"\s|[\"']", "", requirement) for requirement in metadata.get_all("Requires-Dist")]
    assert requirements == ["torch>=2.11", "triton>=3.6;platform_system==Linux"]
    assert (SOURCE / "LICENSE").read_text() == (SOURCE.parent / "LICENSE").read_text()
    shutil.unpack_archive(sdist, sdist.parent)
    [source] = sdist.parent.glob("amopo_kernels-*/")
    assert wanted | {"pyproject.toml", "README.md", "LICENSE"} <= {
        str(path.relative_to(source)) for path in source.rglob("*")
    }


def test_installed_alone_it_computes_and_imports_neither_the_trainer_nor_triton(built, tmp_path):
    target = tmp_path / "site"
    run("-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", target, built[0], cwd=tmp_path)
    found = json.loads(run("-c", ALONE, cwd=tmp_path, PYTHONPATH=str(target)))
    assert Path(found["file"]).is_relative_to(target) and found["version"] == amopo_kernels.__version__
    assert found["runs"] == [["torch", "exact"]] and found["error"] < 1e-12
    assert not {name.partition(".")[0] for name in found["loaded"]} & {"transformers", "amopo_fast", "triton"}
    # Cheap to import: nothing but itself, beyond what torch has loaded anyway and a few files of the standard library.
    others = {name.partition(".")[0] for name in found["imported"]} - {"amopo_kernels", *sys.stdlib_module_names}
    assert not others


def imports(path):
    """Absolute names of what a module of the package imports, at the top or in a function."""
    package = ["amopo_kernels", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_import_torch_triton_and_the_rooms_below(path):
    room = path.relative_to(PACKAGE).parts[0]
    for name in imports(path):
        first, *rest = name.split(".")
        assert first in {"torch", "triton", "amopo_kernels", *sys.stdlib_module_names}, name
        if room in BELOW and first == "amopo_kernels" and rest and rest[0] in BELOW:
            assert rest[0] in BELOW[room] | {room}, f"{path.name} imports {name}"


def test_example_of_the_readme_runs_and_its_links_lead_somewhere():
    text = (SOURCE / "README.md").read_text()
    [code] = [block for block in re.findall(r"(?:^ {4}.*\n|^\n)+", text, re.MULTILINE) if "import torch" in block]
    names = {}
    exec(re.sub(r"^ {4}", "", code, flags=re.MULTILINE), names)
    assert names["hidden"].grad.abs().sum() > 0 and names["entropy"].shape == (7,)
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (SOURCE / target).exists(), target
