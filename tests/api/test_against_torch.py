"""Forward, final states and every gradient against a live ``torch.nn.LSTM`` on the CPU."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np
import pytest
from harness import Arrays, Case, Problem, problem, solve
from tolerances import EPS, TORCH_EXTRA_EPS, TORCH_RATIO, assert_close, normalised_error, record

torch = pytest.importorskip("torch", reason="the oracle is missing: torch is not installed")

# Its worker threads would go on spinning on the cores that the backend's threads need next.
torch.set_num_threads(1)

SIZES = (1, 2, 3, 5, 16, 17, 64, 65)
ROLES = ("steps", "batch", "inputs", "hidden")
FLAGS = tuple(itertools.product((1, 2, 3), *[(False, True)] * 5))


def make_cases() -> list[Case]:
    """Make the product over all flags, with sizes drawn so that every size has every role equally often."""
    rng = np.random.default_rng(20)
    columns = {role: rng.permutation(np.resize(SIZES, len(FLAGS))) for role in ROLES}
    cases = []
    for k, (layers, bidirectional, bias, batch_first, state, ragged) in enumerate(FLAGS):
        sizes = {role: int(columns[role][k]) for role in ROLES}
        lengths = "positive" if ragged else None  # torch refuses a length of 0
        cases.append(Case(**sizes, layers=layers, bidirectional=bidirectional, bias=bias, batch_first=batch_first,
                          state=state, lengths=lengths, seed=k))  # fmt: skip
    return cases


CASES = make_cases()


def torch_solve(p: Problem, dtype: np.dtype) -> Arrays:
    """Solve a problem with torch.nn.LSTM; every gradient, named as in ``harness.results``."""
    cell = p.cell
    lstm = torch.nn.LSTM(
        cell.input_size,
        cell.hidden_size,
        cell.num_layers,
        cell.bias,
        p.batch_first,
        bidirectional=cell.bidirectional,
        dtype=getattr(torch, dtype.name),
    )
    tensors = {}
    for name, value in p.params.items():
        # torch adds two biases; halves of one add up to it without rounding.
        parts = [name.replace("bias", f"bias_{part}") for part in ("ih", "hh")] if name.startswith("bias") else [name]
        for part in parts:
            tensors[part] = torch.from_numpy((value / len(parts)).astype(dtype))
    lstm.load_state_dict(tensors)
    shape = (cell.num_layers * cell.num_directions, p.dstate[0].shape[1], cell.hidden_size)
    inputs = [p.x, *(p.state or (np.zeros(shape), np.zeros(shape)))]
    x, h0, c0 = (torch.from_numpy(a.astype(dtype)).requires_grad_() for a in inputs)
    pack = torch.nn.utils.rnn
    if p.lengths is None:
        y, (h_n, c_n) = lstm(x, (h0, c0))
    else:
        packed = pack.pack_padded_sequence(x, torch.from_numpy(p.lengths), p.batch_first, enforce_sorted=False)
        packed, (h_n, c_n) = lstm(packed, (h0, c0))
        steps = p.x.shape[1 if p.batch_first else 0]
        y, _ = pack.pad_packed_sequence(packed, p.batch_first, total_length=steps)
    torch.autograd.backward((y, h_n, c_n), [torch.from_numpy(a.astype(dtype)) for a in (p.dy, *p.dstate)])
    found = {"y": y, "h_n": h_n, "c_n": c_n, "dx": x.grad, "dh0": h0.grad, "dc0": c0.grad}
    gradients = {name: value.grad for name, value in lstm.named_parameters()}
    found |= {f"d{name}": gradients[name.replace("bias", "bias_ih")] for name in p.params}
    return {name: value.detach().numpy() for name, value in found.items()}


@functools.lru_cache(maxsize=8)
def torch_answer(case: Case, name: str) -> Arrays:
    """Return what torch says, kept while the same case runs on each backend."""
    return torch_solve(problem(case), np.dtype(name))


@functools.lru_cache(maxsize=8)
def torch_in_other_orders(case: Case) -> list[Arrays]:
    """Return what torch says in float32 with the inputs in other orders: the same sums, otherwise rounded."""
    p, found = problem(case), []
    for seed in range(8):
        order = np.random.default_rng(seed).permutation(case.inputs)
        params = {name: v[:, order] if name.startswith("weight_ih_l0") else v for name, v in p.params.items()}
        answer = torch_solve(dataclasses.replace(p, params=params, x=p.x[..., order]), np.dtype(np.float32))
        by_input = [name for name in answer if name == "dx" or name.startswith("dweight_ih_l0")]
        found.append(answer | {name: answer[name][..., np.argsort(order)] for name in by_input})
    return found


def test_cases_have_every_size_in_every_role_and_every_combination_of_flags():
    for role in ROLES:
        assert {getattr(case, role) for case in CASES} == set(SIZES)
    flags = ("layers", "bidirectional", "bias", "batch_first", "state", "lengths")
    assert len({tuple(getattr(case, flag) for flag in flags) for case in CASES}) == len(CASES) == 3 * 2**5
    ragged = [(case, problem(case).lengths) for case in CASES if case.lengths]
    assert any((np.diff(lengths) > 0).any() for _, lengths in ragged), "all lengths are sorted"
    assert any(lengths.max() < case.steps for case, lengths in ragged), "some sequence is always full"


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.sampled
def test_float64_equals_torch(backend, case):
    p = problem(case)
    assert_close("torch", solve(p, backend), torch_answer(case, "float64"), backend=backend.name, dtype=np.float64)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.sampled
def test_float32_is_as_exact_as_torch(backend, case):
    assert_as_exact_as_torch(backend, case)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1_000, 65_537])  # the last is beyond what cuDNN takes
def test_long_sequences_are_as_exact_as_torch(backend, steps):
    if backend.is_slow and steps > 1_000:
        pytest.skip("minutes on a backend that takes tens of microseconds for a step")
    case = Case(steps, 1, 3, 5)  # no lengths: torch would take minutes
    p = problem(case)
    assert_close("long", solve(p, backend), torch_answer(case, "float64"), backend=backend.name, dtype=np.float64)
    assert_as_exact_as_torch(backend, case)


def assert_as_exact_as_torch(backend, case):
    truth, theirs = torch_answer(case, "float64"), torch_answer(case, "float32")
    ours = solve(problem(case).astype(np.float32), backend)
    assert ours.keys() == truth.keys()
    for name, expected in truth.items():
        assert ours[name].dtype == np.float32
        error, torch_error = normalised_error(ours[name], expected), normalised_error(theirs[name], expected)
        record("float32 against float64", backend.name, np.float32, name, error)
        record("float32 against float64", "torch", np.float32, name, torch_error)
        extra = TORCH_EXTRA_EPS["gradients" if name.startswith("d") else "outputs"]
        bound = TORCH_RATIO * torch_error + extra * EPS[np.dtype(np.float32)]
        if error > bound:  # where all but a few digits cancel, one order of the sums says little about the next
            torch_error = max(normalised_error(answer[name], expected) for answer in torch_in_other_orders(case))
            bound = TORCH_RATIO * torch_error + extra * EPS[np.dtype(np.float32)]
        record("our error over what torch's allows", backend.name, np.float32, name, error / bound)
        assert error <= bound, f"{name}: {error:.3g}, but torch is at {torch_error:.3g}"
