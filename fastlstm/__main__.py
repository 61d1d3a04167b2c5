"""``python -m fastlstm``: the command line, where no script of it is on the path."""

import sys

from fastlstm.cli import main

sys.exit(main())
