"""Decoder layers whose weights live in pinned host memory and visit slots of GPU memory while they compute.

    forward    layer i computes in its slot while the next ones that are not there are fetched into those of i - 1, ...
    backward   i is recomputed and differentiated in its slot, its parameters are stepped there (optim.AdamW with
               in_backward); meanwhile i + 1 is written back with its updates, and a layer below i fetched in its place

What is needed last leaves first, so layers stay where the passes turn: of S slots and L layers, a pass fetches L - S.
Two slots suffice; more let the copies run ahead of the computation, and with as many as layers nothing is copied.

A parameter's `data` is a view of the slot while its layer is there, and of host memory else, so that what reads a model
(state_dict, saving, numbers of parameters) reads the host, layer by layer. A step moves each layer to the device twice
and back once, less what stays in slots.

Hooks do it: a layer comes in its forward pre-hook, and again in a hook on its output's gradient, which runs before the
layer is recomputed. So every layer has to be checkpointed: what it kept for its backward would be views of a slot that
holds another layer by then. transformers >= 5.24 checkpoints a layer's `forward`, outside of which module hooks run;
earlier ones checkpoint its call, and hooks that run during a backward pass have nothing to do.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from amopo_fast.errors import OptionError
from amopo_fast.models.architecture import causal_lm, decoder_of, language_model_of
from amopo_fast.optim.host_memory import HostMemory, Transfers, aligned

SLOTS = 2  # at least: one in use, one on its way


def streamed_layers(model: nn.Module) -> list[tuple[str, nn.Module, list[nn.Parameter]]]:
    """(name, module, parameters that travel) of each decoder layer of a causal LM, in the model's order.

    What several layers share, or a layer and something outside of it, stays on the device.

    Raises:
        OptionError: the model has no layers that transformers checkpoints one by one.
    """
    inside = set(decoder_of(language_model_of(model)).modules())
    layers: dict[str, nn.Module] = {}
    for name, module in causal_lm(model).named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in layers)
        if isinstance(module, GradientCheckpointingLayer) and module in inside and not nested:
            layers[name] = module
    if not layers:
        raise OptionError(
            f"weights=host streams layers that are recomputed in the backward pass, and {type(model).__name__} has no "
            "GradientCheckpointingLayer: leave weights=host out", "weights",
        )  # fmt: skip
    uses = Counter(parameter for module in layers.values() for parameter in module.parameters())
    for name, parameter in causal_lm(model).named_parameters(remove_duplicate=False):
        uses[parameter] += not any(name.startswith(f"{layer}.") for layer in layers)
    return [
        (name, module, [p for p in module.parameters() if uses[p] == 1 and p.numel()])
        for name, module in layers.items()
    ]


def host_bytes(model: nn.Module) -> list[int]:
    """Of host memory for each decoder layer, at its parameters' dtypes; the largest is the size of a slot.

    The model may be on the meta device. Raises as `streamed_layers`.
    """
    return [_block_bytes(parameters) for _, _, parameters in streamed_layers(model)]


def slots_within(sizes: Sequence[int], room: float) -> int:
    """Slots for layers of so many bytes: SLOTS, and as many more as fit into `room` bytes beside those."""
    return min(len(sizes), SLOTS + max(0, int(room)) // max(sizes))


def _block_bytes(parameters: Sequence[Tensor]) -> int:
    return sum(aligned(parameter.nbytes) for parameter in parameters)


def memory_for(sizes: Sequence[int], device: torch.device) -> HostMemory:
    """Pinned memory for layers of so many bytes (`host_bytes`). Raises RuntimeError where it cannot be had."""
    return HostMemory(sizes, device, what="the weights of the decoder layers", remedy="or leave --weights host out")


def homes_in(memory: HostMemory, model: nn.Module) -> dict[str, Tensor]:
    """Where each parameter that streams lies in memory of `memory_for`, by its names in a model of the same class and
    dtypes, which may be on the meta device."""
    homes = {}
    for (_, _, parameters), block in zip(streamed_layers(model), memory.blocks, strict=True):
        homes.update(zip(parameters, _views(parameters, block), strict=True))
    return {name: homes[p] for name, p in model.named_parameters(remove_duplicate=False) if p in homes}


def arrivals(
    layer: int, direction: int, layers: int, resident: Iterable[int], slots: int
) -> Iterator[tuple[int | None, int]]:
    """(the layer that leaves, or None; the one that comes in its slot), in order, as a pass enters a layer.

    What is needed last leaves first, and nothing leaves for what is needed later than it.

    Args:
        direction: 1 in a pass upwards, -1 downwards. layers: of the model. resident: those in slots now.
    """
    present = set(resident)

    def until_used(other: int) -> int:
        """Orders layers by their next use: this pass goes on, and the next one turns."""
        ahead = (other - layer) * direction
        return ahead if ahead >= 0 else layers - ahead

    for coming in range(layers)[layer::direction]:
        if coming in present:
            continue
        leaving = None
        if len(present) == slots:
            leaving = max(present, key=until_used)
            if until_used(leaving) < until_used(coming):
                return
            present.remove(leaving)
        yield leaving, coming
        present.add(coming)


@dataclass(eq=False)
class _Slot:
    memory: Tensor  # (bytes of the largest layer,) uint8
    ready: Any = None  # event: its layer is there
    free: Any = None  # event: its last layer has been used, and has left


@dataclass(eq=False)
class _Layer:
    name: str
    number: int
    parameters: list[nn.Parameter]
    block: Tensor  # (bytes,) uint8, in host memory
    homes: list[Tensor]  # views of it, by parameter
    slot: _Slot | None = None
    changed: bool = False  # whether a backward pass went through it since it was fetched
    written: Any = None  # event: the host has what is newest
    largest: Tensor | None = None  # () magnitude of its trained weights behind their last update, NaN if there is one

    def bind(self, places: Sequence[Tensor]) -> None:
        for parameter, place in zip(self.parameters, places, strict=True):
            parameter.data = place


class StreamedWeights:
    """Moves the decoder layers' parameters into host memory and lets them visit the device. See `stream_weights`."""

    def __init__(self, model: nn.Module, device: torch.device, memory: HostMemory | None = None, slots: int = SLOTS):
        layers = streamed_layers(model)
        sizes = [_block_bytes(parameters) for _, _, parameters in layers]
        if memory is None or memory.sizes != sizes:
            memory = memory_for(sizes, device)
        self._memory = memory
        self._layers: list[_Layer] = []
        for number, ((name, module, parameters), block) in enumerate(zip(layers, memory.blocks, strict=True)):
            layer = _Layer(name, number, parameters, block[: _block_bytes(parameters)], _views(parameters, block))
            with torch.no_grad():
                for parameter, home in zip(parameters, layer.homes, strict=True):
                    if parameter.data_ptr() != home.data_ptr():  # not loaded into it
                        home.copy_(parameter)
            layer.bind(layer.homes)  # and what the parameters were before is free
            self._layers.append(layer)
            self._hook(module, layer)
        self._resident: dict[_Layer, _Slot] = {}
        self.slots = min(max(slots, SLOTS), len(layers))
        self._vacant = [_Slot(torch.zeros(max(sizes), dtype=torch.uint8, device=device)) for _ in range(self.slots)]
        self._transfers = Transfers(device)
        self.parameters = {parameter for layer in self._layers for parameter in layer.parameters}

    def _hook(self, module: nn.Module, layer: _Layer) -> None:
        module.register_forward_pre_hook(lambda *_: self._before_forward(layer))
        module.register_forward_hook(lambda module, _, output: self._after_forward(layer, module, output))
        travelling = set(layer.parameters)
        for part in module.modules():
            if not travelling.isdisjoint(part.parameters(recurse=False)):
                part.register_forward_pre_hook(lambda *_: self._require(layer))
        present = weakref.ref(layer)  # a hook of a parameter that holds the parameter would keep both for ever
        for parameter in layer.parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda _: _require_there(present()))
        module.register_state_dict_pre_hook(lambda *_: self.settle())
        module.register_load_state_dict_pre_hook(lambda *_: self.settle())
        module._apply = _moves_the_rest(module, layer)

    # ----- the passes -----

    def _before_forward(self, layer: _Layer) -> None:
        if not _in_backward():
            self._enter(layer, 1)

    def _after_forward(self, layer: _Layer, module: nn.Module, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        if not (torch.is_grad_enabled() and hidden.requires_grad):
            return
        if not (module.training and module.gradient_checkpointing):
            raise RuntimeError(
                f"weights=host: {layer.name} is not checkpointed, and would differentiate with the weights of another "
                "layer: call model.train() and model.gradient_checkpointing_enable({'use_reentrant': False}) before, "
                "or compute under torch.no_grad()"
            )
        hidden.register_hook(lambda _: self._before_backward(layer))

    def _before_backward(self, layer: _Layer) -> None:
        self._enter(layer, -1)
        layer.changed = any(parameter.requires_grad for parameter in layer.parameters)

    def _require(self, layer: _Layer) -> None:
        if layer.slot is None:
            raise RuntimeError(
                f"weights=host: a part of {layer.name} is called without the layer, whose weights are not on the "
                "device. In a backward pass: more of it than its output is differentiated; leave weights=host out"
            )

    # ----- coming and going -----

    def _enter(self, layer: _Layer, direction: int) -> None:
        """Have a layer in a slot for what the current stream is given next, and fetch what follows it in a pass that
        goes upwards (1) or downwards (-1), as far as slots hold what is needed later."""

        resident = [each.number for each in self._resident]
        for leaving, coming in arrivals(layer.number, direction, len(self._layers), resident, self.slots):
            if leaving is not None:
                self._evict(self._layers[leaving])
            self._fetch(self._layers[coming])
        self._transfers.wait_for(self._resident[layer].ready)

    def _fetch(self, layer: _Layer) -> None:
        slot = self._vacant.pop(0)
        pairs = [(slot.memory[: layer.block.nbytes], layer.block)]
        slot.ready = self._transfers.fetch(pairs, (slot.free, layer.written))
        layer.slot = self._resident[layer] = slot
        layer.bind(_views(layer.parameters, slot.memory))

    def _evict(self, layer: _Layer) -> None:
        """A layer's slot is vacant, for what is fetched behind its use and its writing back."""
        slot = self._resident.pop(layer)
        if layer.changed:
            layer.largest = _largest(layer.parameters)
        slot.free = self._transfers.mark()
        if layer.changed:
            pairs = [(layer.block, slot.memory[: layer.block.nbytes])]
            slot.free = layer.written = self._transfers.write_back(pairs, (slot.ready, slot.free))
        layer.slot, layer.changed = None, False
        layer.bind(layer.homes)
        self._vacant.append(slot)

    # ----- between the passes -----

    def settle(self) -> None:
        """Let the host have every layer, and wait for it: before parameters are read or replaced."""
        for layer in list(self._resident):
            self._evict(layer)
        self._transfers.settle()

    def largest(self) -> list[Tensor]:
        """() float32 on the device for each layer that was stepped: its trained weights' largest magnitude since, NaN
        if there is one."""
        for layer in self._resident:
            if layer.changed:
                layer.largest = _largest(layer.parameters)
        return [layer.largest for layer in self._layers if layer.largest is not None]

    @property
    def nbytes(self) -> int:
        """Of pinned host memory."""
        return sum(self._memory.sizes)


def stream_weights(
    model: nn.Module, device: torch.device, memory: HostMemory | None = None, slots: int = SLOTS
) -> StreamedWeights:
    """Keep the weights of a causal LM's decoder layers in host memory, in place; model.to(device) moves what is left.

    The model computes as before, evaluation and generation included. For a backward pass all layers have to be
    checkpointed with use_reentrant=False.

    Args:
        model: on the CPU. device: where it computes. memory: of `memory_for`, if it was taken already.
        slots: layers that are on the device at once; SLOTS at least, and no more than there are layers.

    Raises:
        OptionError: `streamed_layers`. RuntimeError: host memory that cannot be had, with its size.
    """
    streamed = StreamedWeights(model, device, memory, slots)
    language_model_of(model).amopo_streamed = streamed
    return streamed


def streamed_of(model: nn.Module) -> StreamedWeights | None:
    """What `stream_weights` has made of a model."""
    return getattr(language_model_of(model), "amopo_streamed", None)


def _require_there(layer: _Layer | None) -> None:
    """As a gradient arrives of what is stepped where it lies."""
    if layer is not None and layer.slot is None:
        raise RuntimeError(
            f"weights=host: a gradient of {layer.name} arrived when the layer had left the device: its weights are "
            "used outside of it; leave weights=host out"
        )


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _views(parameters: Sequence[Tensor], block: Tensor) -> list[Tensor]:
    """Of a block of bytes, one for each parameter. In host memory each has a storage of its own: saving writes what
    shares one into one file, or copies it."""
    views, offset = [], 0
    for parameter in parameters:
        part = block[offset : offset + parameter.nbytes]
        if block.device.type == "cpu":
            part = torch.frombuffer(part.numpy(), dtype=torch.uint8)
        views.append(part.view(parameter.dtype).view(parameter.shape))
        offset += aligned(parameter.nbytes)
    return views


def _largest(parameters: Sequence[nn.Parameter]) -> Tensor | None:
    trained = [parameter.detach() for parameter in parameters if parameter.requires_grad]
    return nn.utils.get_total_norm(trained, float("inf")).float() if trained else None


def _moves_the_rest(module: nn.Module, layer: _Layer) -> Callable[..., nn.Module]:
    """The layer's `_apply`, by which `to`, `cuda` and `half` go down a model: for what does not travel."""

    travelling = set(layer.parameters)

    def apply(fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for home in layer.homes:
            if fn(home.flatten()[:0]).dtype != home.dtype:
                raise RuntimeError("weights=host: the dtype of streamed weights is that of loading; load in another")
        for part in module.modules():
            for name, buffer in part.named_buffers(recurse=False):
                setattr(part, name, fn(buffer))
            for parameter in part.parameters(recurse=False):
                if parameter not in travelling:
                    parameter.data = fn(parameter.data)
        return module

    return apply
