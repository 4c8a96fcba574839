"""Run a bundle on a board that is emulated here, to see that it works there."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from compiler.cli.build import positive


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="what `build` wrote, for arm64")
    parser.add_argument("prompt", metavar="PROMPT", help="text to continue")
    parser.add_argument(
        "--board", choices=("qemu",), required=True,
        help="qemu: an emulated Raspberry Pi 4 with Debian's Python, made on first use; its speed means nothing",
    )  # fmt: skip
    parser.add_argument("--max-new-tokens", type=positive, default=128, metavar="N", help="(default: 128)")
    parser.add_argument("--threads", type=positive, metavar="N", help="of the kernels (default: the runtime's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of streaming text")


def run(options: argparse.Namespace) -> int:
    """What the runtime there prints is this terminal's; gives its exit code."""
    from compiler.board import qemu
    from compiler.errors import UserError
    from runtime.bundle import read_manifest

    bundle = options.bundle.resolve()
    target = read_manifest(bundle).target  # what cannot run is told before a board is made
    if target.arch != "aarch64":
        raise UserError(
            f"{bundle}: is built for {target.arch} ({target.name}), but the board is arm64. Build it with --target "
            f"rpi4; here, `python -m runtime generate` runs what is built for this machine."
        )
    qemu.root(lambda line: print(line, file=sys.stderr))
    more = ["--max-new-tokens", str(options.max_new_tokens)]
    more += [] if options.threads is None else ["--threads", str(options.threads)]
    more += ["--json"] if options.json else []
    with qemu.start_bundle(bundle, "generate", more, options.prompt) as process:
        return _ended(process.wait())


def _ended(code: int) -> int:
    """As a shell has it: 128 and the signal's number."""
    if code == -4:
        print("error: the board's CPU, a Cortex-A72, lacks an instruction that was to be executed.", file=sys.stderr)
    return code if code >= 0 else 128 - code
