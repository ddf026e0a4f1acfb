"""Where the command line starts: the script `gdn2-edge`, and `python -m gdn2_edge` where that is not on the path.

Imports nothing that takes time, so that a signal is met in order from the first moment on.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line, see `cli.main`. Ctrl-C ends it with 130 and SIGTERM with 143; temporary files go."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        from gdn2_edge.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as end:
        sys.exit(143 if terminated else end.code)


terminated: list[int] = []  # C code that was interrupted may raise another error in place of SystemExit


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    terminated.append(number)
    sys.exit(143)


if __name__ == "__main__":
    main()
