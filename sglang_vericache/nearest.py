"""What to say about a name that nobody knows."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """A sentence with the known name that ``name`` was probably meant to be, and all of them.

    Args:
        what: what kind of name it is and where it stands, for example ``config file a.yaml: key``.
    """
    known = list(known)
    # The prefixes of flags and variables are no part of a key's spelling.
    spelling = name.lower().replace("-", "_")
    for prefix in ("__", "sglang_", "vericache_"):
        spelling = spelling.removeprefix(prefix)
    close = {k.lower().removeprefix("sglang_").removeprefix("vericache_"): k for k in known}
    best = difflib.get_close_matches(spelling, close, n=1, cutoff=0.5)
    hint = f"Did you mean {close[best[0]]}? " if best else ""
    return f"{what} {name!r} is not known. {hint}Known: {', '.join(known)}."
