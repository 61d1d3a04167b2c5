"""On the path before CuPy, this is what `import cupy` finds: the stand-in for it, in any program."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from host_cuda import FakeCupy

sys.modules["cupy"] = FakeCupy()
