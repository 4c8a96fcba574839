"""Versions of a bundle in a folder on a device: copy what is missing, check every digest there, switch in one rename.

FOLDER/incoming/VERSION/   what has come so far; a later run goes on from there
FOLDER/versions/VERSION/   whole bundles; VERSION is the SHA-256 of manifest.json, which holds every other digest
FOLDER/current, previous   links to versions/VERSION; `current` always points to a whole bundle
FOLDER/lock                held by whoever changes any of these
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import asyncssh

from compiler.deploy import machine
from compiler.deploy.connection import LOST, DeployError, Remote
from compiler.progress import Reporter, Stage
from runtime import manifest
from runtime.bundle import read_manifest
from runtime.errors import UserError as RuntimeUserError
from runtime.manifest import FileDigest, Manifest

PIECE_BYTES = 256 << 10
# sum: SHA-256 of stdin. mark: like ln -sfn, but there is no moment without the link.
_TOOLS = """
sum() { if command -v sha256sum >/dev/null; then sha256sum; else python3 -c '
import hashlib, sys
h = hashlib.sha256()
for b in iter(lambda: sys.stdin.buffer.read(1 << 20), b""): h.update(b)
print(h.hexdigest())'; fi; }
mark() { ln -sfn "$2" ".$1.new" && mv -fT ".$1.new" "$1"; }
"""
_SIZES = 'cd "$1/$2" 2>/dev/null || exit 0; echo found; for f in *; do [ -f "$f" ] && echo "$(wc -c <"$f") $f"; done; :'
_LINKS = 'cd "$1" 2>/dev/null || exit 0; for l in current previous; do echo "$(readlink "$l")"; done'
_APPEND = 'mkdir -p "$1/$2" && cd "$1/$2" || exit 1; if [ "$4" = 0 ]; then : >"$3"; fi; exec cat >>"$3"'
_PREFIX = _TOOLS + 'head -c "$2" "$1" | sum'
_DIGESTS = (
    _TOOLS
    + """
wc -c <"$1" || exit 1
if [ "$2" = 0 ]; then sum <"$1"; exit; fi
i=0; while [ "$i" -lt "$3" ]; do dd if="$1" bs="$2" skip="$i" count=1 2>/dev/null | sum; i=$((i + 1)); done
"""
)
# Held as long as this runs: until its stdin ends, which it does with the connection, however that ends.
_LOCK = """
cd "$1" || exit 1
if command -v flock >/dev/null; then
  exec 9>lock || exit 1
  flock -n 9 || { echo busy; exit 0; }
elif ! (set -C; echo $$ >lock.pid) 2>/dev/null; then
  if kill -0 "$(cat lock.pid)" 2>/dev/null; then echo busy; exit 0; fi
  echo $$ >lock.pid || exit 1
fi
[ ! -f lock.pid ] || trap 'rm -f lock.pid' EXIT
echo held; cat
"""
_INSTALL = """
cd "$1" && sync || exit 1
if [ -d "versions/$2" ]; then
  for f in "incoming/$2"/*; do [ ! -f "$f" ] || mv -f "$f" "versions/$2/" || exit 1; done
else mkdir -p versions && mv -T "incoming/$2" "versions/$2" || exit 1; fi
[ ! -f "versions/$2/run" ] || chmod 755 "versions/$2/run"
"""
_SWITCH = (
    _TOOLS
    + """
cd "$1" || exit 1
old=$(readlink current)
[ "$old" != "versions/$2" ] || exit 0
[ -z "$old" ] || mark previous "$old" || exit 1
mark current "versions/$2" && sync
"""
)
_PRUNE = """
cd "$1" || exit 1
for d in versions/* incoming/*; do
  name=${d##*/}
  [ "${#name}" = 64 ] && [ "$d" != "$(readlink current)" ] && [ "$d" != "$(readlink previous)" ] && rm -rf "$d"
done
:
"""
_ROLLBACK = _TOOLS + 'cd "$1" && mark current "$3" && mark previous "$2" && sync'


@dataclass(frozen=True)
class Deployed:
    """What a run did. kept_bytes: were there already, from an interrupted run or in a version that was whole."""

    version: str
    previous: str | None
    copied_bytes: int
    kept_bytes: int
    repaired: tuple[str, ...]


@dataclass(frozen=True)
class Local:
    """A bundle on this machine, checked. files: manifest.json last."""

    folder: Path
    manifest: Manifest
    version: str
    files: dict[str, FileDigest]


def read(folder: Path, report: Reporter) -> Local:
    """Open a bundle and check all its digests, so that no damage is carried on."""
    found = read_manifest(folder)
    with report.stage("Check") as stage:
        stage.bytes = sum(digest.bytes for digest in found.files.values())
        stage.total(stage.bytes)
        for name, digest in found.files.items():
            try:
                whole = manifest.digest_file(folder / name, digest.chunk_bytes) == digest
            except FileNotFoundError:
                whole = False
            if not whole:
                raise DeployError(f"{folder / name}: is not what the manifest says. Build the bundle again.")
            stage.advance(digest.bytes)
        stage.note = "the bundle here is whole"
    own = manifest.digest_file(folder / manifest.FILE_NAME)
    return Local(folder, found, own.sha256, {**found.files, manifest.FILE_NAME: own})


async def deploy(remote: Remote, bundle: Local, report: Reporter) -> Deployed:
    """Make the bundle the current one there. Refuses before it copies; leaves `current` alone until all is checked."""
    folder, version, files = remote.folder, bundle.version, bundle.files
    incoming, place = f"incoming/{version}", f"versions/{version}"
    described = await machine.look(remote, folder)
    there, partial = await _sizes(remote, place), await _sizes(remote, incoming)
    missing = sum(max(0, d.bytes - (partial or {}).get(name, 0)) for name, d in files.items())
    machine.require(described, bundle.manifest, missing if there is None else 0, remote.name, folder)
    await remote.output('mkdir -p "$1"', folder)
    async with _alone(remote):
        return await _deploy(remote, bundle, report)


async def _deploy(remote: Remote, bundle: Local, report: Reporter) -> Deployed:
    """The same for a device where the bundle fits, with the lock held."""
    folder, version, files = remote.folder, bundle.version, bundle.files
    incoming, place = f"incoming/{version}", f"versions/{version}"
    there, partial = await _sizes(remote, place), await _sizes(remote, incoming)
    wanted = dict(files)
    if there is not None:  # deployed before: only what was damaged since comes again
        wanted = await _damaged(remote, place, files, report)
    sent = await _copy(remote, bundle, wanted, partial or {}, report)
    if wanted:
        for name in await _damaged(remote, incoming, wanted, report):
            await remote.output('rm -f "$1"', f"{folder}/{incoming}/{name}")
            raise DeployError(
                f"{remote.name}: {name} was damaged on its way or by the device's disk, and nothing was switched. Run "
                f"the same command again: only {name} is copied anew. If that repeats, replace the card or disk."
            )
        await remote.output(_INSTALL, folder, version)
    await remote.output(_SWITCH, folder, version)
    await remote.output(_PRUNE, folder)
    _, previous = await _links(remote)
    total = sum(digest.bytes for digest in files.values())
    return Deployed(version, previous, sent, total - sent, () if there is None else tuple(wanted))


async def rollback(remote: Remote, report: Reporter) -> Deployed:
    """Exchange `current` and `previous`, after the digests of the previous version were checked there."""
    if None in await _links(remote):
        raise _nothing_before(remote)
    async with _alone(remote):
        return await _rollback(remote, report)


def _nothing_before(remote: Remote) -> DeployError:
    return DeployError(
        f"{remote.name}: {remote.folder} keeps no previous version, so there is nothing to go back to."
    )


async def _rollback(remote: Remote, report: Reporter) -> Deployed:
    """The same with the lock held."""
    folder = remote.folder
    current, previous = await _links(remote)
    if current is None or previous is None or current == previous:
        raise _nothing_before(remote)
    place = f"versions/{previous}"
    text = await remote.output('cat "$1"', f"{folder}/{place}/{manifest.FILE_NAME}")
    try:
        files = manifest.loads(text, f"{remote.name}: {place}/{manifest.FILE_NAME}").files
    except RuntimeUserError as error:
        raise DeployError(str(error)) from None
    if damaged := await _damaged(remote, place, files, report):
        raise DeployError(
            f"{remote.name}: {min(damaged)} of the previous version is damaged, so the current one stays. Deploy the "
            f"bundle that you want again."
        )
    await remote.output(_ROLLBACK, folder, f"versions/{current}", f"versions/{previous}")
    return Deployed(previous, current, 0, sum(digest.bytes for digest in files.values()), ())


@asynccontextmanager
async def _alone(remote: Remote) -> AsyncIterator[None]:
    """Nobody else changes the folder meanwhile. Raises DeployError when somebody does."""
    async with remote.process(_LOCK, remote.folder) as process:
        said = bytes(await process.stdout.readline()).strip()
        if said == b"busy":
            raise DeployError(
                f"{remote.name}: somebody else is deploying to {remote.folder} at this moment. Run the same command "
                f"again when that has ended; if its connection broke, the device notices within minutes."
            )
        if said != b"held":
            _, err = await process.communicate()
            remote.check(process, err)
        try:
            yield
        finally:
            with suppress(*LOST):
                process.stdin.write_eof()
                await process.wait()


async def _copy(
    remote: Remote, bundle: Local, wanted: dict[str, FileDigest], partial: dict[str, int], report: Reporter
) -> int:
    """Send what `partial` lacks of the wanted files; gives the bytes sent."""
    sent = 0
    with report.stage("Copy") as stage:
        stage.total(sum(digest.bytes for digest in wanted.values()))
        for name in wanted:
            sent += await _copy_file(remote, bundle, name, partial.get(name, 0), stage)
        stage.bytes = sent
        kept = sum(digest.bytes for digest in wanted.values()) - sent
        stage.note = f"{kept / machine.MIB:.1f} MiB were there from before" if kept else ""
        if not wanted:
            stage.note = "nothing to copy: this version is there, whole"
    return sent


async def _copy_file(remote: Remote, bundle: Local, name: str, have: int, stage: Stage) -> int:
    """Append what is missing to a file in incoming/, or start afresh when what is there is not its beginning."""
    incoming, folder = f"incoming/{bundle.version}", remote.folder
    size = bundle.files[name].bytes
    with (bundle.folder / name).open("rb") as stream:
        start = have if 0 < have <= size else 0
        if start:
            beginning = hashlib.sha256()
            while stream.tell() < start:
                beginning.update(stream.read(min(PIECE_BYTES, start - stream.tell())))
            there = await remote.output(_PREFIX, f"{folder}/{incoming}/{name}", str(start))
            start = start if there.split()[0] == beginning.hexdigest() else 0
        stage.advance(start)
        if start == size and have == size:
            return 0
        stream.seek(start)
        async with remote.process(_APPEND, folder, incoming, name, str(start)) as process:
            try:
                while piece := stream.read(PIECE_BYTES):
                    process.stdin.write(piece)
                    await process.stdin.drain()
                    stage.advance(len(piece))
                process.stdin.write_eof()
            except BrokenPipeError:
                pass  # it ended before us: its exit code says why
            _, err = await process.communicate()
            remote.check(process, err)
    return size - start


async def _damaged(remote: Remote, place: str, files: dict[str, FileDigest], report: Reporter) -> dict[str, FileDigest]:
    """Those of the files that are not, there, what their digests say. Reads all of them on the device."""
    bad = {}
    with report.stage("Verify") as stage:
        stage.bytes = sum(digest.bytes for digest in files.values())
        stage.total(stage.bytes)
        for name, digest in files.items():
            if not await _intact(remote, f"{place}/{name}", digest, stage):
                bad[name] = digest  # noqa: PERF403
        stage.note = f"damaged on the device: {', '.join(bad)}" if bad else "every digest is right on the device"
    return bad


async def _intact(remote: Remote, path: str, digest: FileDigest, stage: Stage) -> bool:
    """Whether size and SHA-256, or those of all chunks, are right there."""
    expected = digest.pieces
    lines: list[str] = []
    arguments = (f"{remote.folder}/{path}", str(digest.chunk_bytes or 0), str(len(expected)))
    async with remote.process(_DIGESTS, *arguments, stdin=asyncssh.DEVNULL) as process:
        async for line in process.stdout:
            lines.append(bytes(line).decode(errors="replace"))
            stage.advance(digest.bytes / len(expected) if len(lines) > 1 else 0)
        await process.wait()
    if process.exit_status is None:
        raise remote.lost(None)
    words = [line.split()[0] for line in lines if line.split()]
    return words == [str(digest.bytes), *expected]


async def _sizes(remote: Remote, place: str) -> dict[str, int] | None:
    """Name -> bytes of the files in a folder there, None where there is no such folder."""
    found, *lines = (await remote.output(_SIZES, remote.folder, place)).splitlines() or [""]
    if found != "found":
        return None
    sizes = (line.split(maxsplit=1) for line in lines)
    return {name: int(size) for size, name in sizes}


async def _links(remote: Remote) -> tuple[str | None, str | None]:
    """The versions that `current` and `previous` point to."""
    lines = (await remote.output(_LINKS, remote.folder)).splitlines()
    names = [line.removeprefix("versions/") or None for line in lines]
    return (names[0], names[1]) if len(names) == 2 else (None, None)
