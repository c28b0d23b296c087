"""Makes ``benchmarks`` importable, behind all else: what is tested stays the installed package."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
