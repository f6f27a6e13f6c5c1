"""Networks that start small and get layers and channels while they train."""

from __future__ import annotations
