"""SGLang plugin that drafts with a compressed KV cache and verifies with the full one."""

__version__ = "0.1.0"

# The plugin hooks private functions, so it runs on exactly the release it was written against.
PINNED_SGLANG = "0.5.23"
