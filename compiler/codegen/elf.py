"""What a linked shared library asks of the machine that loads it: read from its ELF headers, without any tool.

Format: System V ABI, chapter 4 and 5; symbol versions: Linux Standard Base, "Symbol Versioning".
"""
from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MACHINES = {62: "x86_64", 183: "aarch64", 243: "riscv64"}  # e_machine
SHT_SYMTAB, SHT_DYNAMIC, SHT_NOBITS, SHT_DYNSYM, SHT_GNU_VERNEED, SHT_GNU_VERSYM = 2, 6, 8, 11, 0x6FFFFFFE, 0x6FFFFFFF
DT_NEEDED, STT_FUNC, SHF_EXECINSTR, PT_GNU_EH_FRAME = 1, 2, 4, 0x6474E550
EH_FRAME_HDR = bytes((1, 0x1B, 0x03, 0x3B))  # version; then 4-byte numbers: relative, absolute, relative to the section
VERSYM_MASK = 0x7FFF  # bit 15 marks a hidden version; 0 local, 1 global without a version


class ElfError(ValueError):
    """The file is not a little-endian 64-bit ELF file with section headers."""


@dataclass(frozen=True)
class SharedLibrary:
    """Needs of one library: `versions` like "GLIBC_2.27", `unversioned` symbols that someone else must bring."""

    arch: str
    needed: tuple[str, ...]
    versions: tuple[str, ...]
    unversioned: tuple[str, ...]


@dataclass(frozen=True)
class _Section:
    kind: int
    link: int
    data: bytes


def read(path: Path) -> SharedLibrary:
    """Headers of the library at `path`. Raises ElfError when it is something else."""
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01" or len(data) < 64:
        raise ElfError(f"{path}: not a little-endian 64-bit ELF file.")
    machine: int = struct.unpack_from("<H", data, 18)[0]
    try:
        sections = _sections(data)
        dynamic = _only(sections, SHT_DYNAMIC)
        strings = sections[dynamic.link].data
        entries = struct.iter_unpack("<qQ", dynamic.data)
        needed = [_text(strings, value) for tag, value in entries if tag == DT_NEEDED]
        versions = _versions(sections)
        unversioned = list(_unversioned(sections))
    except (struct.error, IndexError, ValueError) as error:
        raise ElfError(f"{path}: damaged, or without section headers: {error}.") from error
    arch = MACHINES.get(machine, f"machine {machine}")
    return SharedLibrary(arch, tuple(sorted(needed)), tuple(sorted(versions)), tuple(sorted(unversioned)))


def functions(path: Path) -> list[tuple[int, str]]:
    """(address, name) of every symbol for code in a file that was not stripped, ascending."""
    sections = _sections(path.read_bytes())
    table = _only(sections, SHT_SYMTAB)
    strings = sections[table.link].data
    symbols = struct.iter_unpack("<IBBHQQ", table.data)
    return sorted((address, _text(strings, name)) for name, info, _, _, address, _ in symbols if info & 15 == STT_FUNC)


def function_starts(path: Path) -> list[int]:
    """Addresses of all functions, exported or not, ascending, out of the table for unwinding, which stripping leaves.

    Linux Standard Base Core, "The .eh_frame_hdr section", with the encodings that every linker writes.
    """
    data = path.read_bytes()
    table, entry_bytes, count = struct.unpack_from("<Q14xHH", data, 32)
    for i in range(count):
        kind, start, address = struct.unpack_from("<I4xQQ", data, table + i * entry_bytes)
        if kind == PT_GNU_EH_FRAME and data[start : start + 4] == EH_FRAME_HDR:
            number: int = struct.unpack_from("<I", data, start + 8)[0]
            offsets = struct.iter_unpack("<ii", data[start + 12 : start + 12 + 8 * number])
            return sorted(address + offset for offset, _ in offsets)
    raise ElfError(f"{path}: has no table of its functions (.eh_frame_hdr).")


def code(path: Path) -> list[tuple[int, bytes]]:
    """(address, bytes) of every section with code, as a machine would load it."""
    data = path.read_bytes()
    table, entry_bytes, count = struct.unpack_from("<Q10xHH", data, 40)
    headers = (struct.unpack_from("<4xIQQQQ", data, table + i * entry_bytes) for i in range(count))
    return [
        (address, data[start : start + size])
        for kind, flags, address, start, size in headers
        if flags & SHF_EXECINSTR and kind != SHT_NOBITS
    ]


def named_code(data: bytes) -> dict[str, bytes]:
    """Sections with code of a file's bytes, by name: ".text.NAME" for each function of NVIDIA's machine code."""
    table, entry_bytes, count, names = struct.unpack_from("<Q10xHHH", data, 40)
    headers = [struct.unpack_from("<IIQ8xQQ", data, table + i * entry_bytes) for i in range(count)]
    strings = data[headers[names][3] :]
    return {
        _text(strings, name): data[start : start + size]
        for name, kind, flags, start, size in headers
        if flags & SHF_EXECINSTR and kind != SHT_NOBITS
    }


def _sections(data: bytes) -> list[_Section]:
    table, entry_bytes, count = struct.unpack_from("<Q10xHH", data, 40)
    sections = []
    for i in range(count):
        _, kind, start, size, link = struct.unpack_from("<II16xQQI20x", data, table + i * entry_bytes)
        if kind != SHT_NOBITS and start + size > len(data):
            raise ValueError(f"section {i} ends at byte {start + size} of {len(data)}")
        sections.append(_Section(kind, link, data[start : start + size]))
    return sections


def _only(sections: list[_Section], kind: int) -> _Section:
    found = [section for section in sections if section.kind == kind]
    if len(found) != 1:
        raise ValueError(f"{len(found)} sections of type {kind:#x}, not one")
    return found[0]


def _text(strings: bytes, start: int) -> str:
    return strings[start : strings.index(b"\0", start)].decode()


def _versions(sections: list[_Section]) -> set[str]:
    """Every version that some library must offer; an ELF file without such needs has no section for them."""
    found: set[str] = set()
    for section in sections:
        if section.kind == SHT_GNU_VERNEED:
            found.update(_text(sections[section.link].data, name) for name in _verneed_names(section.data))
    return found


def _verneed_names(data: bytes) -> Iterator[int]:
    library = 0
    while True:
        count, _, aux, next_library = struct.unpack_from("<2xHIII", data, library)
        need = library + aux
        for _ in range(count):
            name, next_need = struct.unpack_from("<8xII", data, need)
            yield name
            need += next_need
        if not next_library:
            return
        library += next_library


def _unversioned(sections: list[_Section]) -> Iterator[str]:
    """Undefined symbols with no version: not from glibc, so the program that loads the library must have them."""
    table = _only(sections, SHT_DYNSYM)
    symbols = list(struct.iter_unpack("<IBBHQQ", table.data))
    versions = [s.data for s in sections if s.kind == SHT_GNU_VERSYM]
    indices = [v & VERSYM_MASK for (v,) in struct.iter_unpack("<H", versions[0])] if versions else [1] * len(symbols)
    for (name, _, _, section, _, _), version in zip(symbols, indices, strict=True):
        if name and section == 0 and version <= 1:
            yield _text(sections[table.link].data, name)
