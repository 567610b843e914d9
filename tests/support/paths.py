"""Paths of the project and its optional data."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CIFAR = ROOT.parent / "shared" / "data" / "cifar10-test.tar.xz"  # real photographs, beside some checkouts
