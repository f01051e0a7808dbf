"""Triton's interpreter at many times its speed, with the same bits: without work whose results it throws away."""

import dataclasses
import functools
import importlib.util
import inspect
import os
import types

import numpy as np
from replayed import replayed


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
        interpreter._patch_builtin = _replay_operations(interpreter)
        interpreter.ReduceOps.generic_reduce = _reduce_by_slices
        # A kernel's operations ask for the same few dtypes and shapes a hundred thousand times.
        interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)
        if hasattr(interpreter, "_validate_np_data_size"):
            interpreter._validate_np_data_size = _validated_once(interpreter._validate_np_data_size)
        _remember_shapes()


def _once_a_launch(patch_lang):
    """Each call of a device function replaces the operations of triton.language again, as its kernel's launch has."""
    import triton.language as tl

    languages = {}

    @functools.wraps(patch_lang)
    def patch(function):
        if function not in languages:
            languages[function] = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        seen = languages[function]
        if seen and not any(tl.core.is_builtin(language.load) for language in seen):
            return types.SimpleNamespace(restore=lambda: None)
        return patch_lang(function)

    return patch


def _replay_operations(interpreter):
    """What each launch puts in place of the operations of triton.language: replayed ones, found once."""
    import triton.language as tl

    # Found in several modules, it is replayed by what was recorded for any of them.
    replay = functools.cache(functools.partial(replayed, semantic=interpreter.interpreter_semantic))
    operations = {}

    def patch(owner, builder, scope=None):
        if owner not in operations:
            operations[owner] = [
                (name, replay(member)) for name, member in inspect.getmembers(owner) if tl.core.is_builtin(member)
            ]
        for name, operation in operations[owner]:
            (scope.set_attr if scope else setattr)(owner, name, operation)

    return patch


def _reduce_by_slices(operation, tensors):
    """tl.reduce by a function of our own: one slice after the other, for all places at once, and not for each alone."""
    tensors, axis = operation.unravel(tensors, operation.axis)
    slices = [np.moveaxis(each.handle.data, axis, 0) for each in tensors]

    def at(i: int) -> list:
        return [operation.to_tensor(each[i], given.dtype) for each, given in zip(slices, tensors, strict=True)]

    totals = at(0)
    for i in range(1, len(slices[0])):
        totals = operation.combine_fn.fn(*totals, *at(i))
        totals = totals if isinstance(totals, tuple) else (totals,)
        pairs = zip(totals, tensors, strict=True)
        totals = [operation.to_tensor(total.handle.data, given.dtype) for total, given in pairs]
    results = []
    for total, each, given in zip(totals, slices, tensors, strict=True):
        data = total.handle.data.reshape(each.shape[1:])
        if operation.keep_dims:
            data = np.expand_dims(data, axis if operation.axis is not None else tuple(range(given.handle.data.ndim)))
        results.append(operation.to_tensor(data, given.dtype))
    return results


def _validated_once(validate):
    """Whether numbers of a dtype of numpy's are one of Triton's, asked whenever there is a new block of them."""
    known = {}

    @functools.wraps(validate)
    def look_up(array, dtype):
        key = array.dtype, dtype.name
        if key not in known:
            known[key] = validate(array, dtype)
        return known[key]

    return look_up


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
    types, tensors = {}, {}

    @functools.wraps(block_type)
    def make_block_type(self, element_ty, shape):
        key = (
            type(element_ty),
            str(element_ty),
            *(size if type(size) is int else tl.core._unwrap_if_constexpr(size) for size in shape),
        )
        if key not in types:
            block_type(self, element_ty, shape)
            types[key] = dict(vars(self))
        vars(self).update(types[key])

    @functools.wraps(tensor)
    def make_tensor(self, handle, type):
        fields = tensors.get(type.name)
        if fields is None:
            tensor(self, handle, type)
            tensors[type.name] = {name: x for name, x in vars(self).items() if name not in ("handle", "type")}
            return
        self.__dict__.update(fields, handle=handle, type=type)

    tl.block_type.__init__, tl.tensor.__init__ = make_block_type, make_tensor
