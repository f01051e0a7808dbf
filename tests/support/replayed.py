"""Operations of triton.language in the interpreter, their types worked out once.

Nine tenths of the interpreter's time go into Triton's frontend: for each operation of each program it looks up types,
casts, broadcasts and makes constants of scalars, and in the end calls numpy once or twice. All that follows from the
types of the tensors and from the other arguments. So what the frontend calls of the interpreter's builder is recorded
once for these, and called again on other tensors: the same calls in the same order, with the same bits.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

# Recording takes longer than the operation does: it is not worth it for what comes once, such as a loop's own numbers.
CALLS_BEFORE_RECORDING = 2
# With no tensor of the kernel's among their arguments these give a constant.
PURE = ("get_", "create_make_range", "create_splat", "create_broadcast", "create_expand_dims")
# numpy repeats numbers by itself in these, which take each element alone.
REPEATING = ("create_splat", "create_broadcast")
ELEMENTWISE = {
    f"create_{name}"
    for name in (
        *("fadd", "fsub", "fmul", "fdiv", "precise_divf", "add", "sub", "mul", "and", "or", "xor", "addptr", "select"),
        *("minnumf", "maxnumf", "minsi", "maxsi", "icmpEQ", "icmpNE", "icmpSLT", "icmpSLE", "icmpSGT", "icmpSGE"),
        *("fcmpOLT", "fcmpOLE", "fcmpOGT", "fcmpOGE", "fcmpOEQ", "fcmpUNE"),
    )
}

_on = True


@contextlib.contextmanager
def nothing_replayed() -> Iterator[None]:
    """Every operation goes through Triton's frontend, as without this module."""
    global _on
    _on = False
    try:
        yield
    finally:
        _on = True


class _NoKey(Exception):
    """An argument that is neither a tensor nor a plain value."""


def replayed(member: Callable, semantic) -> Callable:
    """``member``, a builtin of triton.language, as kernels call it where `semantic` is the interpreter's frontend."""
    tensor, plans = type(semantic).tensor, {}

    def call(*arguments, _semantic=None, **settings):
        if _semantic is not None or not _on:
            # Another operation calls it, with whose own calls its are recorded.
            return member(*arguments, _semantic=_semantic or semantic, **settings)
        tensors, key = [], [*settings]
        try:
            for each in (*arguments, *settings.values()):
                if type(each) is tensor:
                    tensors.append(each)
                    key.append(each.type.name)
                else:
                    key.append(_key(each, tensor, tensors))
        except _NoKey:
            return member(*arguments, _semantic=semantic, **settings)
        key = tuple(key)
        plan = plans.setdefault(key, 0)
        if callable(plan):
            return plan(*tensors)
        if plan is not None:
            plans[key] += 1
            if plan == CALLS_BEFORE_RECORDING:
                result, plans[key] = _Recording(semantic, arguments, settings).of(member)
                return result
        return member(*arguments, _semantic=semantic, **settings)

    return call


def _key(argument, tensor: type, tensors: list):
    """What the frontend may ask of an argument; of a tensor its type, and it goes onto the list."""
    kind = type(argument)
    if kind is tensor:
        tensors.append(argument)
        return argument.type.name
    if argument is None or kind is int or kind is bool or kind is str:
        return kind, argument
    if kind is float:
        # 0.0 equals -0.0.
        return argument.hex()
    if kind is list or kind is tuple:
        return kind, *[_key(each, tensor, tensors) for each in argument]
    if kind is slice:
        return kind, argument.start, argument.stop, argument.step
    if kind.__name__ == "constexpr":
        return kind, _key(argument.value, tensor, tensors)
    if kind.__name__ == "dtype":
        return kind, argument.name
    raise _NoKey


class _Recording:
    """One call, made while it is noted what it calls of the builder."""

    def __init__(self, semantic, arguments: tuple, settings: dict) -> None:
        self.builder, self.semantics = semantic.builder, type(semantic)
        self.tensor = self.semantics.tensor
        self.inputs = []
        self.arguments = [self._fresh(each) for each in arguments]
        self.settings = {name: self._fresh(each) for name, each in settings.items()}
        self.steps = []  # (the builder's method, its arguments, those by name, its result)
        self.varying = {id(each.handle): each.handle for each in self.inputs}
        self.repeated = {}  # blocks of repeated numbers: each with what it repeats

    def _fresh(self, argument):
        # One handle may be two arguments here and two handles may be them in the next call.
        if type(argument) is self.tensor:
            self.inputs.append(self.tensor(dataclasses.replace(argument.handle), argument.type))
            return self.inputs[-1]
        if type(argument) in (list, tuple):
            return type(argument)(map(self._fresh, argument))
        if type(argument).__name__ == "constexpr":
            # A constant times a tensor is a tensor in a constant.
            return type(argument)(self._fresh(argument.value))
        return argument

    def of(self, member: Callable) -> tuple[object, Callable | None]:
        """The call's result, and what makes it of other tensors; None if that is more than the builder's calls."""
        truth = self.tensor.__bool__
        # The compiler's tensors are all true: whether one is given is what the frontend asks, not what it holds.
        self.tensor.__bool__ = lambda tensor: self._varies(tensor.handle) or truth(tensor)
        try:
            result = member(*self.arguments, _semantic=self.semantics(self), **self.settings)
        finally:
            self.tensor.__bool__ = truth
        returned = result if isinstance(result, tuple) else (result,)
        if result is not None and any(type(each) is not self.tensor for each in returned):
            return result, None
        return result, self._plan(None if result is None else returned, isinstance(result, tuple))

    def __getattr__(self, name: str):
        # The frontend takes this for its builder.
        method = getattr(self.builder, name)
        if not callable(method):
            return method

        def call(*arguments, **settings):
            result = method(*arguments, **settings)
            if name in REPEATING:
                self.repeated[id(result)] = result, arguments[-1 if name == "create_splat" else 0]
            if not name.startswith(PURE) or self._varies([*arguments, *settings.values()]):
                self.steps.append((name, arguments, settings, result))
                for each in result if isinstance(result, tuple) else (result,):
                    if each is not None:
                        self.varying[id(each)] = each
            return result

        return call

    def _varies(self, argument) -> bool:
        if isinstance(argument, list | tuple):
            return any(map(self._varies, argument))
        return id(argument) in self.varying

    def _plan(self, returned: tuple | None, several: bool) -> Callable:
        names = {id(each.handle): f"t{i}.handle" for i, each in enumerate(self.inputs)}
        scope = {"builder": self.builder, "tensor": self.tensor}

        def constant(value) -> str:
            if type(value).__name__ == "TensorHandle":
                # Of all calls: whoever writes to it is told.
                value.data.flags.writeable = False
            scope[f"c{len(scope)}"] = value
            return f"c{len(scope) - 1}"

        def source(argument) -> str:
            if id(argument) in names:
                return names[id(argument)]
            if type(argument) in (list, tuple) and self._varies(argument):
                parts = "".join(f"{source(each)}, " for each in argument)
                return f"[{parts}]" if type(argument) is list else f"({parts})"
            return constant(argument)

        lines = []
        for i, (name, arguments, settings, made) in enumerate(self._without_repetition(returned or ())):
            passed = [source(each) for each in arguments]
            passed += [f"{key}={source(each)}" for key, each in settings.items()]
            lines.append(f"r{i} = builder.{name}({', '.join(passed)})")
            if isinstance(made, tuple):
                names |= {id(each): f"r{i}[{j}]" for j, each in enumerate(made)}
            elif made is not None:
                names[id(made)] = f"r{i}"
        if returned is not None:
            tensors = [f"tensor({source(each.handle)}, {constant(each.type)})" for each in returned]
            lines.append(f"return ({', '.join(tensors)},)" if several else f"return {tensors[0]}")
        head = f"def plan({', '.join(f't{i}' for i in range(len(self.inputs)))}):"
        exec("\n    ".join([head, *(lines or ["pass"])]), scope)
        return scope["plan"]

    def _without_repetition(self, returned: tuple) -> list:
        """The steps without the blocks of repeated numbers that nothing needs: numpy repeats them as it goes."""
        kept, needed = [], {id(each.handle) for each in returned}
        for name, arguments, settings, made in reversed(self.steps):
            if name in REPEATING and id(made) not in needed:
                continue
            if name in ELEMENTWISE:
                arguments = self._unrepeated(arguments, made)
            kept.append((name, arguments, settings, made))
            needed |= set(map(id, _flat([*arguments, *settings.values()])))
        return kept[::-1]

    def _unrepeated(self, arguments: tuple, made) -> tuple:
        small = arguments
        while any(id(each) in self.repeated for each in small):
            small = tuple(self.repeated.get(id(each), (None, each))[1] for each in small)
        alike = all(a.data.dtype == b.data.dtype for a, b in zip(small, arguments, strict=True))
        same_shape = np.broadcast_shapes(*(each.data.shape for each in small)) == made.data.shape
        return small if alike and same_shape else arguments


def _flat(arguments) -> Iterator:
    for each in arguments:
        if isinstance(each, list | tuple):
            yield from _flat(each)
        else:
            yield each
