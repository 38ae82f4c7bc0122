"""The system-call tables against the kernel's headers, and the filter's form for both architectures."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from torl_mega.sandbox.jail import seccomp

HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_numbers_are_the_kernels(machine: str) -> None:
    if not HEADERS[machine].exists():
        pytest.skip(f"{HEADERS[machine]} is not installed")
    text = HEADERS[machine].read_text()
    known = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", text)}
    known.setdefault("newfstatat", known.get("fstatat", -1))  # its name in the generic table
    wrong = {n: (ours, known[n]) for n, ours in seccomp.TABLES[machine].items() if n in known and known[n] != ours}
    unknown = {n for n in seccomp.TABLES[machine] if n not in known}
    assert wrong == {}
    assert unknown <= {"fchmodat2"}  # newer than many headers


def _run(program: bytes, arch: int, number: int, args: tuple[int, ...]) -> int:
    """A BPF interpreter for the instructions in use: the independent reading of the filter."""
    data = struct.pack("<IIQ6Q", number, arch, 0, *(*args, 0, 0, 0, 0, 0, 0)[:6])
    code = list(struct.iter_unpack("<HBBI", program))
    at = accumulator = 0
    while True:
        op, jt, jf, k = code[at]
        at += 1
        if op == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, k)
        elif op == 0x06:
            return k
        else:
            true = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}[op]
            at += jt if true else jf


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_verdicts(machine: str) -> None:
    program = seccomp.program(shared_files=True, landlock_abi=2, machine=machine).replace(
        struct.pack("I", 0x5EADBEEF), struct.pack("I", 42)
    )
    table, arch = seccomp.TABLES[machine], {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]
    allow, eperm, enosys, fake, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x00050000, 0x80000000

    def verdict(name: str, *args: int) -> int:
        return _run(program, arch, table[name], args)

    assert verdict("read") == verdict("openat") == verdict("exit_group") == allow
    assert verdict("kill", 42, 9) == allow
    assert verdict("kill", 41, 9) == verdict("kill", 0, 9) == verdict("kill", 0xFFFFFFFF, 9) == eperm
    assert verdict("tgkill", 42, 43, 6) == allow
    assert verdict("clone", 0x3D0F00) == allow
    assert verdict("clone", 0x3D0F00 & ~0x400) == eperm  # a descriptor table of its own
    assert verdict("close_range", 3, 99, 4) == allow
    assert verdict("close_range", 3, 99, 2) == verdict("close_range", 3, 99, 6) == eperm
    assert verdict("truncate") == eperm
    assert verdict("ftruncate") == allow
    assert verdict("fallocate") == verdict("getxattr") == 0x00050000 | 95
    assert verdict("clone", 17) == verdict("clone", 0x3D0F00 | 0x10000000) == eperm
    assert verdict("clone3") == enosys
    assert verdict("fcntl", 0, 3) == allow
    assert verdict("fcntl", 0, 8) == verdict("fcntl", 0, 10) == verdict("fcntl", 0, 1031) == eperm
    assert verdict("ioctl", 0, 0x5401) == allow
    assert verdict("ioctl", 0, 0x5412) == eperm
    assert verdict("socketpair", 1) == allow
    assert verdict("socketpair", 2) == eperm
    assert verdict("sendto", 3, 0, 1, 0, 0) == allow
    assert verdict("sendto", 3, 0, 1, 0, 1 << 32) == verdict("sendto", 3, 0, 1, 1, 0) == eperm
    assert verdict("setpriority", 0, 0, 5) == allow
    assert verdict("setpriority", 0, 7, 5) == verdict("setpriority", 2, 0, 5) == eperm
    assert verdict("prlimit64", 0) == verdict("prlimit64", 42) == allow
    assert verdict("prlimit64", 1) == eperm
    assert verdict("prctl", 15) == allow
    assert verdict("prctl", 1) == verdict("prctl", 4) == eperm
    assert verdict("fchmodat") == fake
    private = seccomp.program(shared_files=False, machine=machine)
    assert all(_run(private, arch, table[n], ()) == allow for n in ("fchmodat", "fallocate", "truncate"))
    assert _run(program, arch, 999, ()) == enosys
    assert _run(program, 0x40000003, 4, ()) == kill
    listed = set(table.values())
    assert all(_run(program, arch, n, ()) == eperm for n in range(463) if n not in listed)
    if machine == "x86_64":
        assert _run(program, arch, 0x40000000, ()) == kill
