"""The toy bundle, built once, and copies of it to damage."""
from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from runtime.bundle import open_bundle
from runtime.session import Session
from tests.runtime import tiny


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more, the runtime would pin the test process to a CPU."""
    monkeypatch.setenv("TVM_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound bundle. Do not change it: `bundle` is a copy."""
    folder = tmp_path_factory.mktemp("toy") / "bundle"
    tiny.build(folder)
    return folder


@pytest.fixture
def bundle(toy: Path, tmp_path: Path) -> Path:
    """A copy of the toy bundle."""
    return Path(shutil.copytree(toy, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def shared_session(toy: Path) -> Session:
    """One session for all: one thread, so that the test process is not pinned to a CPU."""
    return Session(open_bundle(toy), threads=1)


@pytest.fixture
def session(shared_session: Session) -> Session:
    """The shared session, at the beginning."""
    shared_session.reset()
    return shared_session
