"""AdamW that can step inside the backward pass, with float32, 8-bit or 4-bit states and stochastic rounding."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw
from torch.utils.weak import WeakIdKeyDictionary

from amopo_fast.optim import update_triton
from amopo_fast.optim.host_states import HostStates
from amopo_fast.optim.states import MOMENTS, moments_of, new_state
from amopo_fast.optim.update import Step, rounding_seed, update_

CLIPPING = ("previous_norm", "per_tensor")

# Parameter -> handle of its hook: the newest optimizer over a parameter is the one that steps it.
_hooks = WeakIdKeyDictionary()


class AdamW(torch.optim.Optimizer):
    """AdamW over parameters of one device each, float32 or bfloat16.

    With `in_backward` every parameter is stepped by a hook as soon as the backward pass has completed its gradient,
    and the gradient is freed at once: never more than the unfinished gradients exist. `step()` then only ends the
    optimizer step. One backward pass is one step, so gradients cannot be accumulated. From the first gradient
    that is not finite on, no parameter is changed in that backward pass (`applied`); the host does not wait for it.

    float32 parameters with float32 states use torch's fused AdamW and equal `torch.optim.AdamW(fused=True)` bit for
    bit. All else uses the arithmetic of torchao's AdamW8bit and AdamW4bit: on CUDA in one kernel per tensor without
    temporaries (update_triton.py), elsewhere in plain torch, in pieces.

    Args:
        params, lr, betas, eps, weight_decay: as torch.optim.AdamW; several groups and schedules work.
        states: "fp32" (8 bytes per parameter), "8bit" (2.03), "4bit" (1.06). Tensors of fewer than 4096 elements
            keep float32 states.
        stochastic_rounding: of bfloat16 parameters. False rounds to nearest.
        in_backward: step in the backward pass.
        max_grad_norm: clip gradients to this norm, 0: never.
        host_blocks: keep the states of these parameters in host memory, each block's together (`blocks_of`), and bring
            them to the device for the update (host_states.py): bit for bit the same. With in_backward only.
        device: where parameters are when they are stepped, if not where they are now (models/streaming.py).
        clipping: which norm, with in_backward (an ordinary step leaves clipping to the caller):
            "previous_norm": the global norm of the previous step (it is part of the state), because this step's is
            known only at its end; the first step clips per tensor. "per_tensor": each tensor's own norm.
        seed: of the stochastic rounding.

    Raises:
        ValueError: sharded (DTensor) or non-contiguous parameters, unknown options, host_blocks without in_backward.
        RuntimeError: a second backward pass before `step()`, with in_backward; host memory that cannot be had.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        states: str = "fp32",
        stochastic_rounding: bool = True,
        in_backward: bool = False,
        max_grad_norm: float = 0.0,
        clipping: str = "previous_norm",
        seed: int = 0,
        host_blocks: Sequence[Sequence[Tensor]] = (),
        device: torch.device | None = None,
    ):
        if states not in ("fp32", "8bit", "4bit"):
            raise ValueError(f"states={states!r}; choose one of fp32, 8bit, 4bit")
        if clipping not in CLIPPING:
            raise ValueError(f"clipping={clipping!r}; choose one of {', '.join(CLIPPING)}")
        if host_blocks and not in_backward:
            raise ValueError("host_blocks need in_backward: elsewhere parameters are not stepped layer by layer")
        for parameter in (parameter for block in host_blocks for parameter in block):
            self._check(parameter)
            if parameter.dtype == torch.float64:
                raise ValueError("states in host memory are float32 at most; train in float32 or bfloat16")
        self._states = states
        self._device = device
        self._host = HostStates(host_blocks, states, device) if host_blocks else None
        self._begun = False  # whether some state is not zero
        self._stochastic_rounding = stochastic_rounding
        self.in_backward = in_backward
        self._max_grad_norm = max_grad_norm
        self._clipping = clipping
        self._seed = seed
        self._place: dict[Tensor, tuple[int, int]] = {}  # parameter -> (its group, its number)
        self._applied: dict[Tensor, Tensor] = {}  # parameter -> () bool, whether all gradients so far were finite
        self._square_sum: Tensor | None = None  # of this step's gradients so far, () float32
        self._previous_norm: Tensor | None = None
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    # ----- parameters -----

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = len(self.param_groups) - 1
        for parameter in self.param_groups[group]["params"]:
            self._check(parameter)
            self._place[parameter] = (group, len(self._place))
            # States exist from the start: what does not fit fails here, and not between two layers' gradients.
            self.state[parameter] = self._new_state(parameter)
            if self.in_backward:
                self._register(parameter)

    @staticmethod
    def _check(parameter: Tensor) -> None:
        if hasattr(parameter, "to_local"):
            raise ValueError(
                "sharded parameters (DTensor, FSDP2) are not supported: their low-bit blocks would depend on the "
                "sharding; use --optim adamw_torch_8bit with --optim_args bf16_stochastic_round=True"
            )
        if not parameter.is_contiguous():
            raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is not contiguous; call .contiguous()")
        if parameter.dtype not in (torch.float32, torch.float64, torch.bfloat16):
            raise ValueError(f"parameters of {parameter.dtype} are not supported; train in float32 or bfloat16")

    def _fused(self, parameter: Tensor) -> bool:
        return self._states == "fp32" and parameter.dtype != torch.bfloat16

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        fused, device = self._fused(parameter), self._device or parameter.device
        step = torch.zeros((), dtype=torch.float32, device=device if fused else "cpu")
        if self._host is not None and parameter in self._host:
            return {"step": step, **self._host.state_of(parameter)}
        values = parameter.dtype if fused else torch.float32
        return {"step": step, **new_state(parameter, self._states, values, device)}

    def _register(self, parameter: Tensor) -> None:
        if parameter in _hooks:
            _hooks.pop(parameter).remove()
        owner = weakref.ref(self)  # an optimizer that is gone steps nothing

        def hook(completed: Tensor) -> None:
            optimizer = owner()
            if optimizer is not None:
                optimizer._on_gradient(completed)

        _hooks[parameter] = parameter.register_post_accumulate_grad_hook(hook)

    # ----- stepping -----

    @torch.no_grad()
    def _on_gradient(self, parameter: Tensor) -> None:
        if parameter in self._applied:
            raise RuntimeError(
                "a second gradient arrived for a parameter that was already stepped: with the optimizer step inside "
                "the backward pass, call step() after every backward pass, do not accumulate gradients, and use "
                "checkpointing with use_reentrant=False"
            )
        grad = parameter.grad
        parameter.grad = None
        norm = torch.linalg.vector_norm(grad, dtype=torch.float32)
        if self._square_sum is None:
            self._square_sum = torch.zeros((), dtype=torch.float32, device=norm.device)
        self._square_sum += norm.square().to(self._square_sum.device)
        finite = self._square_sum.isfinite().to(norm.device)
        self._applied[parameter] = finite
        scale = self._grad_scale(norm)
        self._update(parameter, grad, torch.where(finite, 1.0 if scale is None else scale, float("nan")))

    def _grad_scale(self, norm: Tensor) -> Tensor | None:
        """() float32, at most 1; a tensor, so that the host does not wait for the norm."""
        if self._max_grad_norm <= 0:
            return None
        if self._clipping == "previous_norm" and self._previous_norm is not None:
            norm = self._previous_norm.to(norm.device)
        return (self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0)

    def _update(self, parameter: Tensor, grad: Tensor, grad_scale: Tensor | None) -> None:
        self._begun = True
        state = self.state[parameter]
        if self._host is None or parameter not in self._host:
            pieces: Iterable = [(0, parameter.numel(), state)]
        else:
            pieces = self._host.visit(parameter)
        flat, grad = parameter.detach().view(-1), grad.reshape(-1)
        if self._fused(parameter):
            if grad_scale is not None:
                grad.mul_(grad_scale)
            before = None if self._host is None else state["step"].clone()
            for begin, end, moments in pieces:
                if begin:  # torch counts every call
                    state["step"].copy_(before)
                self._update_fused(parameter, flat[begin:end], grad[begin:end], moments, grad_scale)
            return
        state["step"] += 1
        step = self._step_of(parameter, int(state["step"]))
        update = update_triton.update_ if update_triton.eligible(parameter, state) else update_
        for begin, end, moments in pieces:
            update(flat[begin:end], grad[begin:end], *moments_of(moments), step, grad_scale, begin)

    def _step_of(self, parameter: Tensor, count: int) -> Step:
        group_index, number = self._place[parameter]
        group = self.param_groups[group_index]
        rounds = self._stochastic_rounding and parameter.dtype == torch.bfloat16
        beta1, beta2 = group["betas"]
        return Step(
            float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"], count,
            rounding_seed(self._seed, count, number) if rounds else None,
        )  # fmt: skip

    def _update_fused(
        self, parameter: Tensor, flat: Tensor, grad: Tensor, moments: dict[str, Tensor], grad_scale: Tensor | None
    ) -> None:
        group = self.param_groups[self._place[parameter][0]]
        beta1, beta2 = group["betas"]
        torch_adamw(
            [flat], [grad], *([moments[name]] for name in MOMENTS), [], [self.state[parameter]["step"]], fused=True,
            amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
            eps=group["eps"], maximize=False, found_inf=None if grad_scale is None else grad_scale.isnan().float(),
        )  # fmt: skip

    @torch.no_grad()
    def step(self, closure=None):
        """Step every parameter that has a gradient; with in_backward, end the step that the backward pass took."""
        if self.in_backward:
            if closure is not None:
                raise ValueError("with in_backward the backward pass is the step: there is no closure to call")
            self._previous_norm = self.grad_norm()
            self._square_sum = None
            self._applied.clear()
            if self._host is not None:
                self._host.end_step()
            return None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for parameter in self._place:
            if parameter.grad is not None:
                self._update(parameter, parameter.grad, None)
        return loss

    def grad_norm(self) -> Tensor | None:
        """() float32: global norm, before clipping, of the gradients of the backward pass since the last `step()`."""
        return None if self._square_sum is None else self._square_sum.sqrt()

    def applied(self) -> dict[Tensor, bool]:
        """Parameters whose gradient the backward pass since the last `step()` has brought, in their order, and whether
        they were changed by it. Waits for the device."""
        return {parameter: bool(finite) for parameter, finite in self._applied.items()}

    # ----- state -----

    def state_dict(self) -> dict:
        """torch's, plain tensors only, with `previous_norm`: the norm by which the next step clips.

        Without states before the first update, as torch's own: accelerate moves what it finds there to the device.
        """
        if self._host is not None:
            self._host.settle()
        whole = super().state_dict()
        return {**whole, "state": whole["state"] if self._begun else {}, "previous_norm": self._previous_norm}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Copy a saved state into the existing tensors: exact (torch would cast it to the parameters' dtype).

        Raises:
            ValueError: the saved states are of another kind or of other parameters.
        """
        if self._host is not None:
            self._host.settle()
        own = self.state
        super().load_state_dict({**state_dict, "state": {}})
        self.state = own
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if state_dict["state"] or self._begun:
            self._copy_states(dict(zip(parameters, map(state_dict["state"].get, numbers), strict=True)))
        norm = state_dict.get("previous_norm")
        self._previous_norm = None if norm is None else norm.to(self._device or parameters[0].device)

    def _copy_states(self, saved_states: dict[Tensor, dict[str, Tensor] | None]) -> None:
        for parameter, saved in saved_states.items():
            state = self.state[parameter]
            if saved is None:  # of a run that had not begun
                saved = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
            shapes = [{name: tuple(t.shape) for name, t in entries.items()} for entries in (saved, state)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"the saved optimizer state has {shapes[0]}, this optimizer {shapes[1]} for a parameter of shape "
                    f"{tuple(parameter.shape)}: resume with the optimizer and the model of the checkpoint"
                )
            for name, tensor in saved.items():
                if tensor.data_ptr() != state[name].data_ptr() or tensor.device != state[name].device:
                    state[name].copy_(tensor)
        self._begun = True
