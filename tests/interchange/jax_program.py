"""What is tested with JAX: `python jax_program.py NAME`, in a process of its own.

JAX starts threads, and warns in a process that forks from then on, as other tests do.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np
from tolerances import assert_close

from fastlstm import LSTM, as_array
from fastlstm.demo import with_jax

jax.config.update("jax_platforms", "cpu")  # where JAX has a GPU, its arrays would lie there


def arrays_are_shared_and_run() -> None:
    x = jax.numpy.ones((5, 2, 3), "float32")
    array = as_array(x)
    assert array.__array_interface__["data"][0] == x.unsafe_buffer_pointer()
    assert not array.flags.writeable
    y, _ = LSTM(3, 4, seed=0)(array)
    np.testing.assert_array_equal(y, LSTM(3, 4, seed=0)(np.ones((5, 2, 3), np.float32))[0])


def recipe_has_our_gradients(**options: object) -> None:
    lstm = LSTM(3, 4, **options, seed=0)
    f = with_jax.as_jax_function(lstm)
    rng = np.random.default_rng(3)
    x = rng.normal(size=(5, 2, 3)).astype(np.float32)
    rows, batch = lstm.cell.num_layers * lstm.cell.num_directions, 5 if lstm.batch_first else 2
    h0, c0 = rng.normal(size=(2, rows, batch, 4)).astype(np.float32)
    y, state, tape = lstm.forward(x, (h0, c0))
    weights = [rng.normal(size=a.shape).astype(np.float32) for a in (y, *state)]

    def loss(*arguments):
        return sum((a * w).sum() for a, w in zip(f(*arguments), weights, strict=True))

    found = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(lstm.params, x, h0, c0)
    grads = lstm.backward(tape, weights[0], tuple(weights[1:]))
    actual = {name: np.asarray(value) for name, value in found[0].items()}
    actual |= {name: np.asarray(value) for name, value in zip(("x", "h0", "c0"), found[1:], strict=True)}
    expected = grads.params | {"x": grads.x, "h0": grads.state[0], "c0": grads.state[1]}
    assert_close("agreement", actual, expected, backend="cpu", dtype=np.float32)
    np.testing.assert_array_equal(jax.jit(f)(lstm.params, x, h0, c0)[0], y)


def deep_recipe_has_our_gradients() -> None:
    recipe_has_our_gradients(num_layers=2, bidirectional=True, batch_first=True)


if __name__ == "__main__":
    {test.__name__: test for test in (arrays_are_shared_and_run, recipe_has_our_gradients,
                                      deep_recipe_has_our_gradients)}[sys.argv[1]]()  # fmt: skip
