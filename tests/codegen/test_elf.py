"""The ELF reader on files of known content, and on damage."""
from __future__ import annotations

import struct
from pathlib import Path

import pytest

from compiler.codegen import elf


def by_hand(machine: int = 183, version: bytes = b"GLIBC_2.27\0") -> bytes:
    """A library of five sections: two undefined symbols (one with a version), one library, one needed version.

    Built from the tables of the System V ABI, not by our reader's formats.
    """
    strings = b"\0libm.so.6\0expf\0TVMFFIx\0own\0" + version
    at = {name: strings.index(name) for name in (b"libm.so.6", b"expf", b"TVMFFIx", b"own", version)}
    dynamic = struct.pack("<QQQQ", 1, at[b"libm.so.6"], 0, 0)  # DT_NEEDED, DT_NULL
    symbols = bytes(24)  # index 0 is reserved
    for name, section in ((b"expf", 0), (b"TVMFFIx", 0), (b"own", 7)):
        symbols += struct.pack("<IBBHQQ", at[name], 0x10, 0, section, 0, 0)
    versym = struct.pack("<HHHH", 0, 2, 1, 1)
    verneed = struct.pack("<HHIII", 1, 1, at[b"libm.so.6"], 16, 0) + struct.pack("<IHHII", 0, 0, 2, at[version], 0)
    body, table = b"", b""
    for kind, link, data in ((0, 0, b""), (3, 0, strings), (6, 1, dynamic), (11, 1, symbols), (0x6FFFFFFF, 3, versym),
                             (0x6FFFFFFE, 1, verneed)):
        table += struct.pack("<IIQQQQIIQQ", 0, kind, 0, 0, 64 + len(body), len(data), link, 0, 1, 0)
        body += data
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = ident + struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, 0, 64 + len(body), 0, 64, 0, 0, 64, 6, 1)
    return header + body + table


def test_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "hand.so"
    path.write_bytes(by_hand())
    assert elf.read(path) == elf.SharedLibrary("aarch64", ("libm.so.6",), ("GLIBC_2.27",), ("TVMFFIx",))


def test_a_machine_without_a_name(tmp_path: Path) -> None:
    path = tmp_path / "mips.so"
    path.write_bytes(by_hand(machine=8))
    assert elf.read(path).arch == "machine 8"


@pytest.mark.parametrize("data", [b"", b"#!/bin/sh\n", b"\x7fELF\x01\x01\x01" + bytes(99), b"\x7fELF\x02\x01"])
def test_something_else(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.so"
    path.write_bytes(data)
    with pytest.raises(elf.ElfError) as caught:
        elf.read(path)
    assert str(caught.value) == f"{path}: not a little-endian 64-bit ELF file."


def test_cut_short_anywhere_is_an_error(tmp_path: Path) -> None:
    whole, path = by_hand(), tmp_path / "cut.so"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(elf.ElfError):
            elf.read(path)
