"""What a launcher started: variables of the environment that make sense together and agree with the run's options.

torchrun and `accelerate launch` say by them which process this is and how it shall train. Where they contradict each
other torch waits for processes that never come, or N runs train into one folder; where they contradict the options, the
run would be another one than its configuration says.
"""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

from amopo_fast.errors import OptionError

logger = logging.getLogger(__name__)

_START = "start with torchrun or accelerate launch, which set all of them, or unset it to train in one process"
_BOUNDS = {"WORLD_SIZE": (1, 2**31), "LOCAL_WORLD_SIZE": (1, 2**31), "RANK": (0, 2**31), "LOCAL_RANK": (-1, 2**31),
           "MASTER_PORT": (1, 2**16 - 1)}  # fmt: skip
# Of `accelerate launch`: (the values that change nothing, why it is refused otherwise and what to use).
_REFUSED = {
    "ACCELERATE_DYNAMO_BACKEND": (("no",), "compiles the whole model, for every row anew; use compile_layers"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (("1", "auto"), "the plan decides it; use pairs_per_step"),
    "ACCELERATE_USE_MEGATRON_LM": (("false", "0"), "Megatron-LM is not supported; use FSDP2 or DeepSpeed"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        ("false", "0"), "tensor and context parallelism are not supported; shard the model with FSDP2"
    ),
}  # fmt: skip


def check_launch() -> None:
    """The processes that the environment tells of, before torch waits for them. Warns where no host has rank 0's name.

    Raises:
        OptionError: a variable that is no number, is out of range, or is there without those it needs; names it.
    """
    numbers = {name: _number(name, *bounds) for name, bounds in _BOUNDS.items()}
    for name, of in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        value, count = numbers[name], numbers[of]
        if value is not None and count is not None and value >= count:
            raise OptionError(f"{name}={value} must be below {of}={count}: {_START}", name)
    joins = numbers["LOCAL_RANK"] not in (None, -1)  # accelerate looks at nothing else on a GPU
    first = "LOCAL_RANK" if joins else "WORLD_SIZE" if (numbers["WORLD_SIZE"] or 1) > 1 else ""
    needed = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not os.environ.get(name)]
    if first and missing:
        raise OptionError(f"{first}={os.environ[first]} is set without {', '.join(missing)}: {_START}", first)
    if first:
        _resolve(os.environ["MASTER_ADDR"])


def _resolve(host: str) -> None:
    """A name that is not known is no error yet: a cluster may make it known a little after its processes start."""
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        logger.warning(
            "MASTER_ADDR=%s is not known here (%s): torch asks again until its time is up and then ends; if it is "
            "misspelt, stop this run and correct it", host, error.strerror or error,
        )  # fmt: skip


def _number(name: str, low: int, high: int) -> int | None:
    """The value of a variable, None where it is not set."""
    text = os.environ.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.removeprefix("-").isdigit() and low <= int(text) <= high):
        bounds = f"from {low} to {high}" if high < 2**31 else f"of at least {low}"
        raise OptionError(f"{name}={text!r} is no whole number {bounds}: {_START}", name)
    return int(text)


def is_launched_on_cpu() -> bool:
    """By `accelerate launch --cpu`, which is use_cpu in other words."""
    return _is_true("ACCELERATE_USE_CPU")


def _is_true(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes", "on", "y", "t")


def check_launched_options(args: Any) -> None:
    """What `accelerate launch` asks for beside the run's own options. `bf16` and `fp16` are settled.

    Raises:
        OptionError: it asks for another precision, or for what the trainer refuses.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    ours = "fp16" if args.fp16 else "bf16" if args.bf16 else "no"
    if asked not in ("no", ours):
        use = f", or set {asked}: true in the run's too" if asked in ("bf16", "fp16") else "; bf16 and fp16 are known"
        raise OptionError(
            f"accelerate was started with mixed_precision {asked!r} (ACCELERATE_MIXED_PRECISION), and the run's "
            f"options say {ours}: leave it out there{use}", "bf16",
        )  # fmt: skip
    for name, (harmless, reason) in _REFUSED.items():
        value = os.environ.get(name, "")
        if value and value.lower() not in harmless:
            raise OptionError(f"{name}={value}, which accelerate launch set, is refused: {reason}", name)


def refuse_other_engine(args: Any) -> None:
    """When accelerate has found its processes: they are those that a launcher started, with the engine it asked for.

    Raises:
        OptionError: N processes that would each train alone into one folder, or sharding that would not happen.
    """
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if started != args.world_size:
        raise OptionError(
            f"{started} processes were started (WORLD_SIZE), and each would train a run of its own into output_dir, as "
            f"accelerate finds {args.world_size} on {args.device.type}: set use_cpu where there are no GPUs, or start "
            "one process", "use_cpu",
        )  # fmt: skip
    engine = engine_asked_for(args)
    if engine and args.device.type == "cpu":
        raise OptionError(
            f"{engine} was asked for, and on a CPU accelerate would silently run DDP: leave one of them out", "use_cpu"
        )


def engine_asked_for(args: Any) -> str:
    """The sharding engine that options or `accelerate launch` name: "FSDP", "FSDP2", "DeepSpeed" or ""."""
    launched = {name for name in ("FSDP", "DEEPSPEED") if _is_true(f"ACCELERATE_USE_{name}")}
    if args.deepspeed or "DEEPSPEED" in launched:
        return "DeepSpeed"
    if not (args.fsdp or "FSDP" in launched):
        return ""
    config = args.fsdp_config if isinstance(args.fsdp_config, dict) else {}
    version = config.get("fsdp_version", config.get("version")) or os.environ.get("FSDP_VERSION", "1")
    return "FSDP2" if str(version) == "2" else "FSDP"
