# ruff: noqa: E501  a program is one line of data
"""Rarely used parts of the kernel, where the holes are, and other instruction sets."""

from __future__ import annotations

from hostile import ANY, Hostile
from hostile.processes import _LIBC, refused


def call(name: str, number: int, args: str, tries: str = "") -> Hostile:
    return refused(
        name,
        tries or f"the system call {name}",
        _LIBC + f"b = ctypes.create_string_buffer(4096)\nck(libc.syscall({number}, {args}))",
    )


CASES = [
    call("io_uring_setup", 425, "8, b"), call("userfaultfd", 323, "1"), call("bpf", 321, "0, b, 48"),
    call("perf_event_open", 298, "b, 0, -1, -1, 0"), call("add_key", 248, "b'user', b'x', b'y', 1, -3"),
    call("keyctl", 250, "0, -3, 1"), call("request_key", 249, "b'user', b'x', 0, -3"), call("memfd_create", 319, "b'x', 0"),
    call("memfd_secret", 447, "0"), call("shmget", 29, "0, 4096, 0o1600"), call("msgget", 68, "0, 0o1600"),
    call("semget", 64, "0, 1, 0o1600"), call("mq_open", 240, "b'/x', 0o102, 0o600, 0"), call("unshare_user", 272, "0x10000000"),
    call("unshare_files", 272, "0x400"), call("setns", 308, "0, 0"), call("mount", 165, "b'x', b'/tmp', b'tmpfs', 0, 0"),
    call("umount", 166, "b'/tmp', 2"), call("pivot_root", 155, "b'.', b'.'"), call("fsopen", 430, "b'tmpfs', 0"),
    call("open_tree", 428, "-100, b'/', 1"), call("move_mount", 429, "-1, b'', -1, b'', 0"), call("personality", 135, "0x0040000"),
    call("syslog", 103, "3, b, 100"), call("reboot", 169, "0xfee1dead, 672274793, 0x89abcdef, 0"), call("kexec", 246, "0, 0, 0, 0"),
    call("init_module", 175, "b, 10, b''"), call("swapon", 167, "b'/x', 0"), call("settimeofday", 164, "b, 0"),
    call("clock_settime", 227, "0, b"), call("adjtimex", 159, "b"), call("sethostname", 170, "b'x', 1"), call("iopl", 172, "3"),
    call("quotactl", 179, "0, b'/', 0, b"), call("acct", 163, "b'/x'"), call("vhangup", 153, ""), call("mlockall", 151, "3"),
    call("mlock", 149, "b, 4096"), call("setuid", 105, "0"), call("setresuid", 117, "0, 0, 0"), call("setgroups", 116, "0, 0"),
    call("capset", 126, "b, b"), call("seccomp", 317, "0, 0, 0", "a further seccomp mode"), call("process_madvise", 440, "0, b, 1, 4, 0"),
    call("process_mrelease", 448, "0, 0"), call("migrate_pages", 256, "0, 1, b, b"), call("mbind", 237, "b, 4096, 1, 0, 0, 0"),
    call("vmsplice", 278, "1, b, 1, 0"), call("splice", 275, "0, 0, 1, 0, 10, 0"), call("tee", 276, "0, 1, 1, 0"), call("io_setup", 206, "128, b"),
    call("landlock_again", 444, "0, 0, 1", "build further Landlock layers"), call("modify_ldt", 154, "0, b, 100"), call("rseq_far", 462, "0", "the newest calls"),
    call("set_robust_other", 274, "1, b, b", "get_robust_list of another process"), call("membarrier_global", 324, "1, 0, 0", "stall all cores"),
    call("unknown_call", 1000, "0", "a number nobody knows"),
    Hostile("x32", "system calls of the x32 instruction set", "import ctypes\nr = ctypes.CDLL(None).syscall(0x40000000 + 56, 17, 0, 0, 0, 0)\nprint('ESCAPED' if r >= 0 else 'refused')\n", ANY),
    Hostile("int80", "system calls of the i386 instruction set", "import ctypes, mmap\ncode = bytes.fromhex('b802000000cd80c3')\nm = mmap.mmap(-1, 4096, prot=7)\nm.write(code)\nf = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\nr = f()\nprint('ESCAPED' if r >= 0 else 'refused', flush=True)\n", ANY),
    Hostile("dumpable", "make itself dumpable", "import ctypes\nl = ctypes.CDLL(None)\nprint('ESCAPED' if l.prctl(4, 1, 0, 0, 0) == 0 else 'refused')\n", stdout="refused\n"),
    Hostile("seccomp_state", "no_new_privs must be set", "import ctypes\nprint(ctypes.CDLL(None).prctl(39, 0, 0, 0, 0))\n", stdout="1\n"),
    Hostile("capabilities", "hold no capability", "import ctypes, struct\nh = struct.pack('Ii', 0x20080522, 0); d = ctypes.create_string_buffer(24)\nctypes.CDLL(None).syscall(125, h, d)\nprint(d.raw == bytes(24))\n", stdout="True\n"),
    Hostile("segfault", "crash", "import ctypes\nctypes.string_at(0)\n", ANY),
    Hostile("core_dump", "leave a core file", "import os, signal\nos.kill(os.getpid(), signal.SIGQUIT)\n", ANY),
    Hostile("stack_smash", "recurse in C without end", "import ctypes\nf = ctypes.pythonapi.Py_GetVersion\nd = []\nfor _ in range(10**6): d = [d]\nrepr(d) if False else None\nimport sys\nsys.setrecursionlimit(10**9)\ndef g(): return g()\ng()\n", ANY),
    Hostile("tiocsti", "type into the terminal", "import fcntl\ntry:\n    fcntl.ioctl(0, 0x5412, b'x'); print('ESCAPED')\nexcept OSError: print('refused')\n", stdout="refused\n"),
]  # fmt: skip
