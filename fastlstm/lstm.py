"""class LSTM: what users create, with the model's parameters and calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastlstm import checks, interchange, parameters
from fastlstm.backends.base import Array
from fastlstm.cell import Cell
from fastlstm.exchange import Exchange
from fastlstm.mask_keys import new_key
from fastlstm.recurrent import on_host

__all__ = ["LSTM"]


class LSTM(Exchange):
    """A long short-term memory network over NumPy or CuPy arrays.

    The constructor and the call follow ``torch.nn.LSTM``. The equations are those of Hochreiter and
    Schmidhuber (1997) with the forget gate of Gers, Schmidhuber and Cummins (2000); they stand in
    :mod:`fastlstm.backends.reference`.

    Parameters
    ----------
    input_size : int
        Number of input features I.
    hidden_size : int
        Number of hidden units H.
    num_layers : int
        Number of stacked layers L.
    bias : bool
        Whether the pre-activations have a bias (one, where PyTorch adds two).
    batch_first : bool
        Whether input and output are (B, T, features) in place of (T, B, features); the states never are.
    dropout : float
        Probability in [0, 1) of dropping an output of every layer but the last; in :meth:`forward` only.
    bidirectional : bool
        Whether each layer also runs backwards in time; the outputs stand side by side.
    proj_size : int
        Number P of features of h, as in PyTorch: ``h = weight_hr_l0 @ (o * tanh(c))``, of shape (P, H); P < H, and 0
        for no projection. Output and h then have P features, c has H.
    peephole : bool
        Whether the gates also see the cell state (Gers, Schraudolph and Schmidhuber 2002): i and f the one before the
        step, o the new one. Each unit has three more parameters, ``weight_peephole_l0`` (3, H). With `block_size`, a
        gate sees the cell states of all units of its block.
    forget_gate : bool
        False: the cell of 1997, which forgets nothing (f = 1); its weights have no rows for f.
    coupled : bool
        Whether f = 1 - i (Greff et al. 2017), without rows for f: ONNX's `input_forget`.
    block_size : int
        Number S of consecutive units that share i, f and o, the memory blocks of 1997; H is a multiple of S.
    truncated : bool
        Whether gradients are those of 1997: none reaches the h of the step before, so that errors travel back in time
        in c alone. `grads.x` is not zero as in the paper, so that stacked layers learn.
    activations : tuple of str
        Functions of the gates, the candidate and the output, out of ``sigmoid``, ``tanh``, ``relu``, ``hard_sigmoid``
        (0.2 a + 0.5 between 0 and 1), ``softsign``, ``identity`` and ``1997`` (candidate 4 sigmoid(a) - 2, output
        2 sigmoid(c) - 1).
    clip : float, optional
        Clips the pre-activations to [-clip, clip], as ONNX Runtime does; the gradient of a clipped value is zero.
    cell_clip : float, optional
        Clips c, as cuDNN and TensorFlow Lite do.
    layer_norm : bool
        Whether ``weight_ih @ x`` and ``weight_hh @ h`` are normalised, each with a gain, and c with gain and bias
        before its output activation (Ba, Kiros and Hinton 2016, as in haste).
    recurrent_dropout : float
        Probability of dropping an h on its way into the next step, in :meth:`forward` only; a sequence has one mask
        (Gal and Ghahramani 2016).
    zoneout : tuple of float
        Probabilities that a unit keeps its old c, its old h (Krueger et al. 2017), in :meth:`forward`; a call for
        inference uses the expectation.
    forget_bias : float
        The initial bias of the forget gate.
    reverse : bool
        Whether the only direction runs backwards in time: ONNX's `reverse`, Keras's `go_backwards` with the outputs in
        the order of the inputs. Such a model has no `step`: it starts at the sequence's end.
    merge : str
        How the outputs of two directions are put together: ``concat``, ``sum``, ``mean`` or ``product``.
    dtype : dtype
        float32 or float64: the dtype of parameters, inputs and outputs.
    precision : str
        What the matrix products of a float32 model on a GPU may round their factors to: ``float32``, nothing;
        ``tf32``, 11 significant bits; ``bf16``, 8. See :attr:`precision`.
    seed : None, int, SeedSequence, BitGenerator or Generator
        Determines the initial parameters and the dropout masks, as for :func:`numpy.random.default_rng`.

    Attributes
    ----------
    params : dict of str to array
        The live parameters: change their contents, or replace them with arrays of the same shape and dtype. Those of
        a frozen model (:meth:`freeze`) cannot change.
    cell : Cell
        Sizes, dtype and variant of the model.
    batch_first : bool
        As given.

    Notes
    -----
    With CuPy arrays, all work of a call goes to the current stream (``with cupy.cuda.Stream():``) of the arrays'
    device, and no call waits for the GPU. Use one stream, or events, between calls that depend on each other, as for
    all of CuPy. Kernels whose blocks wait for each other run one at a time on a device, whatever their streams are.

    dtype, `precision`, variant, H, T, B, `bidirectional` and the device decide between one launch a sequence and
    launches each step, and lengths do not; :meth:`plan` says which, and whether training or resets are run in another
    way. For many sequences and hidden units, cuBLAS's products, one a step, are estimated to be faster.

    The same call on one stream gives bit-identical results each time. What a sequence gets depends on the others in
    rounding alone: by B, if it decides between the two, and because cuBLAS may sum in another order for other sizes of
    a product, which are those of all lengths together. In one launch, the recurrence itself depends on no other
    sequence; nor does :meth:`step` of up to 64 sequences where it is one launch a layer.

    A CUDA graph can capture that :meth:`step`, with any number of sequences. First call it once on the same stream with
    the same shapes, outside the capture: that compiles the kernel and takes memory from the driver, which a capture
    forbids. The graph reads parameters, input and state where they lie, and writes the arrays that the captured call
    has returned: keep all of them, and change their contents between its launches. Calls of whole sequences, and steps
    with `proj_size`, `layer_norm`, `zoneout`, `peephole` and `block_size` together, or of an :class:`fastlstm.RNN`,
    call cuBLAS and cannot be captured.

    Examples
    --------
    >>> import numpy as np
    >>> lstm = LSTM(input_size=3, hidden_size=8, seed=0)
    >>> lstm
    LSTM(3, 8, dtype=float32)  # 384 parameters
    >>> x = np.ones((5, 2, 3), np.float32)  # 5 time steps, 2 sequences
    >>> y, (h_n, c_n) = lstm(x)
    >>> y.shape, h_n.shape
    ((5, 2, 8), (1, 2, 8))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        peephole: bool = False,
        forget_gate: bool = True,
        coupled: bool = False,
        block_size: int = 1,
        truncated: bool = False,
        activations: tuple[str, str, str] = ("sigmoid", "tanh", "tanh"),
        clip: float | None = None,
        cell_clip: float | None = None,
        layer_norm: bool = False,
        recurrent_dropout: float = 0.0,
        zoneout: tuple[float, float] = (0.0, 0.0),
        forget_bias: float = 1.0,
        reverse: bool = False,
        merge: str = "concat",
        dtype: Any = np.float32,
        precision: str = "float32",
        seed: Any = None,
    ) -> None:
        cell = Cell(
            input_size, hidden_size, num_layers, bias, dropout, bidirectional, dtype, peephole, proj_size, forget_gate,
            coupled, block_size, truncated, activations, clip, cell_clip, layer_norm, recurrent_dropout, zoneout,
            reverse, merge, precision=precision,
        )  # fmt: skip
        self._initialise(cell, batch_first, seed, forget_bias)

    @classmethod
    def from_torch_state_dict(
        cls,
        state_dict: Mapping[str, Array],
        *,
        prefix: str = "",
        batch_first: bool = False,
        dropout: float = 0.0,
        seed: Any = None,
    ) -> LSTM:
        """Build a model from the weights of a ``torch.nn.LSTM``, or of one layer from those of an ``LSTMCell``.

        Parameters
        ----------
        state_dict : mapping of str to numpy.ndarray
            ``{name: tensor.numpy() for name, tensor in module.state_dict().items()}``. PyTorch's two biases
            are added.
        prefix : str
            What stands before each name, for an LSTM inside a larger module; names without it are left out.
        batch_first, dropout
            As in the constructor: a state dict does not hold them.
        seed : None, int, SeedSequence, BitGenerator or Generator
            Determines the dropout masks, as for :func:`numpy.random.default_rng`; without it, each model draws others.

        Raises
        ------
        ArgumentError, ShapeError, DTypeError, ArrayTypeError
            If the mapping is not that of a ``torch.nn.LSTM``.
        """
        cell, params = interchange.from_torch_state_dict(state_dict, prefix=prefix, dropout=dropout)
        return cls._from(cell, params, batch_first, new_key(parameters.generator(seed)))

    def to_torch_state_dict(self, *, prefix: str = "") -> dict[str, np.ndarray[Any, Any]]:
        """Return the weights under PyTorch's names: the inverse of :meth:`from_torch_state_dict`.

        The bias goes to ``bias_ih``, and ``bias_hh`` is zero.
        """
        given = checks.params(self.cell, self.params)
        params = {name: on_host(name, value) for name, value in given.items()}
        return interchange.to_torch_state_dict(self.cell, params, prefix=prefix)
