"""Known slips, put into the CPU's kernels of cells with phases: a comparison with the reference notices each.

A mutant is the source of one module with one snippet replaced, and all that depends on it, compiled anew.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
from harness import DROPOUT_SEED, REFERENCE, BackendUnderTest, Case, model_of, problem, results
from tolerances import BOUNDS, normalised_error

from fastlstm.backends.base import Signature
from fastlstm.functional import lstm_backward, lstm_forward

# In the order in which they import from each other.
MODULES = ("layer_norm", "state_masks", "shared_peepholes", "phased_cells", "phased_cells_back", "phased_gradients",
           "phased_forward", "phased_backward")  # fmt: skip
NORMS, MASKS, SHARED, CELLS, BACK, GRADIENTS, FORTH, DRIVER = MODULES


def cases(**fields):
    """Few rows and many, which the kernels compute in other ways; ragged, and with resets."""
    sizes, fields = ((6, 3, 2, 12), (4, 30, 2, 20)), tuple(fields.items())
    return [
        Case(*size, 2, "reverse" not in dict(fields), lengths="zeros", resets=True, fields=fields, seed=n)
        for n, size in enumerate(sizes)
    ]


NORM, PROJECTION = {"layer_norm": True, "peephole": True}, {"proj_size": 3, "peephole": True}
COUPLED, RANDOM = {"layer_norm": True, "coupled": True}, {"recurrent_dropout": 0.3, "zoneout": (0.2, 0.4)}
TANH, RELU = {"nonlinearity": "tanh"}, {"nonlinearity": "relu"}
TRUNCATED, BLOCKS = {"proj_size": 3, "truncated": True}, {"peephole": True, "block_size": 4}

# The module, what stands there, what a slip makes of it, and the cell that shows it.
SLIPS = {
    "no epsilon": (NORMS, "_sum_of_lanes(squares) / count + _EPSILON", "_sum_of_lanes(squares) / count", NORM),
    "mean of x's products left": (NORMS, "(load(offset(a, k)) - mean_x)", "load(offset(a, k))", NORM),
    "products with h by the scale of x's": (NORMS, "- mean_h) * scale_h", "- mean_h) * scale_x", NORM),
    "gains of x for h": (NORMS, "fma(n_h, load(offset(gains_h, k)), total)", "fma(n_h, load(offset(gains, k)), total)",
                         NORM),
    "normalised without the bias": (NORMS, "total = fma(n_x, load(offset(gains, k)), load(offset(bias, k)))",
                                    "total = n_x * load(offset(gains, k))", NORM),
    "squares with the padding": (NORMS, "n_g, n_o = _keep_first(n_g, units), _keep_first(n_o, units)", "pass", NORM),
    "missing gates counted": (NORMS, "f * splat(offset(shares, 1))", "f", COUPLED),
    "c not divided by its deviation": (NORMS, "store(here, load(here) * scale)", "pass", NORM),
    "squares of c with the padding": (
        NORMS, "_keep_first(load(here) - mean, minimum(width, hidden - block * width))", "load(here) - mean", NORM,
    ),
    "back through c without the mean": (NORMS, "(dn - mean - load", "(dn - load", NORM),
    "back through c without n": (NORMS, "dn - mean - load(offset(n, k)) * of_n", "dn - mean", NORM),
    "back through x's without the mean": (NORMS, "fma(load(offset(norms, k)), of_n_x, total_x)\n",
                                          "load(offset(norms, k)) * of_n_x\n", NORM),
    "back through h's by the norms of x's": (NORMS, "fma(load(offset(norms_h, k)), of_n_h, total_h)\n",
                                             "fma(load(offset(norms, k)), of_n_h, total_h)\n", NORM),
    "back through h's by the scale of x's": (NORMS, "scale_h * (d_h", "scale_x * (d_h", NORM),
    "back through missing gates": (NORMS, "(d_h - share * mean_h)", "(d_h - mean_h)",
                                   {"layer_norm": True, "block_size": 2}),
    "old and new states swapped": (MASKS, "threshold), old, new)", "threshold), new, old)", RANDOM),
    "expectation of the other state": (MASKS, "fma(share, old, (1.0 - share) * new)",
                                       "fma(share, new, (1.0 - share) * old)", RANDOM),
    "gradients of old and new swapped": (MASKS, "select(kept, d, zero), select(kept, zero, d)",
                                         "select(kept, zero, d), select(kept, d, zero)", RANDOM),
    "dropout's factor by another number": (MASKS, "splat(offset(masks.rates, 2))", "splat(masks.rates)", RANDOM),
    # Not noticed, because it changes low bits alone, which decide once in 2**30 numbers: "mixed(bits, 31)" by 30.
    "another random number": (MASKS, "mixed(bits, 27)", "mixed(bits, 26)", RANDOM),
    "a gate sees one unit of its block": (
        SHARED, "total += peek(offset(weights, unit)) * peek(offset(c, unit))", "pass", BLOCKS,
    ),
    "forget gates see by the weights of input gates": (SHARED, "_add(layer, a, _F, 1, c_prev)",
                                                       "_add(layer, a, _F, 0, c_prev)", BLOCKS),
    "output gates see c before the step": (SHARED, "_add(layer, a, _O, 2, c)", "_add(layer, a, _O, 2, c_prev)", BLOCKS),
    "copies of a gate not summed": (SHARED, "total += peek(offset(part, row * part_row))", "pass", BLOCKS),
    "nothing back through output gates": (SHARED, "poke(d, peek(d) + total * peek(offset(weights, unit)))", "pass",
                                          BLOCKS),
    "nothing back through input gates": (SHARED, "(i * seen_i + f * seen_f)", "f * seen_f", BLOCKS),
    "nothing back through forget gates": (SHARED, "(i * seen_i + f * seen_f)", "i * seen_i", BLOCKS),
    "weights of forget gates by input gates": (SHARED, "f * c_prev)", "i * c_prev)", BLOCKS),
    "weights of output gates by c before the step": (SHARED, "o * c)", "o * c_prev)", BLOCKS),
    "gradients by what is seen of the row before": (BACK, "store(offset(layer.d_row, k), zero)", "pass", BLOCKS),
    "nothing seen beside the normalised c": (CELLS, "seen(layer, c_before(layer, low, row), a_x, out)", "pass",
                                             BLOCKS | {"layer_norm": True}),
    "c after a reset": (CELLS, "            c = fill(layer.y, 0.0)", "            pass", PROJECTION),
    "mask of c by packed rows": (CELLS, "position = rows.places[low + row]", "position = (low + row)", RANDOM),
    "last c of another sequence": (CELLS, "layer.c_n, rows.order[row]", "layer.c_n, row", PROJECTION),
    "last h of another sequence": (CELLS, "layer.h_n, rows.order[row]", "layer.h_n, row", RELU),
    "y by packed rows": (CELLS, "layer.y, place * layer.y_row", "layer.y, (low + row) * layer.y_row", TANH),
    "h after a reset": (CELLS, "fill(layer.y, 0.0) if gone else h)", "h)", TANH),
    "no recurrent dropout": (CELLS, "h = h * load(offset(layer.factors, row * layer.h_row + k))", "pass", RANDOM),
    "zoneout of an h that is not kept": (CELLS, "store(offset(layer.h_state, row * layer.h_row + k), h)", "pass",
                                         RANDOM),
    "mask of h by that of c": (CELLS, "zoned(masks.zone_h, masks.start_h", "zoned(masks.zone_h, masks.start_c", RANDOM),
    "c shown without its bias": (CELLS, "fma(load(offset(n_c, k)), gain, bias)", "load(offset(n_c, k)) * gain", NORM),
    "relu left out": (CELLS, "select(value < 0.0, 0.0, value)", "value", RELU),
    "tanh left out": (CELLS, "value = tanh(value)", "pass", TANH),
    "output by the next row's gate": (CELLS, "layer.out_row), output(cell, held, c))\n        held",
                                      "layer.out_row), output(cell, held_next, c))\n        held", PROJECTION),
    "h before the first step not reset": (FORTH, "fill(layer.h_n, 0.0) if gone else h)", "h)", TANH),
    "c before the first step not reset": (FORTH, "fill(layer.h_n, 0.0) if gone else c)", "c)", PROJECTION),
    "state of an empty sequence elsewhere": (FORTH, "layer.h_n, sequence * features", "layer.h_n, row * features",
                                             TANH),
    "input products twice": (FORTH, "    if layer.ahead:\n        inputs = 0", "    if False:\n        inputs = 0",
                             PROJECTION),
    "input products of the first step": (FORTH, "(low - rows.offsets[step - step % layer.ahead] + start)", "start",
                                         TANH),
    "bias not packed": (FORTH, "units if biased else 0, block", "0, block", PROJECTION),
    "gains of x packed twice": (FORTH, "_pack_gates(offset(gains, GATES * units)", "_pack_gates(gains", NORM),
    "dy by packed rows": (BACK, "load_first(offset(layer.dy, place", "load_first(offset(layer.dy, (here + row)", TANH),
    "noted gradient by h of another row": (BACK, "layer.dh_steps, place", "layer.dh_steps, 0", TANH),
    "noted gradient by c of another row": (BACK, "layer.dc_steps, place", "layer.dc_steps, 0", PROJECTION),
    "slope of tanh": (BACK, "(1.0 - h * h)", "(1.0 - h)", TANH),
    "slope of relu": (BACK, "select(-h < 0.0, dh, 0.0)", "dh", RELU),
    "gradient by o left out": (BACK, "store(offset(dout, k), d_o)", "pass", NORM),
    "gradient by the old c dropped": (BACK, "store(state, dc + old)", "store(state, dc)", RANDOM),
    "gradient by the normalised c dropped": (BACK, "dc + more, tape", "dc, tape", NORM),
    "no recurrent dropout back": (BACK, "dh = dh * load(offset(layer.factors, row * layer.h_row + k))", "pass", RANDOM),
    "gradient by the old h dropped": (BACK, "dh = dh + load(offset(layer.dh_old, row * layer.h_row + k))", "pass",
                                      RANDOM),
    "gradient by h through a reset": (BACK, "store(at, fill(at, 0.0) if gone else dh)", "store(at, dh)", TANH),
    "gradient by c through a reset": (
        BACK, "store(offset(layer.dc_rows, row * layer.blocks * width + k), fill(layer.dc_rows, 0.0))", "pass",
        PROJECTION,
    ),
    "c back by the scale of h's products": (BACK, "load(offset(scales, 2 * width))", "load(offset(scales, width))",
                                            NORM),
    "gains of h by the norms of x": (GRADIENTS, "fma(d, load(offset(norms, size)), h)", "fma(d, load(norms), h)", NORM),
    "bias of c without its gradient": (GRADIENTS, "gain), bias + d", "gain), bias", NORM),
    "bias by the gradient of x's products": (GRADIENTS, "add_bias(layer.da,", "add_bias(layer.da_x,", NORM),
    "gradient by another h0": (GRADIENTS, "offset(dh0, sequence", "offset(dh0, row", TANH),
    "dh by x's products": (DRIVER, "layer.da_h, here - low", "layer.da_x, here - low", NORM),
    "recurrent weights by x's products": (DRIVER, "layer.da_h, rows, sums.hh", "layer.da_x, rows, sums.hh", NORM),
    "dx by the pre-activations": (DRIVER, "layer.da_x, start, end", "layer.da, start, end", NORM),
    "no truncation": (DRIVER, "if layer.truncated:", "if False:", TRUNCATED),
    "projection's gradient not gathered": (DRIVER, "gather(layer, here - low, row_first, active)", "pass", PROJECTION),
    "gradient by the last h dropped": (DRIVER, "if k < features:", "if False:", TANH),
}  # fmt: skip
NOTICED = 1e3  # a slip must stand out by this factor over the bound


def errors(fields):
    """Return the largest error of the calls of a cell, in float64 against the reference; and its bound."""
    cpu, found = BackendUnderTest("cpu"), []
    for case in cases(**fields):
        p, of_backends = problem(case), []
        for backend in (cpu, REFERENCE):
            with backend.active():
                prepared = backend.implementation.prepare(p.cell, Signature(*p.x.shape[:2], False, False))
                y, h_n, c_n, _ = prepared.forward(
                    p.params, p.x, *p.state, p.lengths, None, False, np.ascontiguousarray(p.resets)
                )
                arrays = {"inference": y, "last h": h_n, "last c": c_n}
                y, (h_n, c_n), tape = lstm_forward(
                    p.params, p.x, p.state, p.lengths, **model_of(p), dropout_seed=DROPOUT_SEED, resets=p.resets
                )
                grads = lstm_backward(p.params, tape, p.dy, p.dstate, keep_state_gradients=True)
                arrays |= results(backend, y, h_n, c_n, grads)
                of_backends.append(arrays | {f"steps {n}": value for n, value in enumerate(grads.steps)})
        ours, true = of_backends
        found += [normalised_error(ours[name], value) for name, value in true.items()]
    return float(max(found, key=lambda error: np.inf if np.isnan(error) else error))


def put(slip):
    """Compile the kernels with a slip, and have the backend call them."""
    changed, old, new, _ = SLIPS[slip]
    package, used = "fastlstm.kernels.cpu", [f"fastlstm.kernels.cpu.{name}" for name in MODULES]
    originals = {name: importlib.import_module(name) for name in used}
    of_driver = MODULES.index(changed) > MODULES.index(FORTH)
    sources = {name: inspect.getsource(module) for name, module in originals.items()}
    source = sources[f"{package}.{changed}"]
    assert source.count(old) == 1, f"{slip}: {old!r} is there {source.count(old)} times"
    sources[f"{package}.{changed}"] = source.replace(old, new)
    for name in used[MODULES.index(changed) :]:
        module = types.ModuleType(name)
        module.__file__ = originals[name].__file__
        sys.modules[name] = module
        exec(compile(sources[name], module.__file__, "exec"), vars(module))
    forth, back = originals[f"{package}.{FORTH}"], originals[f"{package}.{DRIVER}"]
    if not of_driver:
        forth.phased_forward = sys.modules[f"{package}.{FORTH}"].phased_forward
    back.phased_backward = sys.modules[f"{package}.{DRIVER}"].phased_backward
    return originals


def run_all(wanted):
    """Write the errors with each slip that is wanted, and without any, a line each."""
    from fastlstm.kernels.cpu import kernel_cache, phased_backward, phased_forward

    kept = [phased_forward.phased_forward, phased_backward.phased_backward]
    fields = {json.dumps(SLIPS[slip][3]): SLIPS[slip][3] for slip in wanted}
    # The key of a cached kernel says nothing of these sources. Nor may an unchanged kernel come from the disk: another
    # process has named its functions, and the linker takes a changed one of the same name for it.
    kernel_cache.read = lambda *_: None
    kernel_cache.write = lambda *_: None
    for name, each in fields.items():
        note(f"none of {name}", errors(each))
    for slip in wanted:
        originals = put(slip)
        kept += [phased_forward.phased_forward, phased_backward.phased_backward]  # their code is freed with them
        note(slip, errors(SLIPS[slip][3]))
        sys.modules.update(originals)
        phased_forward.phased_forward, phased_backward.phased_backward = kept[:2]


def note(name, error):
    sys.stdout.write(json.dumps({name: error}) + "\n")
    sys.stdout.flush()


@pytest.fixture(scope="module")
def found(request):
    """Run the mutants that this run tests in a process of its own, since what they compute there is wrong."""
    if BackendUnderTest("cpu").missing:
        pytest.skip(str(BackendUnderTest("cpu").missing))
    wanted = [
        item.callspec.params["slip"]
        for item in request.session.items
        if item.path == request.node.path and hasattr(item, "callspec")
    ]
    tests = os.path.dirname(os.path.dirname(__file__))
    path = os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, __file__, *wanted], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
        timeout=60 + 30 * len(wanted), check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr}"
    return {name: error for line in done.stdout.splitlines() for name, error in json.loads(line).items()}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_noticed(found, slip):
    fields = SLIPS[slip][3]
    bound = BOUNDS["layer norm" if "layer_norm" in fields else "agreement"].float64
    assert found[f"none of {json.dumps(fields)}"] <= bound, "the unchanged kernels are wrong"
    assert not found[slip] <= NOTICED * bound  # NaN is noticed, too


if __name__ == "__main__":
    run_all(sys.argv[1:] or list(SLIPS))
