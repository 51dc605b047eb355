"""Peak memory of one step, for scripts that run it in a process of its own (Linux)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_above(step: Callable[[], Any]) -> float:
    """GiB of resident memory that ``step`` takes at its peak, above what there was before."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak reached so far
    before = _resident("VmRSS")
    step()
    return (_resident("VmHWM") - before) / 2**20


def _resident(field: str) -> int:
    """Resident memory now (VmRSS) or at its peak (VmHWM), KiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])
