"""The flags as fields of SGLang's ServerArgs, where plugins can declare some (patches/0001).

SGLang finds the class through its entry point while it builds ServerArgs, before plugins load.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from sglang_vericache.flags import CONFIG_HELP, FLAGS, SWITCH_HELP
from sglang_vericache.sources import CONFIG, SWITCH

# Raw, as the command line or a caller of Engine gives them; `flags.config_from` converts.
_Value = str | int | float | None
_Config = str | dict | None

VeriCacheFields = msgspec.defstruct(
    "VeriCacheFields",
    [
        # None: not given, so that the environment may decide.
        (SWITCH, Annotated[bool | None, SWITCH_HELP], None),
        (CONFIG, Annotated[_Config, CONFIG_HELP], None),
        *((flag.name, Annotated[_Value, flag.help], None) for flag in FLAGS),
    ],
    namespace={"_NS_PATH": "spec"},
    module=__name__,
)
