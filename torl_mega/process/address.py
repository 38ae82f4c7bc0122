"""The address of this node that the other nodes reach.

What leaves a node must never be a loopback address: whoever is told 127.0.0.1, or the 127.0.1.1 that Debian gives a host's
own name, finds itself. Limits: IPv4.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Iterable

from torl_mega.errors import ConfigError

LOOPBACK = "127.0.0.1"
_SIOCGIFADDR = 0x8915


def own_address(peers: Iterable[str]) -> str:
    """The address of TORL_IFNAME, or else the one from which this node sends to `peers` (names or addresses); the loopback
    address when all of them are this machine. Raises ConfigError."""
    if interface := os.environ.get("TORL_IFNAME"):
        return _address_of(interface)
    return next((found for found in map(_sends_from, peers) if not is_loopback(found)), LOOPBACK)


def is_loopback(host: str) -> bool:
    """Whether these words name the machine they are read on. Looks nothing up."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower().rstrip(".") in ("localhost", "localhost.localdomain", "ip6-localhost", "")


def interface_of(address: str) -> str | None:
    """The network interface that has this address, or None."""
    for _, name in socket.if_nameindex():
        try:
            if _address_of(name) == address:
                return name
        except ConfigError:  # one without an IPv4 address
            continue
    return None


def _sends_from(peer: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((peer, 9))  # chooses a route; a datagram socket sends nothing by it
        except OSError as exc:
            raise ConfigError(f"{peer} cannot be reached from {socket.gethostname()}: {exc}") from None
        return probe.getsockname()[0]


def _address_of(interface: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", os.fsencode(interface)[:15]))
        except OSError as exc:
            known = ", ".join(name for _, name in socket.if_nameindex())
            raise ConfigError(
                f"TORL_IFNAME = {interface} has no IPv4 address here ({exc.strerror}); this node has {known}"
            ) from None
        return socket.inet_ntoa(answer[20:24])
