"""The parsers, fuzzed for a moment; `fuzz.py` does it for as long as one likes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).with_name("fuzz.py")


def test_a_moment_of_fuzzing_finds_nothing() -> None:
    command = [sys.executable, str(FUZZ), "--seconds", "10"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-1000:]
