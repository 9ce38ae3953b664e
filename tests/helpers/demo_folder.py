"""A folder with the demo's untrained model and its tokenizer."""

from pathlib import Path

from amopo_fast.demo.model import demo_model
from amopo_fast.demo.tokenizer import demo_tokenizer


def demo_folder(path: str | Path) -> Path:
    """Save them at `path`, which is returned."""
    demo_model(0).save_pretrained(path)
    demo_tokenizer().save_pretrained(path)
    return Path(path)
