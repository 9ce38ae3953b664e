"""What runs code where it is unpickled."""

from pathlib import Path


class Evil:
    """Pickled, it creates a file when it is loaded."""

    def __init__(self, path: str | Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))
