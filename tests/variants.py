"""A value for each field that makes another cell of the LSTM, so that a test over all of them misses no new one."""

from __future__ import annotations

import inspect
from typing import Any

from fastlstm import LSTM
from fastlstm.cell import VARIANTS

# What a model with 6 hidden units takes; by field of the cell, which is also the constructor's argument.
EXAMPLES: dict[str, Any] = {
    "peephole": True, "proj_size": 2, "forget_gate": False, "coupled": True, "block_size": 2, "truncated": True,
    "activations": ("hard_sigmoid", "softsign", "tanh"), "clip": 0.5, "cell_clip": 0.3, "layer_norm": True,
}  # fmt: skip
# Fields that draw random masks in training, so that a call for the whole sequence draws others than one step by step.
RANDOM: dict[str, Any] = {"recurrent_dropout": 0.3, "zoneout": (0.3, 0.2)}
# Fields of models that are no LSTM of one direction, forward in time.
OTHER = {"reverse", "merge", "nonlinearity"}

PLAIN = ("plain", {})
DETERMINISTIC = [PLAIN, *((name, {name: value}) for name, value in EXAMPLES.items() if name in VARIANTS)]
# Two that make a third together: a shared gate sees all units of its block.
DETERMINISTIC.append(("peepholes of shared gates", {"peephole": True, "block_size": 2}))
RANDOM_HERE = [(name, {name: value}) for name, value in RANDOM.items() if name in VARIANTS]


def test_every_variant_has_an_example():
    unknown = set(VARIANTS) - set(EXAMPLES) - set(RANDOM) - OTHER
    assert not unknown, f"tests/variants.py has no example of {unknown}"
    accepted = inspect.signature(LSTM.__init__).parameters
    assert all(name in accepted for _, options in DETERMINISTIC + RANDOM_HERE for name in options)
