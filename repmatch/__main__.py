"""Run the command line with `python -m repmatch`."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    if not __package__:
        # Run by path, Python puts this folder first on the import path, and `selectors` would shadow the standard one.
        sys.exit("run it as a module: python -m repmatch")
    from repmatch.cli import main

    main()
