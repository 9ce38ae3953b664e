"""Messages of libraries that tell a user of this program nothing: each is named here, and nothing else is held back."""

from __future__ import annotations

import logging
import warnings

# logger: beginnings of its messages
_LOGGED = {
    # bitsandbytes looks for a kernel of 4-bit products on CPUs, which no run here uses
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
    # torchao is built for one version of torch; its optimizers need none of these files
    "torchao": ("Skipping import of cpp extensions", "Failed to load"),
    "torch.utils._pytree": ("<enum '",),
}
# peft asks transformers for a property by its former name
_WARNED = ("`is_gradient_checkpointing` is deprecated",)


def hold_back() -> None:
    """For a command line: hold these messages back in this process."""
    for name, beginnings in _LOGGED.items():
        logging.getLogger(name).addFilter(_Beginnings(beginnings))
    for beginning in _WARNED:
        warnings.filterwarnings("ignore", message=beginning.replace("`", "."), category=FutureWarning)


class _Beginnings(logging.Filter):
    def __init__(self, beginnings: tuple[str, ...]):
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginnings)
