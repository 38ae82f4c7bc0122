# ruff: noqa: E501  a program is one line of data
"""Native code through ctypes: the own address space, raw threads, waits that no Python signal reaches, limits got round."""

from __future__ import annotations

from hostile import ANY, TIMEOUT, Hostile
from hostile.processes import _LIBC, refused
from torl_mega.types import ExecutionStatus as S

WALL = frozenset({S.TIMEOUT_WALL})
DEATH = frozenset({S.SIGNAL, S.ERROR, S.OK, *TIMEOUT})
_C = "import ctypes, os, signal, struct, sys, time\nl = ctypes.CDLL(None, use_errno=True)\nl.syscall.restype = ctypes.c_long\nV = ctypes.c_void_p\n"
_MMAP = (
    _C
    + "l.mmap.restype = V\nl.mmap.argtypes = [V, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]\nBAD = (1 << 64) - 1\n"
)
# a raw thread that sleeps in pause(): its stack's top holds that function's address, to which syscall() returns
_CLONE = (
    _MMAP
    + "def thread(flags):\n    m = l.mmap(None, 65536, 3, 0x22, -1, 0)\n    top = m + 65536 - 64\n    ctypes.c_ulong.from_address(top).value = ctypes.cast(l.pause, V).value\n    return l.syscall(56, ctypes.c_ulong(flags), V(top), None, None, None)\n"
)

CASES = [
    Hostile("thread_own_files", "a raw thread with a descriptor table of its own, to multiply RLIMIT_NOFILE", _CLONE + "print('ESCAPED' if thread(0x50B00) > 0 else 'refused', flush=True)\nos._exit(0)\n", stdout="refused\n"),
    Hostile("close_range_unshare", "the same by close_range", _C + "r = l.syscall(436, 1000, 2000, 2)\nprint('ESCAPED' if r == 0 else 'refused')\n", stdout="refused\n"),
    Hostile("raw_threads", "raw threads without end", _CLONE + "n = 0\nwhile n < 2000 and thread(0x50F00) > 0: n += 1\nprint('ESCAPED' if n > 1000 else 'limited', flush=True)\nos._exit(0)\n", ANY),
    Hostile("map_locked", "locked memory by mmap", _MMAP + "print('ESCAPED' if l.mmap(None, 1 << 20, 3, 0x2022, -1, 0) not in (None, BAD) else 'refused')\n", stdout="refused\n"),
    Hostile("map_shared_huge", "shared anonymous memory past the limit", _MMAP + "n = 0\nwhile n < 4000 and l.mmap(None, 1 << 20, 3, 0x21, -1, 0) not in (None, BAD): n += 1\nprint('ESCAPED' if n > 1000 else 'limited')\n", stdout="limited\n", wall_s=3.0),
    Hostile("grows_down", "a map that grows downwards without being counted", _MMAP + "p = l.mmap(None, 4096, 3, 0x122, -1, 0)\nfor i in range(1, 1 << 20): ctypes.c_char.from_address(p - i * 4096).value = b'x'\nprint('ESCAPED')\n", ANY),
    Hostile("sbrk", "the heap past the limit", _C + "l.sbrk.restype = V; n = 0\nwhile n < 4000 and l.sbrk(1 << 20) not in (None, (1 << 64) - 1): n += 1\nprint('ESCAPED' if n > 1000 else 'limited')\n", ANY),
    Hostile("mremap_grow", "a map grown past the limit", _MMAP + "l.mremap.restype = V; l.mremap.argtypes = [V, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]\np = l.mmap(None, 4096, 3, 0x22, -1, 0)\nprint('ESCAPED' if l.mremap(p, 4096, 1 << 33, 1) not in (None, BAD) else 'limited')\n", stdout="limited\n"),
    Hostile("populate", "fault memory in inside the kernel", _MMAP + "p = l.mmap(None, 300 << 20, 3, 0x22, -1, 0)\nl.madvise.argtypes = [V, ctypes.c_size_t, ctypes.c_int]\nwhile True:\n    l.madvise(p, 300 << 20, 23); l.madvise(p, 300 << 20, 4)\n", TIMEOUT),
    Hostile("touch_slowly", "use 400 MB page by page, and wait", "import numpy as np, time\na = np.empty(400 << 20, np.uint8)\na[::4096] = 1\nprint(int(a[::4096].sum()), flush=True)\ntime.sleep(60)\n", frozenset({S.MEMORY, *TIMEOUT})),
    Hostile("unmap_everything", "unmap the whole address space", _C + "l.munmap(V(4096), ctypes.c_size_t((1 << 47) - 8192))\n", DEATH),
    Hostile("patch_exit", "turn libc's _exit into a return", _C + "p = ctypes.cast(l._exit, V).value\nl.mprotect(V(p & ~4095), ctypes.c_size_t(8192), 7)\nctypes.memmove(p, b'\\xc3', 1)\nprint('patched', flush=True)\n", ANY),
    Hostile("patch_libc", "overwrite libc's write for the next snippet", _C + "p = ctypes.cast(l.write, V).value\nl.mprotect(V(p & ~4095), ctypes.c_size_t(8192), 7)\nctypes.memmove(p, b'\\x31\\xc0\\xc3', 3)\nprint('x')\n", ANY),
    Hostile("patch_vdso", "overwrite the kernel's clock page for the next snippet", _C + "l.getauxval.restype = ctypes.c_ulong; l.getauxval.argtypes = [ctypes.c_ulong]\np = l.getauxval(33)\nr = l.mprotect(V(p), ctypes.c_size_t(4096), 7)\nif r == 0: ctypes.memset(p, 0xCC, 4096)\nprint(time.time() > 0)\n", ANY),
    Hostile("patch_rodata", "overwrite every writable or not page of numpy's core", _C + "import numpy\np = id(numpy.ndarray) & ~4095\nl.mprotect(V(p), ctypes.c_size_t(4096), 7)\nctypes.memset(p, 0, 4096)\n", ANY),
    Hostile("segv_ignored", "ignore SIGSEGV and fault for ever", _C + "signal.signal(signal.SIGSEGV, signal.SIG_IGN)\nctypes.string_at(8)\n", DEATH),
    Hostile("segv_handler", "a handler that returns to the fault", "import ctypes, signal\nsignal.signal(signal.SIGSEGV, lambda *a: None)\nctypes.string_at(8)\n", TIMEOUT),
    Hostile("sigaltstack_bad", "a signal stack in nowhere", _C + "l.sigaltstack(struct.pack('QiiQ', 0x1000, 0, 0, 65536), None)\nos.kill(os.getpid(), signal.SIGSEGV)\n", DEATH),
    Hostile("fs_base", "lose the thread's own storage", _C + "l.syscall(158, 0x1002, 0)\n", DEATH),
    Hostile("robust_list", "a robust list that is a ring", _C + "b = ctypes.create_string_buffer(64)\na = ctypes.addressof(b)\nstruct.pack_into('QQQ', b, 0, a + 24, 0, 0); struct.pack_into('Q', b, 24, a + 24)\nprint(l.syscall(273, V(a), 24))\n", frozenset({S.OK, S.ERROR})),
    Hostile("clear_tid", "have the kernel write to a bad address at the end", _C + "l.syscall(218, V(0xDEAD000))\nprint('x')\n", frozenset({S.OK}), stdout="x\n"),
    Hostile("gil_sleep", "sleep in C and hold the GIL", "import ctypes\nctypes.PyDLL(None).sleep(1000)\n", WALL),
    Hostile("gil_dropped", "drop the GIL and wait for it", "import ctypes\nctypes.pythonapi.PyEval_SaveThread()\nctypes.pythonapi.PyEval_SaveThread()\n", ANY),
    Hostile("py_finalize", "end the interpreter from inside", "import ctypes\nprint('x', flush=True)\nctypes.pythonapi.Py_FinalizeEx()\n", ANY),
    Hostile("py_exit", "Py_Exit", "import ctypes\nctypes.pythonapi.Py_Exit(3)\n", frozenset({S.ERROR})),
    Hostile("raw_exit_thread", "end only the main thread", _C + "import threading\nthreading.Thread(target=time.sleep, args=(1000,)).start()\nl.syscall(60, 0)\n", WALL),
    Hostile("futex_raw", "a raw futex", _C + "b = ctypes.c_int(0)\nl.syscall(202, ctypes.byref(b), 0, 0, None, None, 0)\n", WALL),
    Hostile("futex_pi", "wait for a lock that the pool is said to hold", _C + "b = ctypes.c_uint(@POOL@)\nr = l.syscall(202, ctypes.byref(b), 6, 0, None, None, 0)\nprint(r)\n", frozenset({S.OK, *WALL})),
    Hostile("sigwait", "wait for a signal", "import signal\nsignal.sigwait([signal.SIGUSR1])\n", WALL),
    Hostile("sigtimedwait", "wait with everything blocked", "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\nwhile True: signal.sigtimedwait([signal.SIGUSR1], 1000)\n", WALL),
    Hostile("select_forever", "select on nothing", "import select\nselect.select([], [], [])\n", WALL),
    Hostile("epoll_forever", "epoll on nothing", "import select\nselect.epoll().poll()\n", WALL),
    Hostile("epoll_ring", "epoll sets that hold each other", "import select\nfor _ in range(20):\n    a, b = select.epoll(), select.epoll()\n    try: a.register(b.fileno()); b.register(a.fileno())\n    except OSError: pass\nprint('fine')\n", stdout="fine\n"),
    Hostile("pipe_read", "read a pipe that nobody writes", "import os\nr, w = os.pipe()\nos.read(r, 1)\n", WALL),
    Hostile("pipe_write", "write a pipe that nobody reads", "import os\nr, w = os.pipe()\nos.write(w, b'x' * (1 << 24))\n", WALL),
    Hostile("flock_self", "wait for its own lock", "import fcntl\na, b = open('x', 'w'), open('x')\nfcntl.flock(a, fcntl.LOCK_EX); fcntl.flock(b, fcntl.LOCK_EX)\n", WALL),
    Hostile("lock_bomb", "a record lock per byte: kernel memory without end", "import fcntl\nf = open('x', 'wb')\ni = 0\nwhile True:\n    fcntl.lockf(f, fcntl.LOCK_EX, 1, i, 0); i += 2\n", frozenset({S.ERROR, *TIMEOUT})),
    Hostile("clock_nanosleep", "sleep until the year 2262", _C + "l.clock_nanosleep(1, 1, struct.pack('qq', 1 << 33, 0), None)\n", WALL),
    Hostile("timer_kill", "a CPU timer that kills", _C + "t = ctypes.c_int()\nl.syscall(222, 2, struct.pack('QiiQQQQQQ', 0, 9, 0, 0, 0, 0, 0, 0, 0), ctypes.byref(t))\nl.syscall(223, t, 0, struct.pack('qqqq', 0, 0, 0, 10 ** 7), None)\nwhile True: pass\n", frozenset({S.SIGNAL})),
    Hostile("cpu_rlimit_zero", "lower its own CPU limit to nothing", "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (0, 0))\nwhile True: pass\n", frozenset({S.SIGNAL, *TIMEOUT})),
    Hostile("rlimits_zero", "lower every limit to nothing", "import resource\nfor i in range(16):\n    try: resource.setrlimit(i, (0, 0))\n    except (OSError, ValueError): pass\nprint('x')\n", ANY),
    Hostile("sendfile_flood", "flood stdout inside the kernel", "import os\nz = os.open('/dev/zero', 0)\nwhile True: os.sendfile(1, z, None, 1 << 30)\n", ANY),
    Hostile("copy_range", "fill the folder inside the kernel", "import os, sympy\nl = os.open(sympy.__file__, 0)\nfd = os.open('x', os.O_CREAT | os.O_RDWR)\nn = 0\nwhile n < 1 << 30:\n    os.lseek(l, 0, 0); n += os.sendfile(fd, l, None, 1 << 20) or 1 << 30\nprint('ESCAPED' if os.fstat(fd).st_size > 64 << 20 else 'limited')\n", ANY),
    Hostile("socketpair_fill", "fill sockets' buffers", "import socket\nn = 0\nk = []\ntry:\n    while True:\n        a, b = socket.socketpair(); k += [a, b]\n        for s in (a, b):\n            s.setblocking(False)\n            try:\n                while True: n += s.send(b'x' * 65536)\n            except BlockingIOError: pass\nexcept OSError: pass\nprint('ESCAPED' if n > 64 << 20 else 'limited')\n", stdout="limited\n"),
    Hostile("pipe_packets", "packet-mode output of single bytes", "import fcntl, os\nfcntl.fcntl(1, fcntl.F_SETFL, os.O_WRONLY | 0o40000)\nfor _ in range(1000): os.write(1, b'x')\n", frozenset({S.OK}), stdout="x" * 1000),
    Hostile("o_async", "ask for SIGIO of the output pipe", "import fcntl, os\nfcntl.fcntl(1, fcntl.F_SETFL, os.O_WRONLY | os.O_ASYNC)\nprint('x')\n", frozenset({S.OK, S.SIGNAL})),
    Hostile("o_tmpfile", "nameless files", "import os\nfds = []\ntry:\n    while len(fds) < 500:\n        fds.append(os.open('.', os.O_TMPFILE | os.O_RDWR)); os.write(fds[-1], b'x' * (1 << 20))\nexcept OSError: pass\nprint('ESCAPED' if len(fds) > 64 else 'limited')\n", stdout="limited\n"),
    Hostile("readv_bad", "vectors that point nowhere", _C + "for n in (0, 1, 19, 20, 295, 296, 327, 328): l.syscall(n, 0, V(0xDEAD000), 1024, 0, 0, 0)\nprint('fine')\n", stdout="fine\n"),
    Hostile("fuzz_calls", "every system call with rubbish in its arguments", _C + "import random\nskip = {1, 9, 10, 11, 12, 15, 25, 34, 60, 62, 130, 158, 202, 218, 231, 234, 273, 334, 35, 230, 7, 23, 232, 270, 271, 281, 441, 128, 61, 247, 0, 3, 33, 292, 436, 13, 14, 160, 302, 37, 38, 95, 80, 81, 18, 20, 40, 296, 328, 289, 282, 290, 284}\nfor k in range(3):\n    for n in range(470):\n        if n not in skip: l.syscall(n, *[ctypes.c_long(random.choice((0, -1, 1, 4096, 1 << 40, -100))) for _ in range(6)])\nos.write(1, b'survived\\n')\n", ANY),
    refused("ptrace_seize", "seize another process", _LIBC + "ck(libc.ptrace(0x4206, @PID@, 0, 0))"),
    refused("peer_pidfd", "a handle of a process by a socket's peer", "import socket, struct\na, b = socket.socketpair()\nfd = struct.unpack('i', a.getsockopt(1, 77, 4))[0]\nsignal.pidfd_send_signal(fd, 9)"),
    refused("scm_rights_raw", "pass descriptors by sendmsg's number", _LIBC + "b = ctypes.create_string_buffer(128)\nck(libc.syscall(46, 1, b, 0))"),
    refused("recvmmsg", "recvmmsg", _LIBC + "ck(libc.syscall(299, 0, 0, 0, 0, 0))"),
    refused("io_uring_enter", "io_uring_enter and register", _LIBC + "r = libc.syscall(426, 0, 1, 0, 0, 0, 0)\nif r < 0 and ctypes.get_errno() in (1, 38): raise OSError\n"),
    refused("seccomp_listener", "a seccomp listener", _LIBC + "b = ctypes.create_string_buffer(64)\nck(libc.syscall(317, 1, 8, b))"),
    refused("prctl_seccomp", "strict seccomp by prctl", _LIBC + "ck(libc.prctl(22, 1, 0, 0, 0))"),
    refused("prctl_mm", "move its own memory map's marks", _LIBC + "ck(libc.prctl(35, 8, 0, 0, 0))"),
    refused("prctl_ptracer", "let anybody trace it", _LIBC + "ck(libc.prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0))"),
    refused("prctl_core_sched", "share a core's cookie", _LIBC + "ck(libc.prctl(62, 1, 0, 0, 0))"),
    refused("prctl_timerslack", "change another thread's timers", _LIBC + "ck(libc.prctl(29, 1, 0, 0, 0))"),
    refused("sched_attr", "a deadline scheduler", _LIBC + "b = ctypes.create_string_buffer(64)\nck(libc.syscall(314, 0, b, 0))"),
    refused("ioprio", "change the priority of its disk access", _LIBC + "ck(libc.syscall(251, 1, 0, 0))"),
    refused("sync_all", "flush every disk again and again", _LIBC + "ck(libc.syscall(306, 1))"),
    refused("mount_setattr", "mount_setattr", _LIBC + "b = ctypes.create_string_buffer(64)\nck(libc.syscall(442, -100, b'/', 0, b, 32))"),
    refused("statmount", "list the mounts", _LIBC + "b = ctypes.create_string_buffer(512)\nck(libc.syscall(458, b, b, 512, 0))"),
    refused("lsm_list", "list the security modules", _LIBC + "b = ctypes.create_string_buffer(512)\nck(libc.syscall(461, b, b, 0))"),
    refused("cachestat_lookup", "look at the page cache", _LIBC + "b = ctypes.create_string_buffer(512)\nck(libc.syscall(27, b, 4096, b))"),
    refused("move_pages", "move pages", _LIBC + "ck(libc.syscall(279, 0, 0, 0, 0, 0, 0))"),
    refused("get_robust_other", "read another process's lock list", _LIBC + "a, b = ctypes.c_long(), ctypes.c_long()\nck(libc.syscall(274, @PID@, ctypes.byref(a), ctypes.byref(b)))"),
    refused("uselib", "uselib", _LIBC + "ck(libc.syscall(134, b'/bin/true'))"),
    refused("fsconfig", "fsconfig, fsmount, fspick", _LIBC + "if max(libc.syscall(n, -1, 0, 0, 0, 0) for n in (431, 432, 433)) < 0 and ctypes.get_errno() == 1: raise OSError"),
    refused("xattr_list", "read a file's extended attributes", "os.listxattr('@FILE@')"),
]  # fmt: skip
