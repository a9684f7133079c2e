"""Which process of an endpoint plays which role: by what Ray calls it, and a group's ranks by their sockets. Linux only.

Imports the standard library and `shared.processes`.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.shared.processes import ENGINE, INGRESS, SCHEDULER, WORKER, descendants

ESTABLISHED, LISTENING = "01", "0A"
PROGRAMS = ("haproxy", "gcs_server", "raylet")
TITLES = {
    "rank": WORKER,
    "scheduler": SCHEDULER,
    "ingress": INGRESS,
    "engine": ENGINE,
    "haproxy-manager": "ray::HAProxyManager",
    "controller": "ray::ServeController",
    "proxy": "ray::ProxyActor",
}
ROLES = {
    "peer": "a rank that is not its group's first",
    "leader": "a group's first rank",
    "group": "all ranks of one group",
    "groups": "all ranks of all groups",
    "leaders": "the first rank of every group",
    "scheduler": "the scheduler actor",
    "ingress": "one front end",
    "engine": "the Engine replica, which owns scheduler and groups",
    "haproxy": "HAProxy itself",
    "haproxy-manager": "the actor that runs HAProxy",
    "controller": "Serve's controller",
    "proxy": "Serve's proxy actor",
    "gcs": "Ray's GCS, which nothing brings back: the endpoint is ended by Ctrl-C afterwards, and started anew",
    "raylet": "the node's raylet, likewise",
}

Choose = Callable[[list[int]], int]
"""One of several, by the caller's draw."""


def census(root: int) -> dict[str, list[int]]:
    """The processes below `root` by the names that `TITLES` and `PROGRAMS` have; those of other names are left out."""
    found: dict[str, list[int]] = {name: [] for name in (*TITLES, *PROGRAMS)}
    for pid, line in sorted(descendants(root).items()):
        program = Path(line.split()[0]).name if line else ""
        for name, title in TITLES.items():
            if line.startswith(title):
                found[name].append(pid)
        if program in PROGRAMS:
            found[program].append(pid)
    return found


def holders(role: str, root: int, choose: Choose) -> list[int]:
    """The processes that play a role now, one drawn where it is one of several; none if nobody plays it."""
    now = census(root)
    if role in ("peer", "leader", "group", "groups", "leaders"):
        groups = ranks_of(now["scheduler"], now["rank"])
        if role == "groups":
            return now["rank"]
        if role == "leaders":
            return sorted(groups)
        if not groups:
            return []
        leader = choose(sorted(groups))
        members = {"leader": [leader], "peer": groups[leader][:1], "group": [leader, *groups[leader]]}
        return members[role]
    named = now[{"gcs": "gcs_server"}.get(role, role)]
    return [choose(named)] if named else []


def ranks_of(schedulers: list[int], ranks: list[int]) -> dict[int, list[int]]:
    """{leader: its peers}: a leader has a connection to the scheduler, peers have one to their leader."""
    sockets = {pid: _connections(pid) for pid in (*schedulers, *ranks)}
    listened = {port for pid in schedulers for port in sockets[pid].listened}
    leaders = [pid for pid in ranks if any(address.partition(":")[2] in listened for address in sockets[pid].remote)]
    peers: dict[int, list[int]] = {leader: [] for leader in leaders}
    for pid in ranks:
        if pid not in peers:
            for leader in leaders:
                if sockets[pid].remote & sockets[leader].local:
                    peers[leader].append(pid)
                    break
    return peers


class Connections:
    """The IPv4 sockets of one process. local, remote: addresses of both sides. listened: ports."""

    def __init__(self, inodes: set[str], table: Mapping[str, tuple[str, str, str]]) -> None:
        held = [table[inode] for inode in inodes if inode in table]
        self.local = {local for local, _, state in held if state == ESTABLISHED}
        self.remote = {remote for _, remote, state in held if state == ESTABLISHED}
        self.listened = {local.partition(":")[2] for local, _, state in held if state == LISTENING}


def _connections(pid: int) -> Connections:
    """Ray's own are IPv6 sockets, so these are Manta's, and torch's."""
    table = {}
    try:
        for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            table[fields[9]] = (fields[1], fields[2], fields[3])
        targets = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:  # it has ended
        targets = []
    return Connections({target[8:-1] for target in targets if target.startswith("socket:[")}, table)
