"""``fastlstm bench``: speed on this machine, compared with other libraries, losses included.

Read in this order: :mod:`~fastlstm.bench.work` (what is computed) and :mod:`~fastlstm.bench.grid` (at which sizes),
:mod:`~fastlstm.bench.sides` and :mod:`~fastlstm.bench.peers` (by which library), :mod:`~fastlstm.bench.clock` (the
timing loop), :mod:`~fastlstm.bench.peaks` (the peak of the machine), :mod:`~fastlstm.bench.run` (a measurement),
:mod:`~fastlstm.bench.results` (its file), :mod:`~fastlstm.bench.report` and :mod:`~fastlstm.bench.pictures` (tables and
pictures). The programs in ``benchmarks/`` use the same modules.
"""
