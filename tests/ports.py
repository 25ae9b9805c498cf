"""Ports on loopback that nothing uses."""

import random
import socket
from contextlib import suppress

PORTS = range(20_000, 32_000)
"""Neither ports of Ray's workers nor those that the system assigns to connections: both may be taken at any time."""


def free_ports(count: int) -> list[int]:
    ports: set[int] = set()
    while len(ports) < count:
        port = random.choice(PORTS)
        with suppress(OSError), socket.socket() as bound:
            bound.bind(("127.0.0.1", port))
            ports.add(port)
    return list(ports)
