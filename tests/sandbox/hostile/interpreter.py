# ruff: noqa: E501  a program is one line of data
"""The interpreter itself: what runs after the program must not depend on anything the program can replace."""

from __future__ import annotations

from hostile import ANY, Hostile
from torl_mega.types import ExecutionStatus as S

OK = frozenset({S.OK})
CASES = [
    Hostile("os_exit_hook", "replace os._exit", "import os\nos._exit = lambda *a: None\nprint('x')\n", OK, stdout="x\n"),
    Hostile("builtins_gone", "empty the builtins", "import builtins\nfor n in list(vars(builtins)):\n    if n not in ('__build_class__',): delattr(builtins, n)\n", ANY),
    Hostile("print_replaced", "replace print and open", "import builtins\nbuiltins.print = builtins.open = None\n", OK),
    Hostile("sys_modules_gone", "empty sys.modules", "import sys\nsys.modules.clear()\n", ANY),
    Hostile("poison_torl", "reach the zygote's modules", "import sys\ntry:\n    import torl_mega.sandbox.jail.zygote; print('ESCAPED')\nexcept (ImportError, OSError): print('refused')\n", stdout="refused\n"),
    Hostile("poison_module", "shadow a library for the next snippet", "open('sympy.py', 'w').write('raise SystemExit(3)')\nopen('numpy.py', 'w').write('raise SystemExit(3)')\n", OK),
    Hostile("poison_sitecustomize", "leave a sitecustomize", "open('sitecustomize.py', 'w').write('print(1)')\nopen('usercustomize.py', 'w').write('print(1)')\n", OK),
    Hostile("patch_sympy", "change sympy in memory for the next snippet", "import sympy\nsympy.solve = lambda *a: 'poisoned'\nsympy.Integer.__add__ = None\n", OK),
    Hostile("frames", "walk up the frames and call the zygote", "import sys\nf = sys._getframe()\nwhile f.f_back: f = f.f_back\nprint(sorted(f.f_globals)[:1])\n", ANY),
    Hostile("frames_call", "call everything found in the frames", "import sys\nf = sys._getframe()\nwhile f:\n    for k, v in list(f.f_globals.items()):\n        if callable(v) and k not in ('print',):\n            try: v()\n            except BaseException: pass\n    f = f.f_back\n", ANY),
    Hostile("gc_control", "find sockets through the garbage collector", "import gc, socket\nfor o in gc.get_objects():\n    if isinstance(o, socket.socket):\n        try: o.send(b'{\"id\": 1, \"code\": 0, \"killed\": \"\", \"memory\": false}'); print('ESCAPED')\n        except OSError: pass\nprint('end')\n", ANY),
    Hostile("gc_mmap", "find shared memory through the garbage collector", "import gc, mmap\nn = 0\nfor o in gc.get_objects():\n    for r in gc.get_referents(o):\n        if type(r) is mmap.mmap: n += 1\nprint('end')\n", ANY),
    Hostile("flag_forge", "set the MemoryError flag and leave with 0", "import sys, mmap\nf = sys._getframe()\nwhile f:\n    for v in list(f.f_locals.values()):\n        if type(v) is mmap.mmap: v[0] = 0x4D\n    f = f.f_back\nprint('x')\n", OK, stdout="x\n"),
    Hostile("trace", "a trace function that raises for ever", "import sys\ndef t(*a): raise ValueError\nsys.settrace(t)\nsys.setprofile(t)\n", ANY),
    Hostile("raise_in_handler", "a timer that raises during the end", "import signal\ndef h(*a): raise KeyboardInterrupt\nsignal.signal(signal.SIGALRM, h)\nsignal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)\n", ANY),
    Hostile("exit_in_thread", "leave from a thread", "import os, threading\nt = threading.Thread(target=os._exit, args=(7,))\nt.start(); t.join()\n", frozenset({S.ERROR})),
    Hostile("async_exc", "throw into the main thread", "import ctypes, threading\nm = threading.main_thread().ident\ndef f():\n    while True: ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(m), ctypes.py_object(SystemExit))\nthreading.Thread(target=f, daemon=True).start()\nwhile True: pass\n", ANY),
    Hostile("system_exit_str", "sys.exit with a text", "import sys\nsys.exit('no')\n", frozenset({S.ERROR})),
    Hostile("system_exit_evil", "an exit code that is an evil object", "class C(int):\n    def __and__(self, o):\n        while True: pass\nraise SystemExit(C(5))\n", ANY),
    Hostile("keyboard_interrupt", "raise KeyboardInterrupt", "raise KeyboardInterrupt\n", frozenset({S.ERROR})),
    Hostile("generator_exit", "raise GeneratorExit", "raise GeneratorExit\n", frozenset({S.ERROR})),
    Hostile("fatal", "a fatal interpreter error", "import ctypes\nctypes.pythonapi.Py_FatalError(b'x')\n", ANY),
    Hostile("code_object", "a code object of rubbish", "f = lambda: 0\nf.__code__ = f.__code__.replace(co_code=bytes(range(256)))\nf()\n", ANY),
    Hostile("none_refs", "free None", "import ctypes\nfor _ in range(10 ** 6): ctypes.pythonapi.Py_DecRef(ctypes.py_object(None))\n", ANY),
    Hostile("small_ints", "change the number 1", "import ctypes\nctypes.c_int.from_address(id(1) + 24).value = 2\n", ANY),
    Hostile("random_state", "numbers drawn by another snippet", "import random, numpy\nprint(random.random(), numpy.random.rand())\n", OK),
    Hostile("argv_env", "an ordinary look", "import sys, os\nprint(sys.argv, __name__, os.path.basename(__file__), 'TORL_SECRET' in os.environ)\n", OK, stdout="['main.py'] __main__ main.py False\n"),
    Hostile("atexit_clear", "exit handlers that raise", "import atexit\n@atexit.register\ndef f(): raise SystemExit(9)\n", ANY),
    Hostile("import_hook", "an import hook that raises", "import sys\nclass F:\n    def find_spec(self, *a): raise MemoryError\nsys.meta_path.insert(0, F())\n", ANY),
]  # fmt: skip
