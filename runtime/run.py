"""The file `run` of a self-contained bundle: python3 BUNDLE/run "Once upon a time". Needs Python and nothing else.

What the bundle carries is used before anything of the same name that is installed: the runtime (runtime.zip), TVM's two
libraries and the tokenizer library. Nothing of it is imported before its digest was compared with the manifest's: here
that of runtime.zip, and the runtime itself then checks all files, this one too, before it loads a library.
The digests find damage and half-made copies. They cannot stop somebody who may write to the bundle, and who could write
the manifest as well: run only bundles that you would run any program from.
"""

import hashlib
import json
import os
import sys

USAGE = """usage: python3 {name} PROMPT [options of generate]   continue a text
       python3 {name} --chat [options of chat]         talk; /reset starts over, /exit leaves
       python3 {name} --info                           what this bundle is, and whether it runs here
       python3 {name} PROMPT --help                    the options"""
RUNTIME = "runtime.zip"


def main(arguments):
    """Run one command; gives the exit code."""
    here = os.path.dirname(os.path.abspath(__file__))
    if sys.version_info < (3, 9):
        return refuse("this is Python %d.%d, but 3.9 or later is needed. Start it with another python3." % sys.version_info[:2])
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format(name=sys.argv[0]), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    archive = os.path.join(here, RUNTIME)
    try:
        with open(os.path.join(here, "manifest.json"), "rb") as stream:
            expected = json.load(stream)["files"][RUNTIME]["sha256"]
        with open(archive, "rb") as stream:
            found = hashlib.sha256(stream.read()).hexdigest()
    except (OSError, ValueError, KeyError, TypeError) as error:
        return refuse("%s: cannot be read: %s. Copy the bundle again." % (here, error))
    if found != expected:
        return refuse("%s: is damaged: its SHA-256 is not the manifest's. Copy the bundle again or rebuild it." % archive)
    sys.path[:1] = [archive, here]  # here: where the tokenizer library is
    os.environ["QUERN_TVM_LIBS"] = here
    from runtime.__main__ import main as run

    first, rest = arguments[0], arguments[1:]
    if first in ("--chat", "--info"):
        return run([first[2:], here] + rest)
    return run(["generate", here, "--prompt=" + first] + rest)


def refuse(what):
    """One message, as the runtime has it."""
    print("error: " + what, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
