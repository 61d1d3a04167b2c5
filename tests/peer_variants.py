"""The values of other projects' tests that the plain LSTM cannot express, and what each needs of a variant.

The golden values' own scripts leave them out; ``family/test_peer_values.py`` meets them.
"""

PREFIX = "ONNXRuntime_TestLSTM"
ONNXRUNTIME = {
    "LargeBatchWithClip#1": "clip",
    f"{PREFIX}ForwardPeepHole#1": "peephole",
    f"{PREFIX}BidirectionalBasic#1": "peephole",
    f"{PREFIX}ForwardNoBiasUsePeepholes#1": "peephole",
    f"{PREFIX}ForwardInputForget#1": "peephole, input_forget",
    f"{PREFIX}ForwardClip#1": "peephole, clip",
    f"{PREFIX}Backward#1": "peephole",
    f"{PREFIX}Activation#1": "activations",
    f"{PREFIX}BatchReallocation#1": "activations",
    f"{PREFIX}BatchReallocation#2": "activations",
    f"{PREFIX}OutputWrite#1": "activations",
    f"{PREFIX}OutputWrite#2": "activations",
    f"{PREFIX}SequenceLengthPartialZeros#1": "activations",
    f"{PREFIX}SequenceLengthShorterThanInputSequenceLength#1": "peephole",
    f"{PREFIX}SequenceLengthShorterThanInputSequenceLengthNoP#1": "peephole",
    "BackwardCompute#1": "gradient from given gates (the tape is opaque)",
}
TENSORFLOW = 10  # sets of values of TensorFlow.js's LSTM layer, whose gates are hard sigmoids
