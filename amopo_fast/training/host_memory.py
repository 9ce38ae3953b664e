"""What `weights` and `optimizer_states` host ask of a run's other options."""

from __future__ import annotations

from typing import Any

from amopo_fast.errors import OptionError
from amopo_fast.optim.choose import is_sharded


def refuse_in_host_memory(args: Any, *, adapter: bool = False) -> None:
    """Refuse what cannot go with states or weights in host memory, or has nothing of it.

    Args:
        args: an AMoPOConfig. adapter: whether an adapter is trained.

    Raises:
        OptionError: names the option of the two, what was found beside it and the remedy.
    """
    for name in ("optimizer_states", "weights"):
        if getattr(args, name) != "host":
            continue
        if is_sharded(args):
            reason = "FSDP and DeepSpeed place weights and states themselves, and have offload options of their own"
        elif args.world_size > 1:
            reason = f"{args.world_size} ranks (DDP) would each need all of it, and the step inside the backward pass"
            reason += " knows one GPU; start one process, or share the model between the GPUs with FSDP"
        elif adapter:
            reason = "an adapter's states are small and its frozen weights can be kept in 4 bits (load_in_4bit)"
        else:
            continue
        raise OptionError(f"{name}=host: {reason}; leave {name} out", name)
    if args.weights == "host":
        _require_every_layer_checkpointed(args)


def _require_every_layer_checkpointed(args: Any) -> None:
    on = "activation_checkpointing" if hasattr(args, "activation_checkpointing") else "gradient_checkpointing"
    options = getattr(args, f"{on}_kwargs") or {}
    found = (
        (f"{on}={getattr(args, on)}", not getattr(args, on)),
        (f"keep_layers={args.keep_layers}", args.keep_layers > 0),
        (f"{on}_kwargs with use_reentrant", bool(options.get("use_reentrant"))),
        (f"{on}_kwargs with every_n_layers", options.get("every_n_layers", 1) != 1),
    )
    for what, refused in found:
        if refused:
            raise OptionError(
                f"{what} beside weights=host: each layer leaves the device behind its forward pass, and has to be "
                f"recomputed, without reentrant passes, when it is back; leave {what.partition('=')[0]} out", "weights",
            )  # fmt: skip
