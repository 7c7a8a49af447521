# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads the trace of our kernel path manager (the ``pr_debug`` lines of net/mptcp/pm_detour.c).

The worker's own lines come in a fixed order. That of the daemon's answer is another thread's and
comes when it comes: after the worker's first run as a rule, on a busy machine within that run or
before it. Then that run makes the subflow, and there may be no second one.
"""

import itertools
import re
from collections.abc import Sequence

from detour_tools.endpoint import Endpoint, IPAddress


def look(log: Sequence[str], remote: Endpoint, detour: IPAddress) -> list[tuple[str, str | None]]:
    """Every line that is wanted of a connection to ``remote``, as a pattern, and the line found.

    These are: a run of the worker that asks for a detour; the daemon's answer; a run that uses it,
    after the answer. What is not in the log, or not where it belongs, is None.
    """
    worker = r"detour create_subflow_worker\(\) "
    matching = f"Finding matching detour for {re.escape(str(remote))}$"
    checking = rf"Checking detour={re.escape(str(detour))}:\d+ remote={re.escape(str(remote))}$"
    runs = _runs(log, worker + "begins")
    asked = _best(runs, [worker + "begins", r"request_detour\(\)", matching, worker + "ends"])
    used = _best(runs, [worker + "begins", matching, checking, "yes$", worker + "ends"])
    uses = next((number for number, line in enumerate(log) if line == used[2][1]), len(log))
    return asked + _follow(log[:uses], ["Adding a detour to the entry list"]) + used


def _runs(log: Sequence[str], begins: str) -> list[Sequence[str]]:
    """The log from each start of the worker to the next."""
    starts = [number for number, line in enumerate(log) if re.search(begins, line)]
    return [log[start:end] for start, end in itertools.pairwise([*starts, len(log)])]


def _best(runs: Sequence[Sequence[str]], patterns: Sequence[str]) -> list[tuple[str, str | None]]:
    """What the run has that has most of it."""
    return max((_follow(run, patterns) for run in [*runs, []]),
               key=lambda found: sum(line is not None for _, line in found))


def _follow(log: Sequence[str], patterns: Sequence[str]) -> list[tuple[str, str | None]]:
    """The first line for each pattern that comes after those of the patterns before it."""
    found: list[tuple[str, str | None]] = []
    position = 0
    for pattern in patterns:
        number = next((number for number in range(position, len(log))
                       if re.search(pattern, log[number])), None)
        found.append((pattern, None if number is None else log[number]))
        position = position if number is None else number + 1
    return found
