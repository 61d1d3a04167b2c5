"""``fastlstm bench``: how fast this is, here, against what it is compared with, losses included.

Read in this order: :mod:`~fastlstm.bench.work` says what there is to compute, :mod:`~fastlstm.bench.sides` and
:mod:`~fastlstm.bench.peers` who computes it, :mod:`~fastlstm.bench.clock` how that is timed (the method),
:mod:`~fastlstm.bench.ceilings` what the machine could do at most, :mod:`~fastlstm.bench.grid` which sizes are measured,
:mod:`~fastlstm.bench.run` does it, and :mod:`~fastlstm.bench.results` is what comes out. The modules ``table``,
``pictures`` and ``page`` show results and measure nothing. Each is imported when it is needed.
"""
