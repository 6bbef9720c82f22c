"""The flags as fields of SGLang's ServerArgs, where plugins can declare some (patches/0001).

SGLang finds the class through its entry point while it builds ServerArgs, before plugins load.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from sglang_vericache.flags import FLAGS, SWITCH, SWITCH_HELP

# Raw, as the command line or a caller of Engine gives them; `flags.config_from` converts.
_Value = str | int | float | None

VeriCacheFields = msgspec.defstruct(
    "VeriCacheFields",
    [
        (SWITCH, Annotated[bool, SWITCH_HELP], False),
        *((flag.name, Annotated[_Value, flag.help], None) for flag in FLAGS),
    ],
    namespace={"_NS_PATH": "spec"},
    module=__name__,
)
