"""Every kernel of the sources is among the launches that are compiled offline, and in the reports that are shipped."""

import ast
import json
from pathlib import Path

import pytest

pytest.importorskip("triton")
from compiling import compile_kernels  # noqa: E402
from head_launches import launches_of, name_of  # noqa: E402
from small_launches import small_launches  # noqa: E402

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks" / "results"
CASES = [("fused", {"frozen": True}), ("fused", {"cached": True}), ("fused", {"specialised": True}), ("chunked", {})]
ONLY_ON = {"warp_specialized_kernel": 90}


def entries(root: Path) -> set[str]:
    """"module:name" of the functions of Triton and Gluon that no other of them calls: what Python launches."""
    jitted, used = {}, set()
    for path in sorted(root.rglob("*.py")):
        module = ".".join(path.relative_to(root.parent).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(x) for x in node.decorator_list):
                jitted[node.name] = f"{module}:{node.name}"
                body = (x for statement in node.body for x in ast.walk(statement))
                used |= {x.id for x in body if isinstance(x, ast.Name) and x.id != node.name}
    return {place for name, place in jitted.items() if name not in used}


def test_every_kernel_is_compiled():
    found = entries(ROOT / "kernels" / "amopo_kernels") | entries(ROOT / "amopo_fast")
    assert len(found) > 12 and all(name.endswith("_kernel") for name in found)
    launches = [x for kind in small_launches(90).values() for x in kind]
    for backend, case in CASES:
        launches += launches_of(90, backend, **case)
    assert {launch.kernel for launch in launches} == found
    for path in sorted(RESULTS.glob("compile_report-triton-*.json")):
        rows = json.loads(path.read_text())["rows"]
        assert [(row["kernel"], row["case"]) for row in rows if row["status"] != "ok"] == [], path.name
        for cc in (80, 90, 100):
            compiled = {row["kernel"].split(",")[0] for row in rows if row["cc"] == cc}
            names = {name.split(":")[1].strip("_") for name in found}
            assert compiled == {name for name in names if ONLY_ON.get(name, cc) == cc}, (path.name, cc)


@pytest.mark.slow
def test_eight_threads_of_chunked_finish_a_row():
    """Three shuffles each for its label, maximum and sum, and four to find whether a label is there; in the layout that
    Triton chooses by itself it takes 140."""
    launches = [x for cc in (80, 90, 100) for x in launches_of(cc, "chunked") if name_of(x).endswith(", LogSumExp")]
    for compiled in compile_kernels(launches):
        compiled.check(matmul=False)
        assert compiled.ptx.count("shfl.sync") <= 13 and "ld.global.v4" in compiled.ptx
