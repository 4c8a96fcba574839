"""Copy a bundle to a device over SSH and make it the current one there."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

from runtime.arguments import port

remote_port = partial(port, least=1)  # to connect to


def connection_arguments(parser: argparse._ActionsContainer) -> None:
    """Options of every verb that connects to a device."""
    parser.add_argument(
        "--port", type=remote_port, metavar="N", help="of the SSH server (default: ~/.ssh/config, or 22)"
    )
    parser.add_argument("--identity", type=Path, metavar="FILE", help="private key (default: agent and ~/.ssh)")


def require_asyncssh(verb: str) -> None:
    """Raise UserError where the package for SSH is missing."""
    from compiler.errors import UserError

    try:
        import asyncssh  # noqa: F401
    except ImportError:
        raise UserError(f"{verb} needs the package asyncssh. Install it: pip install 'quern[deploy]'.") from None


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument(
        "bundle", type=Path, nargs="?", metavar="BUNDLE", help="what `build` wrote; not with --rollback"
    )
    parser.add_argument(
        "place",
        metavar="[USER@]HOST[:DIR]",
        help="the device, and a folder for versions of this bundle (default: quern)",
    )
    connection_arguments(parser)
    parser.add_argument("--rollback", action="store_true", help="go back to the version before, which is kept")
    parser.add_argument("--run", dest="prompt", metavar="PROMPT", help="afterwards, let it continue a prompt there")
    parser.add_argument("--json", action="store_true", help="print one JSON object about the deployment to stdout")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def run(options: argparse.Namespace) -> int:
    """Deploy, roll back, run; gives the exit code of what ran there."""
    from compiler.errors import UserError

    if (options.bundle is None) != options.rollback:
        wanted = "--rollback takes no BUNDLE, only the device" if options.rollback else "BUNDLE is missing"
        raise UserError(f"{wanted}. Write `deploy BUNDLE user@host:folder` or `deploy --rollback user@host:folder`.")
    require_asyncssh("deploy")
    return asyncio.run(_deploy(options))


async def _deploy(options: argparse.Namespace) -> int:
    from compiler.deploy import connection, running, versions
    from compiler.progress import Reporter

    started = time.perf_counter()
    report = Reporter(quiet=options.quiet or options.json)
    place = connection.parse_place(options.place)
    bundle = None if options.rollback else versions.read(options.bundle, report)
    async with connection.connect(place, options.port, options.identity) as remote:
        if bundle is None:
            done = await versions.rollback(remote, report)
        else:
            done = await versions.deploy(remote, bundle, report)
        if options.json:
            seconds = round(time.perf_counter() - started, 3)
            print(
                json.dumps({"device": str(place), "folder": place.folder, **asdict(done), "seconds": seconds}),
                flush=True,
            )
        kept = f"; {done.previous[:12]} is kept for --rollback" if done.previous else ""
        report.line(f"{place}: {place.folder}/current is {done.version[:12]}{kept}")
        return await running.generate(remote, options.prompt) if options.prompt is not None else 0
