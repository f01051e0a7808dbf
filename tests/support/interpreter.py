"""Triton's interpreter at twice its speed, with the same bits: without work whose results it throws away."""

import dataclasses
import functools
import importlib.util
import os
import types


def make_faster() -> None:
    """For this process, once; nothing to do where the kernels are compiled."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    # It works out whether each sum of integers overflows, in 64 bits, and asserts nothing unless `debug` is set.
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    if not hasattr(interpreter._patch_lang, "__wrapped__"):
        interpreter._patch_lang = _once_a_launch(interpreter._patch_lang)
        # A kernel's operations ask for the same few dtypes and shapes a hundred thousand times.
        interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)
        _remember_shapes()


def _once_a_launch(patch_lang):
    """Each call of a device function replaces the operations of triton.language again, as its kernel's launch has."""
    import triton.language as tl

    @functools.wraps(patch_lang)
    def patch(function):
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if languages and not any(tl.core.is_builtin(language.load) for language in languages):
            return types.SimpleNamespace(restore=lambda: None)
        return patch_lang(function)

    return patch


def _remembered(numpy_dtype):
    """A block's dtype in numpy is its element's, for which a table of all of them is made at each call."""
    known = {}

    @functools.wraps(numpy_dtype)
    def look_up(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = numpy_dtype(dtype)
        return known[name]

    return look_up


def _remember_shapes() -> None:
    """A block type's fields follow from its element and shape; a tensor's, but for its values, from its type."""
    import triton.language as tl

    block_type, tensor = tl.block_type.__init__, tl.tensor.__init__
    known = {}

    @functools.wraps(block_type)
    def make_block_type(self, element_ty, shape):
        key = (
            type(element_ty),
            str(element_ty),
            *(size if type(size) is int else tl.core._unwrap_if_constexpr(size) for size in shape),
        )
        if key not in known:
            block_type(self, element_ty, shape)
            known[key] = vars(self) | {"of_tensors": {}}
        vars(self).update(known[key])

    @functools.wraps(tensor)
    def make_tensor(self, handle, type):
        fields = vars(type).get("of_tensors")
        if not fields:
            tensor(self, handle, type)
            if fields is not None:
                fields.update({name: x for name, x in vars(self).items() if name not in ("handle", "type")})
            return
        vars(self).update(fields, handle=handle, type=type)

    tl.block_type.__init__, tl.tensor.__init__ = make_block_type, make_tensor
