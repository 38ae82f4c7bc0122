"""The system calls a snippet may make, as a BPF allow list. Everything else is refused.

Written by hand because the jail imports the standard library alone, and because each child's pid is patched into the
program. The tables are tested against the kernel's headers, the filter by an independent BPF interpreter
(tests/sandbox/test_seccomp.py).

Refused calls fail with EPERM (ENOSYS above the newest known number, so that libraries fall back); a foreign instruction
set (i386, x32) kills. Arguments are compared in their low 32 bits, which is what the kernel reads for the ints among
`_rules`; pointers in both halves. `kill` and `tgkill` reach only the own process: its pid is patched into the program
before it is loaded (`install`). With `shared_files` (no mount namespace) chmod, chown and utime answer 0 and do
nothing, because Landlock does not govern them and the files may belong to the same user; for the same reason truncate()
of a path is refused before Landlock's ABI 3; and fallocate() is "not supported", since deleted files are not measured.

What it lets through on purpose: threads, timers, pipes, epoll, socketpair (asyncio needs one), files. What it closes:
fork, exec, every other socket, signals to others, namespaces, mounts, ptrace, shared memory and queues, keyrings,
memfd, io_uring, userfaultfd, bpf, perf, pidfd, personality, scheduling of others, F_SETOWN/F_SETSIG, TIOCSTI, and a
descriptor table per thread, which would multiply RLIMIT_NOFILE.
"""

from __future__ import annotations

import ctypes
import errno
import struct

from torl_mega.sandbox.jail.linux import MACHINE, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, check, libc

_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
_PID = 0x5EADBEEF  # placeholder of the own pid
_NEWEST = 462  # newest number known when the list was written; above it ENOSYS

_FREE = """
    read write close fstat lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn pread64 pwrite64
    readv writev sched_yield mremap msync madvise dup nanosleep getitimer setitimer getpid sendfile exit uname flock
    fsync fdatasync ftruncate getcwd chdir fchdir umask gettimeofday getrusage sysinfo times getuid getgid geteuid
    getegid getppid getpgid getsid getgroups getresuid getresgid rt_sigpending rt_sigtimedwait rt_sigsuspend
    sigaltstack statfs fstatfs getpriority sched_getparam sched_getscheduler sched_get_priority_max
    sched_get_priority_min sched_rr_get_interval gettid futex sched_getaffinity getdents64 set_tid_address
    restart_syscall fadvise64 timer_create timer_settime timer_gettime timer_getoverrun timer_delete clock_gettime
    clock_getres clock_nanosleep exit_group epoll_ctl openat mkdirat newfstatat unlinkat renameat linkat symlinkat
    readlinkat faccessat pselect6 ppoll set_robust_list epoll_pwait timerfd_create timerfd_settime timerfd_gettime
    eventfd2 signalfd4 epoll_create1 dup3 pipe2 preadv pwritev getcpu sched_getattr renameat2 getrandom
    copy_file_range preadv2 pwritev2 statx rseq openat2 faccessat2 epoll_pwait2 wait4 waitid getsockname getpeername
    getsockopt shutdown capget
""".split()
_FREE_X86 = """
    open stat lstat poll access pipe select dup2 pause alarm creat getdents rename mkdir rmdir link unlink symlink
    readlink getpgrp getrlimit epoll_create epoll_wait eventfd signalfd arch_prctl time
""".split()
_METADATA = "fchmod fchmodat fchmodat2 fchown fchownat utimensat".split()
_METADATA_X86 = "chmod chown lchown utime utimes futimesat".split()
_XATTR = "getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr".split()

_THREAD, _SHARED_FILES = 0x00010000, 0x400
_CLOSE_RANGE_UNSHARE = 2
_CLONE_REFUSED = 0x7E020000 | 0x8000 | 0x2000 | 0x1000  # every NEW*, PARENT, PTRACE, PIDFD
# DUPFD to SETLKW, OFD locks, DUPFD_CLOEXEC, GETPIPE_SZ, GET_SEALS
_FCNTL = [0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032, 1034]
_IOCTL = [0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451]  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
_PRCTL = [3, 15, 16, 39]  # GET_DUMPABLE, SET_NAME, GET_NAME, GET_NO_NEW_PRIVS
_AF_UNIX, _MSG_OOB, _PRIO_PROCESS = 1, 1, 0

_X86_64 = """
    read 0 write 1 open 2 close 3 stat 4 fstat 5 lstat 6 poll 7 lseek 8 mmap 9 mprotect 10 munmap 11 brk 12
    rt_sigaction 13 rt_sigprocmask 14 rt_sigreturn 15 ioctl 16 pread64 17 pwrite64 18 readv 19 writev 20 access 21
    pipe 22 select 23 sched_yield 24 mremap 25 msync 26 madvise 28 dup 32 dup2 33 pause 34 nanosleep 35 getitimer 36
    alarm 37 setitimer 38 getpid 39 sendfile 40 sendto 44 recvfrom 45 shutdown 48 getsockname 51 getpeername 52
    socketpair 53 getsockopt 55 clone 56 exit 60 wait4 61 kill 62 uname 63 fcntl 72 flock 73 fsync 74 fdatasync 75
    truncate 76 ftruncate 77 getdents 78 getcwd 79 chdir 80 fchdir 81 rename 82 mkdir 83 rmdir 84 creat 85 link 86
    unlink 87 symlink 88 readlink 89 chmod 90 fchmod 91 chown 92 fchown 93 lchown 94 umask 95 gettimeofday 96
    getrlimit 97 getrusage 98 sysinfo 99 times 100 getuid 102 getgid 104 geteuid 107 getegid 108 getppid 110
    getpgrp 111 getgroups 115 getresuid 118 getresgid 120 getpgid 121 getsid 124 capget 125 rt_sigpending 127
    rt_sigtimedwait 128 rt_sigsuspend 130 sigaltstack 131 utime 132 statfs 137 fstatfs 138 getpriority 140
    setpriority 141 sched_getparam 143 sched_getscheduler 145 sched_get_priority_max 146 sched_get_priority_min 147
    sched_rr_get_interval 148 prctl 157 arch_prctl 158 setrlimit 160 gettid 186 getxattr 191 lgetxattr 192
    fgetxattr 193 listxattr 194 llistxattr 195 flistxattr 196 time 201 futex 202 sched_getaffinity 204
    epoll_create 213 getdents64 217 set_tid_address 218 restart_syscall 219 fadvise64 221 timer_create 222
    timer_settime 223 timer_gettime 224 timer_getoverrun 225 timer_delete 226 clock_gettime 228 clock_getres 229
    clock_nanosleep 230 exit_group 231 epoll_wait 232 epoll_ctl 233 tgkill 234 utimes 235 waitid 247 openat 257
    mkdirat 258 fchownat 260 futimesat 261 newfstatat 262 unlinkat 263 renameat 264 linkat 265 symlinkat 266
    readlinkat 267 fchmodat 268 faccessat 269 pselect6 270 ppoll 271 set_robust_list 273 utimensat 280 epoll_pwait 281
    signalfd 282 timerfd_create 283 eventfd 284 fallocate 285 timerfd_settime 286 timerfd_gettime 287 signalfd4 289
    eventfd2 290 epoll_create1 291 dup3 292 pipe2 293 preadv 295 pwritev 296 prlimit64 302 getcpu 309
    sched_getattr 315 renameat2 316 getrandom 318 copy_file_range 326 preadv2 327 pwritev2 328 statx 332 rseq 334
    clone3 435 close_range 436 openat2 437 faccessat2 439 epoll_pwait2 441 fchmodat2 452
"""
_AARCH64 = """
    getxattr 8 lgetxattr 9 fgetxattr 10 listxattr 11 llistxattr 12 flistxattr 13 getcwd 17 eventfd2 19
    epoll_create1 20 epoll_ctl 21 epoll_pwait 22 dup 23 dup3 24 fcntl 25 ioctl 29 flock 32 mkdirat 34 unlinkat 35
    symlinkat 36 linkat 37 renameat 38 statfs 43 fstatfs 44 truncate 45 ftruncate 46 fallocate 47 faccessat 48
    chdir 49 fchdir 50 fchmod 52 fchmodat 53 fchownat 54 fchown 55 openat 56 close 57 pipe2 59 getdents64 61 lseek 62
    read 63 write 64 readv 65 writev 66 pread64 67 pwrite64 68 preadv 69 pwritev 70 sendfile 71 pselect6 72 ppoll 73
    signalfd4 74 readlinkat 78 newfstatat 79 fstat 80 fsync 82 fdatasync 83 timerfd_create 85 timerfd_settime 86
    timerfd_gettime 87 utimensat 88 capget 90 exit 93 exit_group 94 waitid 95 set_tid_address 96 futex 98
    set_robust_list 99 nanosleep 101 getitimer 102 setitimer 103 timer_create 107 timer_gettime 108
    timer_getoverrun 109 timer_settime 110 timer_delete 111 clock_gettime 113 clock_getres 114 clock_nanosleep 115
    sched_getscheduler 120 sched_getparam 121 sched_getaffinity 123 sched_yield 124 sched_get_priority_max 125
    sched_get_priority_min 126 sched_rr_get_interval 127 restart_syscall 128 kill 129 tgkill 131 sigaltstack 132
    rt_sigsuspend 133 rt_sigaction 134 rt_sigprocmask 135 rt_sigpending 136 rt_sigtimedwait 137 rt_sigreturn 139
    setpriority 140 getpriority 141 getresuid 148 getresgid 150 times 153 getpgid 155 getsid 156 getgroups 158
    uname 160 getrlimit 163 setrlimit 164 getrusage 165 umask 166 prctl 167 getcpu 168 gettimeofday 169 getpid 172
    getppid 173 getuid 174 geteuid 175 getgid 176 getegid 177 gettid 178 sysinfo 179 socketpair 199 getsockname 204
    getpeername 205 sendto 206 recvfrom 207 getsockopt 209 shutdown 210 brk 214 munmap 215 mremap 216 clone 220
    mmap 222 fadvise64 223 mprotect 226 msync 227 madvise 233 wait4 260 prlimit64 261 sched_getattr 275 renameat2 276
    getrandom 278 copy_file_range 285 preadv2 286 pwritev2 287 statx 291 rseq 293 clone3 435 close_range 436
    openat2 437 faccessat2 439 epoll_pwait2 441 fchmodat2 452
"""
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def _table(words: str) -> dict[str, int]:
    parts = words.split()
    return dict(zip(parts[::2], map(int, parts[1::2]), strict=True))


TABLES = {"x86_64": _table(_X86_64), "aarch64": _table(_AARCH64)}


def _ins(code: int, k: int, jt: int = 0, jf: int = 0) -> bytes:
    return struct.pack("HBBI", code, jt, jf, k & 0xFFFFFFFF)


def _ret(action: int) -> bytes:
    return _ins(_RET, action)


_YES, _NO = _ret(_ALLOW), _ret(_ERRNO | errno.EPERM)


def _arg(index: int) -> bytes:
    return _ins(_LD, 16 + 8 * index)


def _high(index: int) -> bytes:
    return _ins(_LD, 16 + 8 * index + 4)


def _one_of(index: int, values: list[int]) -> list[bytes]:
    """Allow when the argument is one of `values`."""
    tests = [_ins(_JEQ, v, len(values) - i, 0) for i, v in enumerate(values)]
    return [_arg(index), *tests, _NO, _YES]


def _rules() -> dict[str, list[bytes]]:
    thread_only = [
        _arg(0), _ins(_JSET, _CLONE_REFUSED, 3, 0), _ins(_JSET, _THREAD, 0, 2), _ins(_JSET, _SHARED_FILES, 0, 1), _YES, _NO,
    ]  # fmt: skip
    own_priority = [_arg(0), _ins(_JEQ, _PRIO_PROCESS, 0, 3), _arg(1), _ins(_JEQ, 0, 0, 1), _YES, _NO]
    no_address = [
        _arg(3), _ins(_JSET, _MSG_OOB, 5, 0), _arg(4), _ins(_JEQ, 0, 0, 3), _high(4), _ins(_JEQ, 0, 0, 1), _YES, _NO,
    ]  # fmt: skip
    no_oob = [_arg(3), _ins(_JSET, _MSG_OOB, 1, 0), _YES, _NO]
    return {
        "clone": thread_only,
        "close_range": [_arg(2), _ins(_JSET, _CLOSE_RANGE_UNSHARE, 1, 0), _YES, _NO],
        "clone3": [_ret(_ERRNO | errno.ENOSYS)],
        "kill": _one_of(0, [_PID]),
        "tgkill": _one_of(0, [_PID]),
        "prlimit64": _one_of(0, [0, _PID]),
        "setrlimit": [_YES],
        "setpriority": own_priority,
        "fcntl": _one_of(1, _FCNTL),
        "ioctl": _one_of(1, _IOCTL),
        "prctl": _one_of(0, _PRCTL),
        "socketpair": _one_of(0, [_AF_UNIX]),
        "sendto": no_address,
        "recvfrom": no_oob,
    }


def program(*, shared_files: bool, landlock_abi: int = 0, machine: str = MACHINE) -> bytes:
    """The filter with the pid's placeholder in it: eight bytes an instruction."""
    table = TABLES[machine]
    names = _FREE + (_FREE_X86 if machine == "x86_64" else [])
    metadata = _METADATA + (_METADATA_X86 if machine == "x86_64" else [])
    unsupported = _XATTR + (["fallocate"] if shared_files else [])
    if not shared_files:
        names = [*names, *metadata, "fallocate"]
    if not shared_files or landlock_abi >= 3:
        names = [*names, "truncate"]
    blocks = [_ins(_LD, 4), _ins(_JEQ, _AUDIT_ARCH[machine], 1, 0), _ret(_KILL), _ins(_LD, 0)]
    if machine == "x86_64":
        blocks += [_ins(_JGE, 0x40000000, 0, 1), _ret(_KILL)]
    for name, body in _rules().items():
        blocks += [_ins(_JEQ, table[name], 0, len(body)), *body]
    for number in sorted(table[n] for n in metadata if shared_files and n in table):
        blocks += [_ins(_JEQ, number, 0, 1), _ret(_ERRNO)]
    for name in unsupported:
        blocks += [_ins(_JEQ, table[name], 0, 1), _ret(_ERRNO | errno.EOPNOTSUPP)]
    for low, high in _ranges(sorted(table[n] for n in names if n in table)):
        blocks += [_ins(_JGE, low, 0, 2), _ins(_JGE, high + 1, 1, 0), _YES]
    blocks += [_ins(_JGE, _NEWEST + 1, 0, 1), _ret(_ERRNO | errno.ENOSYS), _NO]
    return b"".join(blocks)


def _ranges(numbers: list[int]) -> list[tuple[int, int]]:
    """Consecutive numbers as (low, high) pairs."""
    out: list[tuple[int, int]] = []
    for n in numbers:
        if out and out[-1][1] == n - 1:
            out[-1] = (out[-1][0], n)
        else:
            out.append((n, n))
    return out


def install(template: bytes, pid: int) -> None:
    """Patches the own pid in and loads the filter into the calling thread. Needs no_new_privs; final."""
    patched = template.replace(struct.pack("I", _PID), struct.pack("I", pid))
    buffer = ctypes.create_string_buffer(patched, len(patched))
    fprog = struct.pack("HxxxxxxP", len(patched) // 8, ctypes.addressof(buffer))
    raw = ctypes.create_string_buffer(fprog, len(fprog))
    result = libc.prctl(
        PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), ctypes.byref(raw), ctypes.c_ulong(0), ctypes.c_ulong(0)
    )
    check(result, "seccomp")
