"""Keeping a checkout's root off Python's path.

``python -m`` puts the current directory first on the path. In the root of a checkout that brings
our kernels/ along, which is also the name of a distribution: transformers imports what it finds.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

OUR_KERNELS = Path("kernels", "pool_format.py")


def leave_checkouts() -> None:
    """Take such roots off the path of this process, and off PYTHONPATH for those it starts.

    Off it, not behind the rest: where that distribution is missing ours would still pass for it.
    Packages that were imported before know their folders, so they lose nothing.
    """
    sys.path[:] = [entry for entry in sys.path if not _is_root(entry)]
    listed = os.environ.get("PYTHONPATH")
    if listed:
        kept = [entry for entry in listed.split(os.pathsep) if not _is_root(entry)]
        os.environ["PYTHONPATH"] = os.pathsep.join(kept)


def _is_root(entry: str) -> bool:
    """An empty entry is the current directory."""
    try:
        return (Path(entry) / OUR_KERNELS).is_file()
    except OSError:  # an entry that may not be looked at
        return False
