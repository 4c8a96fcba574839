"""Which of several schedule files gets a request."""

from __future__ import annotations

import pkgutil
import sys
from types import ModuleType

import pytest
from tvm import tirx

import schedules
import targets
from schedules.kernel import Kernel, NotSuited, Request, Unsupported, lowerings

EMPTY = tirx.PrimFunc([], tirx.Evaluate(0))
REQUEST = Request("quern.invented", (), (), {}, targets.load("x86-64"))


def offer(monkeypatch: pytest.MonkeyPatch, **ranks: int | None) -> None:
    """Modules schedules.NAME, each lowering `quern.invented` to a kernel of its name; a name with `idle` passes."""
    found = []
    for name, rank in ranks.items():

        def lower(request: Request, name: str = name) -> Kernel:
            if "idle" in name:
                raise NotSuited
            return Kernel(name, EMPTY)

        module = ModuleType(f"schedules.{name}")
        module.LOWERS = {"quern.invented": lower}  # type: ignore[attr-defined]
        if rank is not None:
            module.RANK = rank  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        found.append(pkgutil.ModuleInfo(None, name, False))  # type: ignore[arg-type]
    monkeypatch.setattr(schedules, "__path__", schedules.__path__)
    monkeypatch.setattr(pkgutil, "iter_modules", lambda path: found)


def test_the_highest_rank_that_is_suited_gets_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, general=None, special=5, idle=9)
    assert lowerings()["quern.invented"](REQUEST).name == "special"


def test_the_general_family_takes_what_no_other_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, idle=9, general=None)
    assert lowerings()["quern.invented"](REQUEST).name == "general"


@pytest.mark.parametrize("ranks", [{"idle": None}, {"idle": 9, "idle_too": None}], ids=["one", "two"])
def test_what_no_family_is_meant_for_is_told(monkeypatch: pytest.MonkeyPatch, ranks: dict[str, int | None]) -> None:
    offer(monkeypatch, **ranks)
    with pytest.raises(Unsupported) as caught:
        lowerings()["quern.invented"](REQUEST)
    assert str(caught.value) == "quern.invented: no kernel is meant for () on x86-64"


def test_two_files_of_equal_rank_are_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, one=None, two=0)
    with pytest.raises(AssertionError, match=r"quern\.invented is lowered by two files of equal RANK"):
        lowerings()
