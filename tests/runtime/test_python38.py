"""The runtime is Python 3.8, which JetPack 5 has and JetPack 4 gets by apt. None is at hand: the text is read.

Three readers: CPython's own parser for the grammar, vermin for the standard library, and a walk for what vermin cannot
see: methods by their names, and generics such as tuple[int] where Python 3.8 would evaluate them.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

RUNTIME = sorted((Path(__file__).parents[2] / "runtime").glob("*.py"))
# Of Python 3.9 or later, whatever they are called on.
YOUNG_NAMES = {
    "removeprefix", "removesuffix", "is_relative_to", "with_stem", "readlink", "hardlink_to", "randbytes", "bit_count",
    "cache", "to_thread", "pidfd_open", "add_note",
}  # fmt: skip
YOUNG_KEYWORDS = {"cancel_futures", "strict", "exit_on_error", "process_group", "pipesize", "slots", "kw_only"}
# Not to be subscripted before 3.9: built-in types, and what comes from collections.
BUILT_IN = {"tuple", "list", "dict", "set", "frozenset", "type"}
EVALUATED = {"manifest.py"}  # get_type_hints asks for the annotations of the classes there


def faults(text: str, name: str) -> Iterator[str]:
    """What Python 3.8 would not take, as "line: what"."""
    tree = ast.parse(text, name, feature_version=(3, 8))
    plain = set(BUILT_IN)
    postponed = any(isinstance(n, ast.ImportFrom) and n.module == "__future__" for n in tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("collections"):
            plain |= {alias.asname or alias.name for alias in node.names}
    for node in _evaluated(tree, not postponed, name in EVALUATED):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in plain:
            yield f"{node.lineno}: {node.value.id}[...]"
        elif isinstance(node, ast.Attribute) and node.attr in YOUNG_NAMES:
            yield f"{node.lineno}: .{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg in YOUNG_KEYWORDS:
            yield f"{node.value.lineno}: {node.arg}="
        elif isinstance(node, ast.AugAssign) and isinstance(node.op, ast.BitOr) and isinstance(node.value, ast.Dict):
            yield f"{node.lineno}: |= of a dict"


def _evaluated(tree: ast.AST, all_hints: bool, class_hints: bool, in_class: bool = False) -> Iterator[ast.AST]:
    """All nodes that run: of annotations all, or those of classes where somebody asks for them, or none."""
    for field, value in ast.iter_fields(tree):
        asked = all_hints or (class_hints and in_class and isinstance(tree, ast.AnnAssign))
        if field in ("annotation", "returns") and not asked:
            continue
        for node in value if isinstance(value, list) else [value]:
            if isinstance(node, ast.AST):
                yield node
                yield from _evaluated(node, all_hints, class_hints, isinstance(tree, ast.ClassDef))


@pytest.mark.parametrize("path", RUNTIME, ids=lambda path: path.name)
def test_a_module_is_python_3_8(path: Path) -> None:
    assert list(faults(path.read_text(encoding="utf-8"), path.name)) == []


def test_vermin_finds_nothing_younger() -> None:
    command = [str(Path(sys.executable).with_name("vermin")), "-t=3.8-", "--no-tips", "--violations", "--quiet"]
    done = subprocess.run([*command, *map(str, RUNTIME)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_start_is_python_3_6() -> None:
    """It has to say what is missing: no postponed annotations, which 3.6 lacks."""
    (path,) = (path for path in RUNTIME if path.name == "run.py")
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text, feature_version=(3, 6))
    assert not [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    assert list(faults(text, "run.py")) == []
    command = [str(Path(sys.executable).with_name("vermin")), "-t=3.6-", "--no-tips", "--eval-annotations", "--quiet"]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("x = 'ab'.removeprefix('a')", "2: .removeprefix"),
        ("pool.shutdown(cancel_futures=True)", "2: cancel_futures="),
        ("X = Callable[[int], None]", "2: Callable[...]"),
        ("x = tuple[int, ...]", "2: tuple[...]"),
        ("x |= {1: 2}", "2: |= of a dict"),
        ("class A:\n    x: Optional[tuple[int]]", "3: tuple[...]"),
    ],
)
def test_a_planted_fault_is_found(line: str, said: str) -> None:
    header = "from __future__ import annotations; from collections.abc import Callable\n"
    assert list(faults(header + line, "manifest.py")) == [said]


def test_annotations_that_nobody_evaluates_are_free() -> None:
    text = "from __future__ import annotations\ndef f(x: list[int]) -> tuple[int]:\n    y: dict[str, int] = {}\n"
    assert list(faults(text, "manifest.py")) == list(faults(text, "other.py")) == []
    assert list(faults("from __future__ import annotations\nclass A:\n    x: list[int]\n", "other.py")) == []
