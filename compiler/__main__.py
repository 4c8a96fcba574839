"""python -m compiler VERB: a verb is a file in compiler/cli/, imported only when it is asked for."""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import pkgutil
import sys
from pathlib import Path

from runtime.arguments import Parser, clean_up_on_sigterm, discard_output, refuse, settle_streams

CLI = Path(__file__).parent / "cli"
INTERRUPTED = 130


def verbs() -> dict[str, str]:
    """Every verb with the first line of its file's docstring, read without importing it."""
    found = {}
    for info in pkgutil.iter_modules([str(CLI)]):
        text = ast.get_docstring(ast.parse((CLI / f"{info.name}.py").read_text(encoding="utf-8"))) or ""
        found[info.name] = text.partition("\n")[0]
    return found


def main(argv: list[str] | None = None) -> int:
    """Run one verb. 0 = done, 2 = the user's mistake, 130 = interrupted (143: terminated)."""
    try:
        from compiler.errors import UserError
        from runtime.errors import UNWRITABLE
        from runtime.errors import UserError as RuntimeUserError
        from targets import TargetError

        settle_streams()
        options = _options(sys.argv[1:] if argv is None else argv)
        code = int(options.run(options))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (UserError, RuntimeUserError, TargetError) as error:
        return refuse(str(error))
    except OSError as error:
        if error.filename is not None:
            return refuse(f"{os.fsdecode(error.filename)}: {error.strerror}.")
        if error.errno not in UNWRITABLE:
            raise
        if isinstance(error, BrokenPipeError):
            discard_output()
            return 0
        return refuse(f"cannot write: {error.strerror}. Make room where the output goes.")


def _options(arguments: list[str]) -> argparse.Namespace:
    """Parsed, with the verb's `run`. A verb's file is imported when it is asked for."""
    parser = Parser(prog="python -m compiler", description="quern: quantised checkpoints to device bundles.")
    commands = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    asked = next((a for a in arguments if not a.startswith("-")), None)
    for name, summary in verbs().items():
        sub = commands.add_parser(name, help=summary, description=summary)
        if name == asked:
            module = importlib.import_module(f"compiler.cli.{name}")
            module.arguments(sub)
            sub.set_defaults(run=module.run, verb_parser=sub)
    options: argparse.Namespace = parser.parse_args(arguments)
    return options


if __name__ == "__main__":
    clean_up_on_sigterm()
    sys.exit(main())
