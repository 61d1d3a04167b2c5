"""An LSTM of fastlstm as a differentiable function of JAX, on the CPU: a recipe.

``jax.pure_callback`` leaves JAX for the forward pass, ``jax.custom_vjp`` says how to come back. A tape cannot pass
through JAX, so the backward pass runs the forward pass once more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastlstm import LSTM, functional

__all__ = ["as_jax_function"]


def as_jax_function(lstm: LSTM) -> Callable[..., Any]:
    """Return ``f(params, x, h0, c0) -> (y, h_n, c_n)``, which ``jax.grad`` and ``jax.jit`` take.

    Parameters
    ----------
    lstm : LSTM
        A model of NumPy arrays. Its description is used; its parameters, as a start, are ``lstm.params``.

    Returns
    -------
    callable
        `params` is a dictionary as ``lstm.params``, `x` is (T, B, I) or (B, T, I) as the model has it, `h0` and `c0`
        are (L*D, B, H).
    """
    import jax

    cell, batch_first = lstm.cell, lstm.batch_first
    rows = cell.num_layers * cell.num_directions

    def run(params: Any, x: Any, h0: Any, c0: Any) -> Any:
        given = {name: np.asarray(value) for name, value in params.items()}
        y, state, tape = functional.run(
            cell, given, np.asarray(x), (np.asarray(h0), np.asarray(c0)), None, batch_first=batch_first, dropout=None,
            keep_tape=True,
        )  # fmt: skip
        return given, (y, *state), tape

    def forward_on_host(*arguments: Any) -> Any:
        return run(*arguments)[1]

    def backward_on_host(arguments: Any, dy: Any, dh_n: Any, dc_n: Any) -> Any:
        given, _, tape = run(*arguments)
        grads = functional.lstm_backward(given, tape, np.asarray(dy), (np.asarray(dh_n), np.asarray(dc_n)))
        return dict(grads.params), grads.x, *grads.state

    def like(shape: tuple[int, ...]) -> Any:
        return jax.ShapeDtypeStruct(shape, cell.dtype)

    def function(params: Any, x: Any, h0: Any, c0: Any) -> Any:
        batch = x.shape[0 if batch_first else 1]
        shapes = (
            like((*x.shape[:2], cell.output_size)),
            like((rows, batch, cell.h_size)),
            like((rows, batch, cell.c_size)),
        )
        return jax.pure_callback(forward_on_host, shapes, params, x, h0, c0, vmap_method="sequential")

    def backward(arguments: Any, dout: Any) -> Any:
        shapes = jax.tree.map(lambda value: like(value.shape), arguments)
        return jax.pure_callback(backward_on_host, shapes, arguments, *dout, vmap_method="sequential")

    f: Callable[..., Any] = jax.custom_vjp(function)
    f.defvjp(lambda *arguments: (f(*arguments), arguments), backward)  # type: ignore[attr-defined]
    return f
