"""What the whole way from checkpoint to text is tested with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.bundles import Bundles, Sessions
from tests.end_to_end.places import DEMO

Figure = Callable[[str, object], None]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process has one thread count for good, and whatever is run in this one has one; started processes choose."""
    monkeypatch.setenv("TVM_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """Compiles in this process, once for each set of settings."""
    return Bundles(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="session")
def sessions() -> Sessions:
    """Runs bundles of this machine in this process."""
    return Sessions()


@pytest.fixture(scope="session")
def demo(bundles: Bundles) -> Path:
    """The demo model as `build` makes it when nothing else is asked for. Do not change it: copy it."""
    return bundles(DEMO)


@pytest.fixture
def figure(record_property: Callable[[str, object], None], request: pytest.FixtureRequest) -> Figure:
    """figure(name, value): a measured number, for the test report and for `pytest -s`."""

    def note(name: str, value: object) -> None:
        record_property(name, value)
        print(f"\n{request.node.name}: {name} {value:.6g}" if isinstance(value, float) else f"\n{name} {value}", end="")

    return note
