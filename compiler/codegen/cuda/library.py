"""model.so of a CUDA bundle: the C runtime and the tables, compiled and linked by `zig cc` for the target's CPU."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from compiler.codegen import link
from compiler.codegen.link import LinkError
from targets import Target

HERE = Path(__file__).parent
RUNTIME = ("open", "memory", "code", "run", "measure")
# No debug information and no paths, so that equal inputs give equal bytes in any folder.
FLAGS = ("-c", "-O2", "-std=c11", "-fPIC", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra", "-Werror")


def build(tables: str, out: Path, target: Target) -> None:
    """Compile and link; `tables` is the C text of tables.source. Raises LinkError."""
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".objects.", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        (folder / "tables.c").write_text(tables, encoding="utf-8")
        sources = [*(HERE / f"{name}.c" for name in RUNTIME), folder / "tables.c"]
        objects = [_compile(source, folder, target) for source in sources]
        link.link(objects, out, target, ("dl",))


def _compile(source: Path, folder: Path, target: Target) -> Path:
    made = folder / f"{source.stem}.o"
    command = [sys.executable, "-m", "ziglang", "cc", "-target", target.zig_triple, *FLAGS, f"-I{HERE}"]
    command += ["-o", str(made), str(source)]
    link.require_zig(made)
    done = subprocess.run(command, env=link.zig_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise LinkError(
            f"{source}: compiling for {target.zig_triple} failed (zig cc left with {done.returncode}):\n{done.stderr}"
        )
    return made
