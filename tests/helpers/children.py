"""The environment of the processes that tests start."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]


def child_environment(*folders: Path, **variables: str) -> dict[str, str]:
    """This process's, with this checkout and the folders first on PYTHONPATH, and the variables."""
    path = [*map(str, (ROOT, ROOT / "kernels", *folders)), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), **variables}
