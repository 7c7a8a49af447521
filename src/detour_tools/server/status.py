# SPDX-License-Identifier: GPL-2.0-or-later
"""What a running server says of itself; text and JSON are written from it; pure."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Counters:
    """What became of the datagrams, since the start.

    The kernel dropped the ``dropped`` ones by our rules, and the ``lost`` ones unread or for want
    of room.
    """

    received: int = 0
    dropped: int = 0
    lost: int = 0
    malformed: int = 0
    overflowed: int = 0
    failed: int = 0
    new: int = 0
    moved: int = 0
    evicted: int = 0
    existing: int = 0
    refused: int = 0
    unsent: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyStatus:
    """The reloadable settings in force; ``rate`` in requests a second, ``idle_timeout`` seconds.

    ``allow_client`` None: those with private addresses.
    """

    relay: str
    allow_client: tuple[str, ...] | None
    allow_remote: tuple[str, ...]
    deny_remote: tuple[str, ...]
    deny_port: tuple[str, ...]
    own_address: tuple[str, ...]
    forbid_port: tuple[str, ...]
    rate: float
    max_per_client: int
    max_mappings: int
    idle_timeout: float
    max_flows_per_client: int
    max_flows: int
    router: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A server's status; ``uptime_s`` in seconds."""

    listen: str
    backend: str
    uptime_s: float
    mappings: int
    clients: int
    requests: dict[str, int]
    refused: dict[str, int]
    refused_flows: int
    expired: int
    failed_commits: int
    repairs: int
    unprinted: int
    policy: PolicyStatus
    warnings: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        """The status for programs, under the names of its fields."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Status":
        """The status that ``as_json`` gave. Raises KeyError, TypeError when it is none."""
        return cls(**{**found, "policy": PolicyStatus(**found["policy"])})

    def rows(self) -> list[tuple[str, str]]:
        """The status for people: names and values."""
        policy = self.policy
        done = [f"{count} {name}" for name, count in self.requests.items() if count]
        refused = [f"{name} {count}" for name, count in sorted(self.refused.items())]
        return [
            ("listening on", f"UDP {self.listen}"),
            ("back end", self.backend),
            ("up for", f"{self.uptime_s:g} s"),
            ("mappings", f"{self.mappings} of {policy.max_mappings} at most; "
                         f"clients: {self.clients}"),
            ("requests", ", ".join(done) or "none yet"),
            ("refused", ", ".join(refused) or "nothing"),
            ("flows refused", str(self.refused_flows)),
            ("expired", str(self.expired)),
            ("lines not printed", str(self.unprinted)),
            ("relayed", "joins of MPTCP connections" if policy.relay == "joins" else "any TCP"),
            ("clients", "private addresses" if policy.allow_client is None
             else ", ".join(policy.allow_client) or "nobody"),
            ("private remotes", ", ".join(policy.allow_remote) or "none"),
            ("denied remotes", ", ".join((*policy.deny_remote, *(
                f"port {port}" for port in policy.deny_port))) or "none"),
            ("own addresses", ", ".join(("this host's", *policy.own_address))),
            ("forbidden ports", ", ".join(policy.forbid_port)
             or "none but those that this host listens on"),
            ("limits", f"{policy.rate:g} requests/s and {policy.max_per_client} mappings "
                       f"a client, idle for {policy.idle_timeout:g} s"),
            ("flows at a time", f"{policy.max_flows_per_client or 'any number'} of a client, "
                                f"{policy.max_flows or 'any number'} in all"),
            ("other packets", "forwarded as without it" if policy.router else "not forwarded"),
            *(("warning", text) for text in self.warnings),
        ]
