"""A pytest plugin (-p without_packages): packages that WITHOUT_PACKAGES names, comma-separated, are not installed."""

import importlib.machinery
import os
import sys

ABSENT = set(filter(None, os.environ.get("WITHOUT_PACKAGES", "").split(",")))


class _Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname.partition(".")[0] in ABSENT else super().find_spec(fullname, path, target)


loaded = ABSENT & sys.modules.keys()
assert not loaded, f"already imported: {loaded}"
sys.meta_path[:] = [_Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
