"""``python -m sglang_vericache``."""

from sglang_vericache.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
