"""onnxruntime-web, with which a browser runs the model: 14 MB of JavaScript and WebAssembly from npm.

It is not a part of this project. `fetch` gets it once with npm, which checks the package's hash, into a cache folder.
"""

import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from ast_core.errors import UserError

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""The package's hash in npm's registry."""

RUNTIME_FILES = ("ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
RUNTIME_TYPES = {"js": "text/javascript", "mjs": "text/javascript", "wasm": "application/wasm"}

FETCH_S = 300.0


def cache_folder() -> Path:
    """Where the files lie: below $XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ast-ray" / f"{PACKAGE}-{VERSION}"


def read() -> dict[str, bytes] | None:
    """The files by name; None if they have not been fetched."""
    folder = cache_folder()
    if not all((folder / name).is_file() for name in RUNTIME_FILES):
        return None
    return {name: (folder / name).read_bytes() for name in RUNTIME_FILES}


def fetch() -> Path:
    """Fetch the files with npm, and return their folder.

    Raises:
        UserError: npm is not installed, cannot fetch the package, or gets another one than the known one.
    """
    if shutil.which("npm") is None:
        raise UserError(f"fetching {PACKAGE} needs npm, which comes with Node.js; install it")
    folder = cache_folder()
    with tempfile.TemporaryDirectory(prefix="ast-npm-") as temporary:
        packed = _pack(Path(temporary))
        with tarfile.open(packed) as archive:
            for name in RUNTIME_FILES:
                archive.extract(archive.getmember(f"package/dist/{name}"), temporary, filter="data")
        made = Path(temporary) / "package" / "dist"
        folder.mkdir(parents=True, exist_ok=True)
        for name in RUNTIME_FILES:  # all files are replaced in one step each, and `read` wants all of them
            shutil.copy(made / name, folder / f"{name}.unfinished")
            os.replace(folder / f"{name}.unfinished", folder / name)
    return folder


def _pack(folder: Path) -> Path:
    command = ["npm", "pack", f"{PACKAGE}@{VERSION}", "--json", "--ignore-scripts", "--pack-destination", str(folder)]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=FETCH_S, check=False)
    except subprocess.TimeoutExpired as err:
        raise UserError(f"npm did not fetch {PACKAGE} {VERSION} within {FETCH_S:g} s") from err
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"npm cannot fetch {PACKAGE} {VERSION}: {last}")
    (info,) = json.loads(done.stdout)
    if info["integrity"] != INTEGRITY:
        raise UserError(f"npm got another {PACKAGE} {VERSION} than the known one: {info['integrity']}")
    return folder / str(info["filename"])
