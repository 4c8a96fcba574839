"""What a self-contained bundle carries besides the model: all that a device with a bare Python lacks.

runtime.zip (the runtime package), `run` (the program to start), TVM's two libraries and the tokenizer library of the
target's architecture, out of wheels whose digests stand here. Files of other wheels never get into a bundle: the wheel
is checked before it is opened, and each file again whenever it is taken from the cache.
tokenizers is older than the compiler's: 0.22.2 is the last one for Python 3.9, and its abi3 library loads in all later
ones. JetPack 4 and 5 have Python 3.8 (the former by apt): bundles for a Jetson carry 0.20.3, the last one for that,
besides; a Python takes the file with its own version in its name first. test_carried_tokenizer.py has all of them read
the same files. numpy is not carried: 50 MB a version of Python, and
runtime/arrays.py does without.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from compiler.codegen.link import cache_dir
from compiler.errors import UserError
from runtime import manifest

RUN, RUNTIME, LICENSES = "run", "runtime.zip", "licenses.txt"
MAX_BYTES = 25_000_000  # what all of it may take on a device
EPOCH = (1980, 1, 1, 0, 0, 0)  # a zip's first day: equal sources are equal bundles


class CarryError(UserError):
    """A file to carry cannot be had, or is not the one that was pinned."""


@dataclass(frozen=True)
class Part:
    """A library: where it is in which wheel, and both digests (SHA-256). python: whose wheel it is, for pip."""

    wheel: str
    wheel_sha256: str
    member: str
    sha256: str
    megabytes: int
    python: str = "3.11"

    @property
    def name(self) -> str:
        """Its name in the bundle."""
        return self.member.rpartition("/")[2]

    @property
    def requirement(self) -> str:
        """As pip spells it: apache-tvm==0.27.0.post1."""
        project, version = self.wheel.split("-")[:2]
        return f"{project.replace('_', '-')}=={version}"

    @property
    def platforms(self) -> list[str]:
        """The platform tags that end the wheel's name."""
        return self.wheel.removesuffix(".whl").rpartition("-")[2].split(".")

    @property
    def cached(self) -> Path:
        """Where it is kept once it was fetched."""
        return cache_dir() / "carried" / self.sha256[:16] / self.name


PARTS = {
    "aarch64": (
        Part(
            "apache_tvm_ffi-0.1.14.post1-cp311-cp311-manylinux_2_24_aarch64.manylinux_2_28_aarch64.whl",
            "c7a759781d4fbf2b99fa12f2741f250b882b06acc2747bb02831d491d1ac7d3c",
            "tvm_ffi/lib/libtvm_ffi.so",
            "673d816bd962daddb55d8b0f8ae137e797500307951d0f721227731df0c13e24",
            3,
        ),
        Part(
            "apache_tvm-0.27.0.post1-py3-none-manylinux_2_27_aarch64.manylinux_2_28_aarch64.whl",
            "4acfdb7653e4e1ba7a707bdf2833db72eb8fda7d04d99141f2a4e1da43171fb7",
            "tvm/lib/libtvm_runtime.so",
            "ba06950fac134b8d71549111fad2c6605cd6f738061fe0482f217c37ccbdff05",
            95,
        ),
        Part(
            "tokenizers-0.22.2-cp39-abi3-manylinux_2_17_aarch64.manylinux2014_aarch64.whl",
            "2249487018adec45d6e3554c71d46eb39fa8ea67156c640f7513eb26f318cec7",
            "tokenizers/tokenizers.abi3.so",
            "fa049ce975669d8a90fb48960f412e626fa54cf596c2f75d6820949f4888e910",
            4,
            "3.9",
        ),
    ),
    "x86_64": (
        Part(
            "apache_tvm_ffi-0.1.14.post1-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
            "4b01a5a3fa07ed3315d5ef1e05d3542dae57a119ef7e77c54bc062414e242f65",
            "tvm_ffi/lib/libtvm_ffi.so",
            "e44372c658f0b5b6833f29402edfdd49d14a1e8ca50999d7e099f7c1f0822baa",
            3,
        ),
        Part(
            "apache_tvm-0.27.0.post1-py3-none-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
            "f503fc903b6e16fda5daacac6698ecb8bc38937f57da7aa29f6c7ab169d08657",
            "tvm/lib/libtvm_runtime.so",
            "43544bbeaea3cd3ffa919f7eac77244753aff28d1440c42f1ba8df03fa6e3948",
            112,
        ),
        Part(
            "tokenizers-0.22.2-cp39-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
            "369cc9fc8cc10cb24143873a0d95438bb8ee257bb80c71989e3ee290e8d72c67",
            "tokenizers/tokenizers.abi3.so",
            "c116fcf1e80d461ce0a35c332974f25949e8359416f50b3d53371810d2ce1ccc",
            4,
            "3.9",
        ),
    ),
}
# For Python 3.8 alone, where a GPU's bundle may meet it: Ubuntu 18.04 and 20.04 on Jetsons.
OLD_PYTHON = {
    "aarch64": Part(
        "tokenizers-0.20.3-cp38-cp38-manylinux_2_17_aarch64.manylinux2014_aarch64.whl",
        "04627b7b502fa6a2a005e1bd446fa4247d89abcb1afaa1b81eb90e21aba9a60f",
        "tokenizers/tokenizers.cpython-38-aarch64-linux-gnu.so",
        "58a43600a38a70d91972d59ac490dadcbe280a4380fa74dd27806f3d21b650e1",
        3,
        "3.8",
    )
}


def fetch(arch: str, offline: bool = False, tvm: bool = True) -> dict[str, bytes]:
    """Name in the bundle -> content, for everything but `run` and the runtime. Raises CarryError.

    tvm: False for a bundle for a GPU, which does without TVM's libraries and may meet Python 3.8.
    From the cache, else from the installed wheel if its file is the pinned one, else from PyPI unless `offline`.
    """
    if arch not in PARTS:
        raise CarryError(
            f"--self-contained: the wheels that a bundle carries exist for {' and '.join(PARTS)}, not for {arch}. "
            f"Leave --self-contained out."
        )
    parts = [part for part in PARTS[arch] if tvm or not part.name.startswith("libtvm_")]
    if not tvm and arch in OLD_PYTHON:
        parts.append(OLD_PYTHON[arch])
    found = {part.name: _here(part) for part in parts}
    missing = [part for part in parts if found[part.name] is None]
    if missing and offline:
        raise CarryError(
            f"--self-contained: {', '.join(part.name for part in missing)} for {arch} must be fetched "
            f"({sum(part.megabytes for part in missing)} MB of wheels), which --offline forbids. Build once without "
            f"--offline; from then on {cache_dir() / 'carried'} has them."
        )
    for part in missing:
        found[part.name] = _download(part)
    return {name: content for name, content in found.items() if content is not None}


def write(libraries: dict[str, bytes], folder: Path) -> None:
    """Put libraries, licences, runtime.zip and `run` into a bundle folder; what is sealed later includes them."""
    for name, content in libraries.items():
        (folder / name).write_bytes(content)
    source = Path(manifest.__file__).parent
    with zipfile.ZipFile(folder / RUNTIME, "w") as archive:  # stored: no version of zlib changes it
        for path in sorted(source.glob("*.py")):
            if path.stem != RUN:
                archive.writestr(zipfile.ZipInfo(f"runtime/{path.name}", EPOCH), path.read_bytes())
    (folder / LICENSES).write_bytes(Path(__file__).with_name(LICENSES).read_bytes())
    (folder / RUN).write_bytes((source / f"{RUN}.py").read_bytes())
    (folder / RUN).chmod(0o755)


def _here(part: Part) -> bytes | None:
    places = [part.cached]
    package, _, inside = part.member.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is not None and spec.submodule_search_locations:
        places.append(Path(next(iter(spec.submodule_search_locations))) / inside)
    for place in places:
        try:
            content = place.read_bytes()
        except OSError:
            continue
        if _sha256(content) == part.sha256:
            return content
    return None


def _download(part: Part) -> bytes:
    """The wheel by pip, as this machine's pip is set up; its file goes to the cache in one step."""
    part.cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=part.cached.parent, prefix=".fetching-") as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--implementation", "cp", "--python-version", part.python, "--dest", scratch]
        command += [f"--platform={platform}" for platform in part.platforms]
        done = subprocess.run([*command, part.requirement], capture_output=True, text=True, check=False)
        wheel = Path(scratch) / part.wheel
        if done.returncode or not wheel.is_file():
            said = [line for line in (done.stderr + done.stdout).splitlines() if line.startswith("ERROR")]
            reason = said[-1].removeprefix("ERROR: ") if said else f"pip brought no {part.wheel}"
            raise CarryError(
                f"--self-contained: {part.requirement} cannot be fetched: {reason.rstrip('.')}. Check the network and "
                f"pip's settings, then try again."
            )
        content = _unpacked(part, wheel)
        fresh = Path(scratch) / part.name
        fresh.write_bytes(content)
        fresh.replace(part.cached)
    return content


def _unpacked(part: Part, wheel: Path) -> bytes:
    with wheel.open("rb") as stream:
        digest = hashlib.sha256()
        while piece := stream.read(1 << 20):
            digest.update(piece)
    if digest.hexdigest() != part.wheel_sha256:
        raise CarryError(
            f"--self-contained: {part.wheel} came with the SHA-256 {digest.hexdigest()}, but quern was tested with "
            f"{part.wheel_sha256}. Do not use it; try again, and ask who runs the package index that pip uses."
        )
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(part.member)
    assert _sha256(content) == part.sha256, f"the digest of {part.member} in PARTS is not that of its wheel"
    return content


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
