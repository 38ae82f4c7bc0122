# ruff: noqa: E501  a program is one line of data
"""Sockets of all kinds, and every other channel out."""

from __future__ import annotations

from hostile import Hostile
from hostile.processes import _LIBC, refused

CASES = [
    refused("tcp_local", "connect to a local service", "import socket\nsocket.create_connection(('127.0.0.1', @PORT@), timeout=1)"),
    refused("tcp_out", "connect to the internet", "import socket\nsocket.create_connection(('1.1.1.1', 53), timeout=1)"),
    refused("tcp6", "IPv6", "import socket\nsocket.create_connection(('::1', @PORT@), timeout=1)"),
    refused("listen", "open a server", "import socket\ns = socket.socket()\ns.bind(('0.0.0.0', 0)); s.listen()"),
    refused("udp", "send a datagram", "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', @PORT@))"),
    refused("dns", "resolve a name", "import socket\nsocket.getaddrinfo('example.org', 80)"),
    refused("urllib", "fetch a page", "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:@PORT@', timeout=1)"),
    refused("metadata", "the cloud's metadata service", "import urllib.request\nurllib.request.urlopen('http://169.254.169.254/', timeout=1)"),
    refused("raw_socket", "raw packets", "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_RAW, 1)"),
    refused("packet_socket", "sniff", "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)"),
    refused("netlink", "netlink", "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)"),
    refused("vsock", "talk to the hypervisor", "import socket\nsocket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)"),
    refused("alg_socket", "the kernel's crypto sockets", "import socket\nsocket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)"),
    refused("unix_pool", "connect to the pool's own socket", "import socket\nsocket.socket(socket.AF_UNIX).connect('@SOCK@')"),
    refused("unix_abstract", "connect to an abstract socket", "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0@ABSTRACT@')"),
    refused("unix_bind", "bind an abstract socket", "import socket\nsocket.socket(socket.AF_UNIX).bind('\\0mine')"),
    refused("socketpair_inet", "socketpair of another family", "import socket\nsocket.socketpair(socket.AF_INET)"),
    refused("socketpair_sendto", "send from a pair to a named socket", "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\na.sendto(b'x', '\\0@ABSTRACT@')"),
    refused("socketpair_sendto_high", "the same with an address whose low half is zero", _LIBC + "import socket, mmap\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\nlibc.mmap.restype = ctypes.c_void_p\nlibc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]\np = libc.mmap(1 << 32, 4096, 3, 0x100022, -1, 0)\nctypes.memmove(p, b'\\x01\\0\\0@ABSTRACT@', 13)\nck(libc.syscall(44, a.fileno(), b'x', 1, 0, ctypes.c_void_p(p), 13))"),
    refused("socketpair_connect", "re-connect a pair", "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\na.connect('\\0@ABSTRACT@')"),
    refused("sendmsg_fds", "pass descriptors", "import socket\na, b = socket.socketpair()\nsocket.send_fds(a, [b'x'], [0])"),
    refused("oob", "out-of-band data on a unix pair", "import socket\na, b = socket.socketpair()\na.send(b'x', socket.MSG_OOB)"),
    refused("asyncio_server", "an asyncio server", "import asyncio\nasync def f():\n    s = await asyncio.start_server(lambda r, w: None, '127.0.0.1', 0)\n    if not s.sockets: raise OSError\nasyncio.run(f())"),
    Hostile("asyncio_works", "asyncio itself must work: ordinary programs use it", "import asyncio\nasync def f():\n    await asyncio.sleep(0.01); print('fine')\nasyncio.run(f())\n", stdout="fine\n"),
]  # fmt: skip
