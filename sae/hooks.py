"""Hooks: read or replace the output of a named submodule. Knows modules and tensors; knows nothing of SAEs.

A tuple output stands for its first element. Hooks hand tensors over and do nothing else. They live inside a `with` and
are gone after it, also after an exception. Put them on the uncompiled module: one wrapped by torch.compile does not run
hooks added later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from sae.config import UserError, did_you_mean
from sae.hookpoints import at_layer as at_layer
from sae.hookpoints import resolve as resolve
from sae.hookpoints import split

Acts = dict[str, Tensor]  # hookpoint -> (tokens, D)


class _Stop(Exception):
    """Raised by a hook once everything wanted has been seen; caught in run()."""


def _tensor(name: str, value: Any) -> Tensor:
    value = value[0] if isinstance(value, (tuple, list)) else value
    if not isinstance(value, Tensor):
        raise UserError(f"'{name}' handles {type(value).__name__}, not a tensor; choose another hookpoint")
    return value


def _register(model: nn.Module, name: str, see: Callable[[Tensor], Tensor | None]) -> Any:
    """One hook at one hookpoint: `see` gets the tensor, and may return another to go in its place."""
    path, is_input = split(name)
    try:
        module = model.get_submodule(path)
    except AttributeError:
        names = [n for n, _ in model.named_modules()]
        raise UserError(f"the model has no module '{path}'{did_you_mean(path, names)}") from None

    def on_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        new = see(_tensor(name, output))
        if new is None:
            return None
        if not isinstance(output, (tuple, list)):
            return new
        make = getattr(output, "_make", type(output))  # a named tuple stays one
        return make((new, *output[1:]))

    def on_input(_module: nn.Module, args: tuple, kwargs: dict) -> Any:
        if args:
            new = see(_tensor(name, args))
            return None if new is None else ((new, *args[1:]), kwargs)
        streams = [k for k, v in kwargs.items() if isinstance(v, Tensor) and v.is_floating_point() and v.ndim == 3]
        key = "hidden_states" if "hidden_states" in kwargs else next(iter(streams or kwargs))
        new = see(_tensor(name, kwargs[key]))
        return None if new is None else (args, {**kwargs, key: new})

    if is_input:
        return module.register_forward_pre_hook(on_input, with_kwargs=True)
    return module.register_forward_hook(on_output)


@contextmanager
def hooked(model: nn.Module, sees: Mapping[str, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """Within the block, hand each hookpoint's tensor to its function; a tensor it returns takes the place.

    All names are checked before any hook stays, and all hooks are removed at the end whatever happens.
    """
    with ExitStack() as stack:
        for name, see in sees.items():
            stack.callback(_register(model, name, see).remove)
        yield


@contextmanager
def capture(model: nn.Module, hookpoints: Sequence[str], *, stop: bool = False) -> Iterator[dict[str, Tensor]]:
    """Within the block, the dict fills with what each hookpoint returned in the latest forward (detached).

    With stop, the forward is cut off (through an exception that run() catches) once all have been seen.
    """
    seen: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[[Tensor], None]:
        def keep(x: Tensor) -> None:
            seen[name] = x.detach()
            if stop and len(seen) == len(set(hookpoints)):
                raise _Stop

        return keep

    with hooked(model, {name: keeper(name) for name in hookpoints}):
        yield seen


@contextmanager
def replace(model: nn.Module, edits: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Within the block, what a hookpoint returns becomes `edits[hookpoint](it)`."""
    with hooked(model, edits):
        yield


def check_once(model: nn.Module, hookpoints: Sequence[str], forward: Callable[[], Any]) -> None:
    """Raise UserError for a module that one forward runs several times (ALBERT's): which of them would be meant?"""
    times = dict.fromkeys(hookpoints, 0)

    def counter(name: str) -> Callable[[Tensor], None]:
        def see(_x: Tensor) -> None:
            times[name] += 1

        return see

    # what comes behind the hookpoints may want more than it is given (a T5's decoder): the counts stand
    with hooked(model, {name: counter(name) for name in times}), suppress(Exception):
        forward()
    for name, n in times.items():
        if n > 1:
            raise UserError(f"the model runs '{name}' {n} times in one forward; choose a module that runs once")


def run(model: nn.Module, hookpoints: Sequence[str], forward: Callable[[], Any]) -> dict[str, Tensor]:
    """Call `forward`, which runs the model, only as far as the last of the hookpoints; return what they hold."""
    with capture(model, hookpoints, stop=True) as seen, suppress(_Stop):
        forward()
    missing = [name for name in hookpoints if name not in seen]
    if missing:
        raise UserError(f"the model's forward never reached '{missing[0]}'; choose another hookpoint")
    return seen
