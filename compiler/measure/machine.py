"""What a record says about where and with what it was measured."""

from __future__ import annotations

import os
import re
import subprocess
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

REPO = Path(__file__).parents[2]


def describe() -> dict[str, object]:
    """Processor as it names itself, CPUs, TVM, quern's commit (None outside a checkout), and the time in UTC."""
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return {
        "cpu": found[1] if found else None,
        "cpus": os.cpu_count(),
        "tvm": version("apache-tvm"),
        "commit": _commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    command = ["git", "-C", str(REPO), "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
