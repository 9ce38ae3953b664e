"""Triton's interpreter: which kernels run in it, and what its older versions need."""

import dataclasses
import functools
import importlib.metadata
import inspect
import sys


def interpreted_kernels() -> list[str]:
    """The kernels of this project that were loaded so far and are interpreted."""
    ours = [(name, module) for name, module in sys.modules.items() if name.startswith(("amopo_kernels", "amopo_fast"))]
    return [
        f"{name}.{kernel}" for name, module in ours for kernel, value in list(vars(module).items())
        if type(value).__name__ == "InterpretedFunction"
    ]  # fmt: skip


def mend_the_interpreter() -> None:
    """Two thirds of its time go to work whose result is thrown away or known; the results stay the same bits.

    At every call of a kernel, and of a function in one, it looks through all of `triton.language` for what is to be
    replaced. It computes whether an integer overflows, and without `debug` asserts nothing about it. It makes a dict of
    all types for each look into it, and the shape, name and size of a block's type anew for each value. It has no
    `atomic_add` of a tensor descriptor. Before 3.7.1 it converts a bound of a `range` by int() of an array of one
    element, which numpy 2.5 refuses."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    interpreter._patch_builtin = _patch_builtin
    interpreter.InterpreterBuilder.create_descriptor_reduce = _add_to_descriptor
    interpreter._patch_lang = functools.partial(_patch_lang, interpreter._patch_lang)
    options = interpreter.interpreter_builder.options
    assert not options.debug
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype, key=lambda dtype: dtype.scalar.name)
    tl.core.block_type.__init__ = _remembering_block_types(tl.core.block_type.__init__)
    if tuple(map(int, version.split(".")[:3])) >= (3, 7, 1):
        return
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor


def _remembered(function, key):
    known = {}

    def remembered(value):
        name = key(value)
        if name not in known:
            known[name] = function(value)
        return known[name]

    return remembered


def _remembering_block_types(init):
    known = {}

    def __init__(self, element_ty, shape):
        key = type(element_ty), element_ty.name, *[getattr(size, "value", size) for size in shape]
        if key not in known:
            init(self, element_ty, shape)
            known[key] = vars(self).copy()
        vars(self).update(known[key])

    return __init__


@functools.cache
def _languages(function) -> list:
    """The modules whose names are replaced for it."""
    import triton.language as tl

    return [value for value in vars(inspect.getmodule(function)).values() if value is tl or value is tl.core]


def _patch_lang(patch, function):
    """What a kernel around this one replaced already stays, until that kernel ends."""
    from triton.runtime import interpreter

    if all(language.range.__module__ == interpreter.__name__ for language in _languages(function)):
        return interpreter._LangPatchScope()
    return patch(function)


@functools.cache
def _builtins(package: object) -> list[tuple[str, object]]:
    """What is to be replaced, found at the first call, before anything is."""
    from triton.language.core import is_builtin

    return [(name, member) for name, member in inspect.getmembers(package) if is_builtin(member)]


def _patch_builtin(package, builder, scope) -> None:
    members = _builtins(package)
    if members and getattr(package, members[0][0]) is members[0][1]:  # else a kernel around this one replaced them
        for name, member in members:
            scope.set_attr(package, name, _interpreted(member))


@functools.cache
def _interpreted(member):
    from triton.runtime.interpreter import interpreter_semantic

    function = getattr(member, "__wrapped__", member)  # without the check that there is a semantic

    def interpreted(*args, **kwargs):
        kwargs["_semantic"] = interpreter_semantic
        return function(*args, **kwargs)

    return interpreted


def _add_to_descriptor(builder, kind, descriptor, value, offsets) -> None:
    from triton.runtime.interpreter import TensorHandle, _ir

    assert kind == _ir.DESCRIPTOR_REDUCE_KIND.ADD
    policies = len(inspect.signature(builder.create_descriptor_load).parameters) - 2  # two of triton 3.6, then one
    before = builder.create_descriptor_load(descriptor, offsets, *[None] * policies)
    builder.create_descriptor_store(descriptor, TensorHandle(before.data + value.data, value.dtype), offsets)
