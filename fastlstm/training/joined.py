"""Several models as one mapping of parameters, under names such as ``lstm.weight_ih_l0``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastlstm.backends.base import Array
from fastlstm.errors import ArgumentError, shown
from fastlstm.training import arguments

__all__ = ["Joined", "join"]


class Joined(Mapping[str, Array]):
    """The parameters of several models, or their gradients, under the names ``part.name``; made by :func:`join`.

    It refers to the models, not to their arrays, so arrays that are replaced in a model later are found.
    """

    def __init__(self, parts: dict[str, Any]) -> None:
        self._parts = parts

    def _part(self, prefix: str) -> Mapping[str, Array]:
        return arguments.mapping(f"part {prefix}", self._parts[prefix])

    def __getitem__(self, name: str) -> Array:
        prefix, dot, rest = name.partition(".") if isinstance(name, str) else ("", "", "")
        if not dot or prefix not in self._parts:
            raise KeyError(name)
        return self._part(prefix)[rest]

    def __iter__(self) -> Iterator[str]:
        return (f"{prefix}.{name}" for prefix in self._parts for name in self._part(prefix))

    def __len__(self) -> int:
        return sum(len(self._part(prefix)) for prefix in self._parts)

    def __repr__(self) -> str:
        return f"join({', '.join(self._parts)})  # {', '.join(self)}"


def join(**parts: Any) -> Joined:
    """Join models, or their gradients, to one mapping that optimisers and clipping take.

    The names are those of the parts, a dot, and those within the part, such as ``lstm.weight_ih_l0``. Two parts may
    have the same names; in a union of dicts, ``a.params | b.params``, the later would replace the earlier in silence.

    Parameters
    ----------
    **parts : model, gradients, or mapping of str to array
        The parts by name: what has parameters or gradients as its `params`, such as :class:`fastlstm.LSTM`,
        :class:`Linear` and what their `backward` returns, or a mapping itself, which may be joined too.

    Returns
    -------
    Joined
        A mapping that refers to the parts: a parameter that is replaced in a model later, or all of them, is found
        here.

    Raises
    ------
    ArgumentError
        If there is no part, a name contains a dot, or a part has no parameters.

    Examples
    --------
    >>> import numpy as np
    >>> from fastlstm.training import Linear
    >>> params = join(first=Linear(3, 2, seed=0), second=Linear(2, 1, bias=False, seed=1))
    >>> list(params)
    ['first.weight', 'first.bias', 'second.weight']
    >>> params["first.bias"].shape
    (2,)
    """
    if not parts:
        raise ArgumentError("join() takes at least one part, such as join(lstm=lstm, head=head)")
    for prefix, part in parts.items():
        if not prefix or "." in prefix:  # names would not be unique
            raise ArgumentError(f"the name of a part must not be empty or contain a dot, got {shown(prefix)}")
        arguments.mapping(f"part {prefix}", part)
    return Joined(parts)
