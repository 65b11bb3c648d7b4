"""Reads and replaces arguments of a wrapped function by name, however the caller passed them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any


class Arguments:
    """Where each parameter of one function stands; made once, since `inspect` is slow."""

    def __init__(self, function: Callable[..., Any]) -> None:
        parameters = inspect.signature(function).parameters
        self._position = {name: index for index, name in enumerate(parameters)}
        self._default = {name: parameter.default for name, parameter in parameters.items()}

    @property
    def names(self) -> frozenset[str]:
        """The names of all parameters."""
        return frozenset(self._position)

    def get(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The value of one argument, or its default.

        Raises:
            KeyError: the function has no such parameter.
        """
        position = self._position[name]
        return args[position] if position < len(args) else kwargs.get(name, self._default[name])

    def replaced(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], new: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`args` and `kwargs` with the arguments named in `new` replaced."""
        positional, named = list(args), dict(kwargs)
        for name, value in new.items():
            position = self._position[name]
            if position < len(positional):
                positional[position] = value
            else:
                named[name] = value
        return tuple(positional), named
