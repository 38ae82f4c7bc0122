# ruff: noqa: E501  a program is one line of data
"""How a program ends, what it says then, and what it leaves in the interpreter for the next one."""

from __future__ import annotations

from hostile import ANY, TIMEOUT, Hostile
from torl_mega.types import ExecutionStatus as S

OK = frozenset({S.OK})
ERROR = frozenset({S.ERROR})
FLOOD = frozenset({S.OUTPUT_LIMIT, *TIMEOUT})

CASES = [
    Hostile("str_hangs", "an exception whose text never comes", "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E\n", TIMEOUT),
    Hostile("repr_hangs", "an exit code whose text never comes", "class C:\n    def __str__(self):\n        while True: pass\nraise SystemExit(C())\n", TIMEOUT),
    Hostile("str_floods", "an exception of a gigabyte", "class E(Exception):\n    def __str__(self): return 'x' * (1 << 29)\nraise E\n", ANY),
    Hostile("notes", "an exception with 10,000 notes", "e = ValueError('x')\nfor i in range(10 ** 4): e.add_note('n')\nraise e\n", ERROR, wall_s=3.0),
    Hostile("cause_ring", "an exception that causes itself", "a, b = ValueError('a'), ValueError('b')\na.__cause__, b.__cause__ = b, a\nraise a\n", ERROR),
    Hostile("cause_chain", "a chain of 100,000 causes", "e = None\nfor _ in range(10 ** 5):\n    n = ValueError(); n.__cause__ = e; e = n\nraise e\n", ANY),
    Hostile("group_deep", "a deep exception group", "e = ValueError()\nfor _ in range(500): e = ExceptionGroup('g', [e])\nraise e\n", ERROR),
    Hostile("exit_big", "an exit code that wraps to 0", "import sys\nsys.exit(256)\n", OK),
    Hostile("exit_negative", "a negative exit code", "import sys\nsys.exit(-1)\n", ERROR),
    Hostile("exit_float", "a float as exit code", "import sys\nsys.exit(0.0)\n", ERROR),
    Hostile("exit_tuple", "a tuple as exit code", "raise SystemExit(1, 2)\n", ERROR),
    Hostile("exit_subclass", "a subclass of SystemExit that says 0", "class E(SystemExit):\n    code = 0\nraise E(3)\n", frozenset({S.OK, S.ERROR})),
    Hostile("exit_code_raises", "an exit code that cannot be read", "class E(SystemExit):\n    @property\n    def code(self): raise ValueError\nraise E\n", ERROR),
    Hostile("base_exception", "an exception that is no Exception", "class E(BaseException): pass\nraise E\n", ERROR),
    Hostile("memory_error_fake", "raise MemoryError without need", "raise MemoryError\n", frozenset({S.MEMORY})),
    Hostile("traceback_fake", "print a traceback and succeed", "import sys\nsys.stderr.write('Traceback (most recent call last):\\nMemoryError\\n')\n", OK),
    Hostile("traceback_replaced", "replace the traceback module", "import traceback\ntraceback.print_exception = traceback.TracebackException = None\n1 / 0\n", ANY),
    Hostile("linecache_evil", "a source line that floods", "import linecache\nlinecache.getline = linecache.getlines = lambda *a: 'x' * 10 ** 9\n1 / 0\n", ANY),
    Hostile("stderr_gone", "fail without a stderr", "import sys\nsys.stderr = None\n1 / 0\n", ERROR, stdout=""),
    Hostile("stderr_evil", "a stderr that raises SystemExit(0)", "import sys\nclass W:\n    def write(self, s): raise SystemExit(0)\nsys.stderr = W()\n1 / 0\n", ANY),
    Hostile("stdout_closed", "close stdout and end well", "import sys\nprint('x')\nsys.stdout.close()\n", OK, stdout="x\n"),
    Hostile("stdout_detached", "detach stdout", "import sys\nprint('x', flush=True)\nsys.stdout.detach()\n", ANY),
    Hostile("stdout_swapped", "stdin, stdout and stderr in a ring", "import os\na = os.dup(1)\nos.dup2(2, 1); os.dup2(a, 2); os.dup2(0, 1)\nprint('x')\n", ANY),
    Hostile("truncate_pipe", "truncate and seek the output", "import os\nfor f in (lambda: os.ftruncate(1, 0), lambda: os.lseek(1, 0, 0), lambda: os.fsync(1)):\n    try: f()\n    except OSError: pass\nprint('x')\n", OK, stdout="x\n"),
    Hostile("single_bytes", "single bytes without end", "import os\nwhile True: os.write(1, b'x')\n", FLOOD),
    Hostile("exit_flood", "flood in an exit handler", "import atexit, os\ndef f():\n    while True: os.write(1, b'x' * 65536)\natexit.register(f)\n", FLOOD),
    Hostile("thread_flood", "flood from a thread while it ends", "import os, threading\ndef f():\n    while True: os.write(1, b'x' * 65536)\nthreading.Thread(target=f).start()\n", FLOOD),
    Hostile("daemon_prints", "a daemon thread that prints during the end", "import threading\ndef f():\n    while True: print('x' * 100)\nthreading.Thread(target=f, daemon=True).start()\n", ANY),
    Hostile("threads_raise", "a hundred threads that raise", "import threading\ndef f(): 1 / 0\nt = [threading.Thread(target=f) for _ in range(30)]\n[x.start() for x in t]; [x.join() for x in t]\nprint('end')\n", OK, stdout="end\n"),
    Hostile("thread_memory_error", "MemoryError in a thread only", "import threading\ndef f(): raise MemoryError\nt = threading.Thread(target=f); t.start(); t.join()\nprint('x')\n", OK, stdout="x\n"),
    Hostile("shutdown_replaced", "replace what waits for threads", "import threading\nthreading._shutdown = None\nthreading._main_thread = None\nprint('x')\n", ANY),
    Hostile("atexit_grows", "an exit handler that registers another", "import atexit\ndef f(): atexit.register(f)\natexit.register(f)\nprint('x', flush=True)\n", ANY),
    Hostile("unraisable", "a finaliser that raises, and a hook that does", "import sys\ndef h(*a): raise SystemExit(0)\nsys.unraisablehook = h\nclass A:\n    def __del__(self): 1 / 0\nfor _ in range(1000): A()\nprint('x')\n", OK, stdout="x\n"),
    Hostile("audit_hook", "an audit hook that refuses everything", "import sys\ndef h(*a): raise RuntimeError\nsys.addaudithook(h)\n", ANY),
    Hostile("recursion_limit", "a recursion limit of almost nothing", "import sys\nsys.setrecursionlimit(len(__import__('inspect').stack()) + 6)\n1 / 0\n", ANY),
    Hostile("switch_interval", "never switch threads", "import sys, threading\nsys.setswitchinterval(10 ** 9)\ndef f():\n    while True: pass\nthreading.Thread(target=f).start()\n", TIMEOUT),
    Hostile("interrupt_main", "interrupt the end again and again", "import _thread, threading\ndef f():\n    while True: _thread.interrupt_main()\nthreading.Thread(target=f, daemon=True).start()\n", ANY),
    Hostile("main_replaced", "replace the main module", "import sys, types\nsys.modules['__main__'] = types.ModuleType('x')\nprint(1)\n", OK, stdout="1\n"),
    Hostile("import_replaced", "replace the import", "import builtins\nbuiltins.__import__ = lambda *a, **k: (_ for _ in ()).throw(SystemExit(0))\n1 / 0\n", ANY),
    Hostile("codec_evil", "an error handler that loops", "import codecs\ndef h(e):\n    while True: pass\ncodecs.register_error('surrogateescape', h)\nprint('\\ud800')\n", frozenset({S.ERROR, *TIMEOUT})),
    Hostile("gc_callback", "a callback of the collector that raises", "import gc\ngc.callbacks.append(lambda *a: 1 / 0)\ngc.set_debug(gc.DEBUG_LEAK)\ngc.collect()\n", ANY),
    Hostile("weakref_loop", "finalisers without end", "import weakref\nclass A: pass\ndef f(): weakref.finalize(A(), f)\nf()\n", ANY),
    Hostile("generator_undead", "a generator that will not end", "def g():\n    while True:\n        try: yield\n        except GeneratorExit: pass\nx = g(); next(x)\ndel x\nprint('x')\n", OK, stdout="x\n"),
    Hostile("coroutine_left", "a coroutine nobody waits for", "async def f(): pass\nf()\nprint('x')\n", OK, stdout="x\n"),
    Hostile("form_feed", "form feeds and mixed ends of line", "\x0cprint(1)\r\nif 1:\n\tprint(2)\n\x0c\nprint(3)\r", OK, stdout="1\n2\n3\n"),
    Hostile("tabs_mixed", "tabs and spaces", "if 1:\n\tx = 1\n        y = 2\n", ERROR),
    Hostile("no_newline", "a comment without an end of line", "print(1) # \\", OK, stdout="1\n"),
    Hostile("utf7", "a program in UTF-7", "# coding: utf-7\n+AHAAcgBpAG4AdA-(1)\n", frozenset({S.OK, S.ERROR})),
    Hostile("utf16", "a program that says it is UTF-16", "# coding: utf-16\nprint(1)\n", ERROR),
    Hostile("homoglyphs", "identifiers that become others", "𝐩𝐫𝐢𝐧𝐭(1)\n", OK, stdout="1\n"),
    Hostile("frame_fake", "frames of the pool's protocol in the output", "import os, struct\nos.write(1, struct.pack('<II', 2, 0) + b'{}' + b'\\x00\\x00\\x00\\x20' * 10)\n", OK),
    Hostile("http_fake", "an HTTP answer in the output", "print('HTTP/1.1 200 OK\\r\\n\\r\\n{\"status\": \"Success\"}')\n", OK),
    # what follows changes the process and the libraries; the look after each case must find none of it
    Hostile("leave_umask", "change umask, folder, priority and mask", "import os, signal\nos.umask(0o777); os.chdir('/'); os.nice(5)\nsignal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\n", OK),
    Hostile("leave_environment", "change the environment and the path", "import os, sys\nos.environ.update(PYTHONPATH='/tmp', LD_PRELOAD='/tmp/x.so', LANG='tr_TR', TZ='Mars/Olympus')\nsys.path.insert(0, '/tmp'); sys.argv[:] = ['x'] * 1000\n", OK),
    Hostile("leave_locale", "change locale and number formats", "import locale, decimal, warnings\ntry: locale.setlocale(locale.LC_ALL, 'C')\nexcept locale.Error: pass\ndecimal.getcontext().prec = 1\ndecimal.DefaultContext.prec = 1\nwarnings.simplefilter('error')\n", OK),
    Hostile("leave_numpy", "change numpy", "import numpy as np\nnp.seterr(all='raise'); np.set_printoptions(precision=0)\nnp.arange = np.array = np.sum = None\nnp.random.seed(0)\n", OK),
    Hostile("leave_sympy", "change sympy's caches", "import sympy\nfrom sympy.core import cache\ncache.clear_cache()\nsympy.Integer.__eq__ = lambda *a: True\nsympy.core.numbers.One.p = 2\nsympy.S.Pi.__class__.__add__ = None\n", OK),
    Hostile("leave_builtins", "change the builtins", "import builtins\nbuiltins.len = lambda x: 7\nbuiltins.sum = builtins.sorted = builtins.int = None\n", OK),
    Hostile("leave_types", "change a built-in type by its memory", "import gc\nd = gc.get_referents(str.__dict__)[0]\nd['upper'] = lambda s: 'poisoned'\nd['evil'] = 1\n", ANY),
    Hostile("leave_signals", "leave handlers behind", "import signal\nfor s in (2, 13, 14, 15): signal.signal(s, signal.SIG_IGN)\nsignal.alarm(1)\n", OK),
    Hostile("leave_hooks", "leave hooks behind", "import sys\nsys.settrace(lambda *a: None); sys.setprofile(lambda *a: None)\nsys.meta_path.clear(); sys.path_hooks.clear()\nsys.displayhook = sys.excepthook = None\nsys.setrecursionlimit(50)\n", ANY),
    Hostile("leave_bytecode", "leave poisoned byte code", "import os, sys\nsys.dont_write_bytecode = False\nopen('math.py', 'w').write('sqrt = None')\nsys.modules.pop('math', None)\nos.makedirs('__pycache__', exist_ok=True)\n", OK),
]  # fmt: skip
