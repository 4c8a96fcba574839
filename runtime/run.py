"""The file `run` of a self-contained bundle: python3 BUNDLE/run "Once upon a time". Needs Python and nothing else.

What the bundle carries is used before anything of the same name that is installed: the runtime (runtime.zip), TVM's two
libraries and the tokenizer library. Nothing of it is imported before its digest was compared with the manifest's: here
that of runtime.zip, and the runtime itself then checks all files, this one too, before it loads a library.
The digests find damage and half-made copies. They cannot stop somebody who may write to the bundle, and who could write
the manifest as well: run only bundles that you would run any program from.
This file alone is Python 3.6, so that an older Python than is needed says so.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import List

USAGE = """usage: python3 {name} PROMPT [options of generate]  continue a text
       python3 {name} --chat [options of chat]        talk; /reset starts over, /exit leaves
       python3 {name} --serve [options of serve]      answer OpenAI's requests over HTTP
       python3 {name} --info [--verify]               what this bundle is, whether it runs here, and if it is whole
       python3 {name} --bench [options of bench]      how fast it is here
       python3 {name} --rpc-server [its options]      offer this machine for tuning
       python3 {name} PROMPT --help                   the options
"""
RUNTIME = "runtime.zip"
VERBS = ("--chat", "--serve", "--info", "--bench", "--rpc-server")  # the last one takes no bundle


OLD_TOKENIZER = "tokenizers.cpython-38-*.so"  # the other one is for Python 3.9 and later


def main(arguments: List[str]) -> int:
    """Run one command; gives the exit code."""
    here = Path(__file__).resolve().parent
    least = (3, 8) if list(here.glob(OLD_TOKENIZER)) else (3, 9)
    if sys.version_info < least:
        return refuse(too_old(least[1]))
    if not arguments or arguments[0] in ("-h", "--help"):
        (sys.stdout if arguments else sys.stderr).write(USAGE.format(name=sys.argv[0]))
        return 0 if arguments else 2
    # A word that is mistyped, or options before the prompt: nobody wants them continued.
    if arguments[0][:2] == "--" and arguments[0][2:3].isalpha() and arguments[0] not in VERBS:
        return refuse(f"{arguments[0]} is none of {', '.join(VERBS)}. Options come after the prompt.")
    archive = here / RUNTIME
    try:
        expected = json.loads((here / "manifest.json").read_bytes())["files"][RUNTIME]["sha256"]
        intact = hashlib.sha256(archive.read_bytes()).hexdigest() == expected
    except OSError as error:
        return refuse(f"{error.filename}: cannot be read: {error.strerror}. Copy the bundle again.")
    except (ValueError, KeyError, TypeError) as error:
        return refuse(f"{here}/manifest.json: cannot be read: {error}. Copy the bundle again.")
    if not intact:
        return refuse(f"{archive}: is damaged: its SHA-256 is not the manifest's. Copy the bundle again or rebuild it.")
    rest_of_path = [place for place in sys.path if place != str(here)]
    sys.path[:] = [str(archive), str(here), *rest_of_path]  # the second: where the tokenizer library is
    os.environ["QUERN_TVM_LIBS"] = str(here)
    from runtime.__main__ import main as run

    first, rest = arguments[0], arguments[1:]
    if first in VERBS[:-1]:
        return run([first[2:], str(here), *rest])
    if first == "--rpc-server":
        return run([first[2:], *rest])
    return run(["generate", str(here), f"--prompt={first}", *rest])


def too_old(minor: int) -> str:
    """What to do about a Python before 3.`minor`. Ubuntu 18.04 (JetPack 4) has 3.6 and, in its archive, 3.8."""
    found = ".".join(map(str, sys.version_info[:2]))
    return (
        f"this is Python {found}, but 3.{minor} or later is needed. Start it with another one, like python3.{minor}; "
        f"on Ubuntu and JetPack: sudo apt install python3.{minor}."
    )


def refuse(what: str) -> int:
    """One message and an exit code, as the runtime has it."""
    sys.stderr.write(f"error: {what}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
