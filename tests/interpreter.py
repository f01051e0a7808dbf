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
