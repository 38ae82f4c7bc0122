# ruff: noqa: E501  a program is one line of data
"""Other processes: starting them, killing them, slowing them, outliving the end."""

from __future__ import annotations

from hostile import ANY, TIMEOUT, Hostile
from torl_mega.types import ExecutionStatus as S


def refused(name: str, tries: str, body: str, **kw: object) -> Hostile:
    """`body` must raise; getting past it is the escape."""
    lines = "\n".join("    " + line for line in body.strip().splitlines())
    return Hostile(
        name,
        tries,
        f"import os, sys, ctypes, signal, time\ntry:\n{lines}\n    print('ESCAPED')\nexcept BaseException as e:\n    print('refused', type(e).__name__)\n",
        **kw,
    )  # type: ignore[arg-type]


_LIBC = "libc = ctypes.CDLL(None, use_errno=True)\ndef ck(r):\n    if r < 0: raise OSError(ctypes.get_errno())\n"

CASES = [
    refused("fork", "start a second process", "pid = os.fork()\nif pid == 0:\n    os._exit(0)"),
    Hostile("fork_bomb", "fork without end", "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n", TIMEOUT),
    refused("vfork_raw", "vfork by number", _LIBC + "ck(libc.syscall(58))"),
    refused("clone_raw", "clone without CLONE_THREAD by number", _LIBC + "ck(libc.syscall(56, 17, 0, 0, 0, 0))"),
    refused("clone_newuser", "clone into a new user namespace", _LIBC + "ck(libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0))"),
    refused("clone3_raw", "clone3 by number", _LIBC + "b = ctypes.create_string_buffer(88)\nck(libc.syscall(435, b, 88))"),
    refused("subprocess", "run a program", "import subprocess\nsubprocess.run(['/bin/true'])"),
    refused("os_system", "run a shell", "r = os.system('echo hi')\nif r != 0: raise OSError(r)"),
    refused("popen", "run a shell by popen", "p = os.popen('echo hi')\nif p.read() != 'hi\\n': raise OSError()"),
    refused("posix_spawn", "posix_spawn", "os.posix_spawn('/bin/true', ['true'], {})"),
    refused("execve", "replace itself by a shell", "os.execv('/bin/sh', ['sh', '-c', 'echo ESCAPED'])"),
    refused("execveat", "execveat by number", _LIBC + "a = (ctypes.c_char_p * 2)(b'x', None)\nck(libc.syscall(322, -100, b'/bin/true', a, a, 0))"),
    refused("exec_memfd", "run a program from memory", "fd = os.memfd_create('x')\nos.execv(fd, ['x'])"),
    refused("multiprocessing", "a pool of processes", "import multiprocessing as m\nwith m.get_context('fork').Pool(2) as p: p.map(abs, [1])"),
    refused("process_pool_executor", "a pool of processes", "from concurrent.futures import ProcessPoolExecutor as P\nwith P(2) as p: print(list(p.map(abs, [1])))"),
    refused("pty", "a terminal with a shell", "import pty\npty.spawn(['/bin/sh'])\nraise OSError()"),
    refused("kill_parent", "kill the zygote by getppid (0 in a pid namespace: the whole group)", "os.kill(os.getppid(), 9)"),
    refused("kill_group_zero", "kill the own process group", "os.kill(0, 9)"),
    refused("kill_all", "kill everything", "os.kill(-1, 9)"),
    refused("kill_one", "kill pid 1", "os.kill(1, 9)"),
    refused("kill_canary", "kill another process of the user", "os.kill(@PID@, 9)"),
    refused("kill_pool", "kill the pool", "os.kill(@POOL@, 9)"),
    refused("killpg_parent", "kill the parent's group", "os.killpg(os.getpgid(os.getppid()), 9)"),
    Hostile("kill_everyone", "kill every pid there may be", "import os\nfor p in range(-70000, 70000):\n    if p == os.getpid(): continue\n    try:\n        os.kill(p, 9); print('ESCAPED', p)\n    except OSError: pass\n", ANY, wall_s=3.0),
    refused("tgkill_canary", "tgkill another process", _LIBC + "ck(libc.syscall(234, @PID@, @PID@, 9))"),
    refused("tkill_canary", "tkill another process", _LIBC + "ck(libc.syscall(200, @PID@, 9))"),
    refused("sigqueue_canary", "rt_sigqueueinfo", _LIBC + "b = ctypes.create_string_buffer(128)\nck(libc.syscall(129, @PID@, 9, b))"),
    refused("tgsigqueue_canary", "rt_tgsigqueueinfo", _LIBC + "b = ctypes.create_string_buffer(128)\nck(libc.syscall(297, @PID@, @PID@, 9, b))"),
    refused("pidfd_kill", "pidfd_send_signal", "fd = os.pidfd_open(@PID@)\nsignal.pidfd_send_signal(fd, 9)"),
    refused("fcntl_setown", "have the kernel send SIGIO to another process (F_SETOWN)", "import fcntl\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, @PID@)"),
    refused("fcntl_setsig", "choose SIGKILL for SIGIO (F_SETSIG)", "import fcntl\nr, w = os.pipe()\nfcntl.fcntl(r, 10, 9)"),
    refused("fcntl_lease", "hold a lease on a library", "import fcntl\nf = open(os.__file__)\nfcntl.fcntl(f, 1024, fcntl.F_RDLCK)"),
    refused("ioctl_setown", "FIOSETOWN", "import fcntl\nr, w = os.pipe()\nfcntl.ioctl(r, 0x8901, b'\\0' * 4)"),
    refused("renice_user", "renice all of the user's processes", "os.setpriority(os.PRIO_USER, os.getuid(), 19)"),
    refused("renice_group", "renice the group", "os.setpriority(os.PRIO_PGRP, 0, 19)"),
    refused("renice_canary", "renice another process", "os.setpriority(os.PRIO_PROCESS, @PID@, 19)"),
    refused("renice_parent", "renice the parent", "os.setpriority(os.PRIO_PROCESS, os.getppid() or 1, 19)"),
    refused("negative_nice", "raise its own priority", "os.nice(-10)"),
    refused("affinity_canary", "pin another process to one core", "os.sched_setaffinity(@PID@, {0})"),
    refused("affinity_self", "leave the cores it was given", "os.sched_setaffinity(0, {0})"),
    refused("realtime", "become a real-time process", "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))"),
    refused("prlimit_canary", "lower another process's limits", "import resource\nresource.prlimit(@PID@, resource.RLIMIT_CPU, (1, 1))"),
    refused("prlimit_parent", "lower the zygote's limits", "import resource\nresource.prlimit(os.getppid() or 1, resource.RLIMIT_NPROC, (0, 0))"),
    refused("raise_rlimit", "raise its own hard limits", "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 50, 1 << 50))"),
    refused("raise_cpu_limit", "raise its CPU limit", "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (10000, 10000))"),
    refused("pdeathsig_off", "outlive the zygote", _LIBC + "ck(libc.prctl(1, 0, 0, 0, 0))"),
    refused("subreaper", "adopt orphans", _LIBC + "ck(libc.prctl(36, 1, 0, 0, 0))"),
    refused("setsid", "leave its session", "os.setsid()"),
    refused("setpgid", "change its group", "os.setpgid(0, 0)"),
    refused("daemonise", "double fork and go on after the answer", "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(30)\n    os._exit(0)"),
    refused("ptrace_canary", "trace another process", _LIBC + "ck(libc.ptrace(16, @PID@, 0, 0))"),
    refused("ptrace_me", "have itself traced", _LIBC + "ck(libc.ptrace(0, 0, 0, 0))"),
    refused("vm_readv", "read another process's memory", _LIBC + "b = ctypes.create_string_buffer(64)\nv = (ctypes.c_ulong * 2)(ctypes.addressof(b), 64)\nck(libc.syscall(310, @PID@, v, 1, v, 1, 0))"),
    refused("vm_writev", "write another process's memory", _LIBC + "b = ctypes.create_string_buffer(64)\nv = (ctypes.c_ulong * 2)(ctypes.addressof(b), 64)\nck(libc.syscall(311, @PID@, v, 1, v, 1, 0))"),
    refused("kcmp", "compare kernel objects", _LIBC + "ck(libc.syscall(312, os.getpid(), @PID@, 0, 0, 0))"),
    refused("pidfd_getfd", "steal a descriptor", _LIBC + "ck(libc.syscall(438, 0, 1, 0))"),
    Hostile("thread_bomb", "start threads without end", "import threading, time\nn = 0\ntry:\n    while n < 5000:\n        threading.Thread(target=time.sleep, args=(30,), daemon=True).start(); n += 1\nexcept RuntimeError: pass\nprint('ESCAPED' if n > 200 else 'limited')\n", ANY),
    Hostile("thread_bomb_small_stacks", "the same with tiny stacks", "import threading, time\nthreading.stack_size(65536)\nn = 0\ntry:\n    while n < 20000:\n        threading.Thread(target=time.sleep, args=(30,), daemon=True).start(); n += 1\nexcept RuntimeError: pass\nprint('ESCAPED' if n > 3000 else 'limited')\n", ANY, wall_s=3.0),
    Hostile("threads_outlive_main", "leave a thread running after main", "import threading, time\nthreading.Thread(target=lambda: time.sleep(60)).start()\nprint('main done', flush=True)\n", frozenset({S.TIMEOUT_WALL})),
    Hostile("daemon_threads_end", "daemon threads must end with it", "import threading, time\nthreading.Thread(target=lambda: time.sleep(60), daemon=True).start()\nprint('bye')\n", frozenset({S.OK}), stdout="bye\n"),
    Hostile("busy_threads", "burn every core", "import threading, hashlib\ndef f():\n    while True: hashlib.sha512(b'x' * 10**6).digest()\nfor _ in range(8): threading.Thread(target=f).start()\n", TIMEOUT),
    Hostile("stop_self", "stop itself so that it never ends", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nprint('woke')\n", frozenset({S.TIMEOUT_WALL})),
    Hostile("sigterm_self", "end by a signal of its own", "import os\nos.kill(os.getpid(), 15)\nprint('ESCAPED')\n", frozenset({S.SIGNAL})),
    Hostile("sigkill_self", "end by SIGKILL of its own", "import os\nos.kill(os.getpid(), 9)\n", frozenset({S.SIGNAL})),
    Hostile("abort", "abort()", "import os\nos.abort()\n", frozenset({S.SIGNAL})),
    Hostile("alarm", "die by an alarm", "import signal, time\nsignal.setitimer(signal.ITIMER_REAL, 0.1)\ntime.sleep(10)\n", frozenset({S.SIGNAL})),
    Hostile("signal_storm", "a handler that raises signals for ever", "import signal, os\nsignal.signal(signal.SIGUSR1, lambda *a: os.kill(os.getpid(), signal.SIGUSR1))\nos.kill(os.getpid(), signal.SIGUSR1)\nwhile True: pass\n", ANY),
    Hostile("itimer_storm", "a timer at microseconds", "import signal\nsignal.signal(signal.SIGALRM, lambda *a: None)\nsignal.setitimer(signal.ITIMER_REAL, 1e-6, 1e-6)\nwhile True: pass\n", TIMEOUT),
    Hostile("timers", "exhaust POSIX timers", "import ctypes\nl = ctypes.CDLL(None)\nt = ctypes.c_int()\nn = 0\nwhile n < 100000 and l.syscall(222, 1, None, ctypes.byref(t)) == 0: n += 1\nprint('ESCAPED' if n > 1000 else 'limited')\n"),
    Hostile("zombie_wait", "wait for children it does not have", "import os\ntry: os.waitpid(-1, 0)\nexcept ChildProcessError: print('none')\n", stdout="none\n"),
]  # fmt: skip
