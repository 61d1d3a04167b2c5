"""The LSTM once more, number by number in plain Python: an oracle without NumPy's arithmetic and torch.

Written from the equations of Hochreiter and Schmidhuber (1997) with the forget gate of Gers et al. (2000) and the
peepholes of Gers, Schraudolph and Schmidhuber (2002), one sequence and one unit at a time, so that it shares no code
and no layout trick with the library.
"""

from __future__ import annotations

import math

import numpy as np
from harness import Arrays, Problem


def sigmoid(a: float) -> float:
    return 0.5 * (1.0 + math.tanh(0.5 * a))


def cell(p: Problem, suffix: str, x: list[float], h: list[float], c: list[float]) -> tuple[list[float], list[float]]:
    """Advance one direction of one layer by one time step."""
    roles = "weight_ih", "weight_hh", "bias", "weight_peephole"
    w, u, b, peephole = (p.params.get(f"{role}_{suffix}") for role in roles)
    size, new_h, new_c = len(h), [], []
    a_o: list[float] = []
    seen_by: list[range] = []
    shared = p.cell.block_size  # units that share i, f and o
    gates = size // shared
    first = {"i": 0, "f": gates, "g": 2 * gates, "o": 2 * gates + size}  # rows
    for k in range(size):
        rows = {gate: row + (k if gate == "g" else k // shared) for gate, row in first.items()}
        seen = range(k // shared * shared, k // shared * shared + shared)
        a = {
            gate: sum(w[row, j] * x[j] for j in range(len(x)))
            + sum(u[row, j] * h[j] for j in range(size))
            + (0.0 if b is None else b[row])
            for gate, row in rows.items()
        }
        if peephole is not None:
            a["i"] += sum(peephole[0, v] * c[v] for v in seen)
            a["f"] += sum(peephole[1, v] * c[v] for v in seen)
        new_c.append(sigmoid(a["f"]) * c[k] + sigmoid(a["i"]) * math.tanh(a["g"]))
        a_o.append(a["o"])
        seen_by.append(seen)
    for k in range(size):
        if peephole is not None:
            a_o[k] += sum(peephole[2, v] * new_c[v] for v in seen_by[k])
        new_h.append(sigmoid(a_o[k]) * math.tanh(new_c[k]))
    return new_h, new_c


def solve_forward(p: Problem) -> Arrays:
    """Run the forward pass of a problem without dropout; y, h_n and c_n as the library names and shapes them."""
    assert p.state is not None and not p.cell.dropout
    steps, batch = p.x.shape[1::-1] if p.batch_first else p.x.shape[:2]
    y = np.zeros((steps, batch, p.cell.output_size))
    h_n, c_n = np.zeros_like(p.state[0]), np.zeros_like(p.state[1])
    for b in range(batch):
        length = steps if p.lengths is None else int(p.lengths[b])
        sequence = [list(p.x[b, t] if p.batch_first else p.x[t, b]) for t in range(length)]
        for layer in range(p.cell.num_layers):
            outputs: list[list[float]] = [[] for _ in range(length)]
            for direction in range(p.cell.num_directions):
                row = layer * p.cell.num_directions + direction
                h, c = list(p.state[0][row, b]), list(p.state[1][row, b])
                for t in reversed(range(length)) if direction else range(length):
                    h, c = cell(p, f"l{layer}" + "_reverse" * direction, sequence[t], h, c)
                    outputs[t] = outputs[t] + h
                h_n[row, b], c_n[row, b] = h, c
            sequence = outputs
        for t in range(length):
            y[t, b] = sequence[t]
    return {"y": y.swapaxes(0, 1) if p.batch_first else y, "h_n": h_n, "c_n": c_n}
