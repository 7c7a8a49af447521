# SPDX-License-Identifier: GPL-2.0-or-later
"""What a benchmark finds: figures, each beside its baseline and its target."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number.

    ``ratio`` is to the baseline, as ``target`` speaks of it; ``met`` is None without a target.
    ``details`` go to the JSON only.
    """

    bench: str
    name: str
    value: float
    unit: str
    baseline: float | None = None
    baseline_name: str = ""
    ratio: float | None = None
    target: str = ""
    met: bool | None = None
    details: dict[str, Any] = field(default_factory=dict)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and the middle half: how noisy a figure is."""
    return {"median": statistics.median(values), "p25": quantile(values, 0.25),
            "p75": quantile(values, 0.75), "least": min(values), "most": max(values),
            "count": len(values)}
