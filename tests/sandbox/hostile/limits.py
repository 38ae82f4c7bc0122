# ruff: noqa: E501  a program is one line of data
"""Time, memory and descriptors: using more than was given, in Python and in C."""

from __future__ import annotations

from hostile import ANY, TIMEOUT, Hostile
from torl_mega.types import ExecutionStatus as S

MEMORY = frozenset({S.MEMORY})
FULL = frozenset({S.MEMORY, *TIMEOUT})  # filling memory takes time on a busy machine
WALL = frozenset({S.TIMEOUT_WALL})

CASES = [
    Hostile("loop", "run for ever", "while True: pass\n", TIMEOUT),
    Hostile("loop_c_pow", "a loop in C that holds the GIL", "print(len(str(9 ** (10 ** 9))))\n", ANY),
    Hostile("loop_c_sum", "a loop in C", "sum(iter(int, 1))\n", TIMEOUT),
    Hostile("loop_c_in", "a membership test in C", "import itertools\n-1 in itertools.count()\n", TIMEOUT),
    Hostile("regex", "catastrophic backtracking", "import re\nre.match(r'(a+)+$', 'a' * 60 + 'b')\n", TIMEOUT),
    Hostile("sleep", "sleep past the limit", "import time\ntime.sleep(1000)\n", WALL),
    Hostile("catch_all", "catch every exception", "while True:\n    try:\n        while True: pass\n    except BaseException: pass\n", TIMEOUT),
    Hostile("ignore_signals", "block and ignore every signal", "import signal\nfor s in signal.valid_signals():\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nsignal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\nwhile True: pass\n", TIMEOUT),
    Hostile("sigxcpu", "catch SIGXCPU", "import signal\nsignal.signal(signal.SIGXCPU, lambda *a: None)\nwhile True: pass\n", TIMEOUT),
    Hostile("atexit_loop", "loop in an exit handler", "import atexit\ndef f():\n    while True: pass\natexit.register(f)\nprint('x')\n", TIMEOUT),
    Hostile("del_loop", "loop in a finaliser", "class A:\n    def __del__(self):\n        while True: pass\na = A()\ndel a\n", TIMEOUT),
    Hostile("thread_loop", "loop in a thread and leave", "import threading\ndef f():\n    while True: pass\nthreading.Thread(target=f).start()\n", TIMEOUT),
    Hostile("lock_dead", "wait for itself", "import threading\nl = threading.Lock(); l.acquire(); l.acquire()\n", WALL),
    Hostile("futex", "sleep in the kernel", "import ctypes\nctypes.CDLL(None).pause()\n", WALL),
    Hostile("import_loop", "hang in an import", "import sys\nopen('evil.py', 'w').write('while True: pass')\nimport evil\n", TIMEOUT),
    Hostile("sympy_hang", "a factorisation without end", "import sympy\nprint(sympy.factorint((10**40 + 121) * (10**41 + 109) * (10**60+7)))\n", ANY),
    Hostile("mem_bytes", "one allocation of 10 GB", "x = bytearray(10 ** 10)\n", MEMORY),
    Hostile("mem_list", "grow a list", "x = []\nwhile True: x.append(' ' * 10 ** 6)\n", FULL),
    Hostile("mem_small", "many small objects", "x = []\nwhile True: x.append([None] * 1000)\n", frozenset({S.MEMORY, *TIMEOUT}), wall_s=5.0),
    Hostile("mem_numpy", "a numpy array of 8 TB", "import numpy as np\nnp.ones((10 ** 6, 10 ** 6))\n", MEMORY),
    Hostile("mem_str", "double a string", "s = 'x'\nwhile True: s += s\n", FULL),
    Hostile("mem_int", "an integer of a gigabyte", "x = 1 << (8 * 10 ** 9)\n", MEMORY),
    Hostile("mem_mmap", "anonymous maps", "import mmap\nm = []\nwhile True:\n    m.append(mmap.mmap(-1, 1 << 24)); m[-1].write(b'x' * (1 << 24))\n", frozenset({S.MEMORY, S.ERROR, *TIMEOUT})),
    Hostile("mem_many_maps", "maps of one page each", "import mmap\nm = []\nwhile True: m.append(mmap.mmap(-1, 4096))\n", frozenset({S.MEMORY, S.ERROR, *TIMEOUT, S.SIGNAL})),
    Hostile("mem_catch", "catch MemoryError for ever", "x = []\nwhile True:\n    try: x.append(bytearray(1 << 20))\n    except MemoryError: pass\n", frozenset({*TIMEOUT, S.MEMORY, S.ERROR, S.SIGNAL})),
    Hostile("mem_calloc", "malloc in C", "import ctypes\nl = ctypes.CDLL(None); l.calloc.restype = ctypes.c_void_p\nn = 0\nwhile n < 10000 and l.calloc(1, 1 << 20): n += 1\nprint('ESCAPED' if n > 2000 else 'limited')\n", stdout="limited\n"),
    Hostile("mem_dict", "a poisoned hash table", "class A:\n    def __hash__(self): return 1\nd = {}\nfor i in range(10 ** 6): d[A()] = 0\n", TIMEOUT),
    Hostile("mem_pipe", "fill pipes", "import os\nfor _ in range(25):\n    r, w = os.pipe(); os.set_blocking(w, False)\n    try:\n        while True: os.write(w, b'x' * 65536)\n    except BlockingIOError: pass\nprint('done')\n", stdout="done\n"),
    Hostile("mem_pipe_size", "enlarge pipes", "import fcntl, os\nr, w = os.pipe()\ntry: fcntl.fcntl(w, 1031, 1 << 20); print('ESCAPED')\nexcept OSError: print('refused')\n", stdout="refused\n"),
    Hostile("mem_thread_stacks", "stacks of a gigabyte", "import threading\nthreading.stack_size(1 << 30)\nt = threading.Thread(target=print)\nt.start()\n", frozenset({S.ERROR})),
    Hostile("recursion", "recurse in Python", "def f(): return f()\nf()\n", frozenset({S.ERROR})),
    Hostile("recursion_c", "recurse in C through repr", "import sys\nsys.setrecursionlimit(10 ** 8)\nd = {}\nfor _ in range(10 ** 6): d = {1: d}\nrepr(d)\n", ANY),
    Hostile("parser_depth", "a program of brackets", "eval('(' * 10 ** 5 + ')' * 10 ** 5)\n", frozenset({S.ERROR, S.MEMORY, S.SIGNAL})),
    Hostile("parser_huge", "compile a gigantic expression", "compile('+'.join(['1'] * 10 ** 6), 'x', 'eval')\n", ANY, wall_s=3.0),
    Hostile("pickle_bomb", "a pickle that asks for memory", "import pickle\npickle.loads(b'\\x80\\x04\\x8e\\xff\\xff\\xff\\xff\\x7f\\0\\0\\0.')\n", frozenset({S.ERROR, S.MEMORY})),
    Hostile("zip_bomb", "decompress without end", "import zlib\nd = zlib.compress(bytes(10 ** 7))\nx = []\nwhile True: x.append(zlib.decompress(d))\n", FULL),
    Hostile("decimal_bomb", "a decimal of a billion digits", "import decimal\ndecimal.getcontext().prec = 10 ** 9\nprint(len(str(decimal.Decimal(1) / 3)))\n", ANY),
    Hostile("gc_bomb", "a cycle per object and no end", "class A: pass\nwhile True:\n    a = A(); a.a = a\n", TIMEOUT),
    Hostile("stdin_wait", "wait for input that never comes", "import sys\nprint(repr(sys.stdin.read()))\n", stdout="''\n"),
]  # fmt: skip
