"""Runs one program in the confined child so that it looks like a fresh `python main.py`. Never returns.

From `exec` on the interpreter belongs to foreign code: builtins, `sys`, `os` and signal handlers may all have been
replaced. Whatever is needed to end the process is therefore bound to locals before. What the process says about itself
counts for nothing except one thing: a flag for an uncaught MemoryError, by which a program can only blame itself.
"""

from __future__ import annotations

import _signal  # pyright: ignore[reportMissingImports]
import builtins
import codecs
import ctypes
import gc
import io
import linecache
import mmap
import os
import random
import sys
import threading
import traceback
import types
from hashlib import blake2b

NAME = "main.py"
MEMORY_FLAG = 0x4D
_MAX_SOURCE = 4 << 20
_libc = ctypes.CDLL(None)
_ENV = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "USER": "user"}
_BOX_ENV = ("HOME", "TMPDIR", "MPLCONFIGDIR")


def set_environment(box: str) -> None:
    """Replaces the environment, once in the zygote; `box` is the working folder (tier A) or that of all snippets' folders."""
    os.environ.clear()
    os.environ.update({**_ENV, **dict.fromkeys(_BOX_ENV, box)})


def write_program(code: bytes) -> None:
    """Writes main.py, for programs that read their own source, unless it is so large that it would fill the folder."""
    if len(code) <= _MAX_SOURCE:
        with open(NAME, "wb") as f:
            f.write(code)


def reset_signals() -> None:
    """Restores the handlers of a new interpreter. Uses `_signal`, as the enums of `signal` cost 0.2 ms of copied pages."""
    _signal.set_wakeup_fd(-1)
    for number in (_signal.SIGCHLD, _signal.SIGTERM, _signal.SIGHUP):
        _signal.signal(number, _signal.SIG_DFL)
    _signal.signal(_signal.SIGINT, _signal.default_int_handler)
    for number in (_signal.SIGPIPE, _signal.SIGXFSZ):  # as Python itself does at start
        _signal.signal(number, _signal.SIG_IGN)
    _signal.pthread_sigmask(_signal.SIG_SETMASK, [])


def reset_interpreter(box: str, code: bytes, *, deterministic: bool) -> types.ModuleType:
    """Sets environment, streams, modules and random state as in a new interpreter. Returns the new `__main__`."""
    for name in _BOX_ENV:
        if os.environ.get(name) != box:
            os.environ[name] = box
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        stream = _text_stream(fd, name, mode)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv[:] = [NAME]
    sys.path.insert(0, box)
    sys.path_importer_cache.pop(box, None)
    _seed(blake2b(code, digest_size=16).digest() if deterministic else os.urandom(16))
    if len(code) <= _MAX_SOURCE:
        text = code.removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace")
        lines = text.splitlines(keepends=True)
        linecache.cache[NAME] = (len(text), None, lines, NAME)  # None: never checked against the disk
    main = types.ModuleType("__main__")
    main.__dict__.update({"__builtins__": builtins, "__file__": os.path.join(box, NAME), "__annotations__": {}})
    sys.modules["__main__"] = main
    return main


def _text_stream(fd: int, name: str, mode: str) -> io.TextIOWrapper:
    raw = io.FileIO(fd, mode, closefd=False)
    if mode == "r":
        return io.TextIOWrapper(io.BufferedReader(raw), encoding="utf-8", errors="surrogateescape")
    errors = "backslashreplace" if name == "stderr" else "surrogateescape"
    buffer = io.BufferedWriter(raw, 8192 if name == "stderr" else 65536)
    return io.TextIOWrapper(buffer, encoding="utf-8", errors=errors, line_buffering=name == "stderr")


def _seed(entropy: bytes) -> None:
    """Seeds random, numpy and sympy: without it every child draws the same numbers, the zygote's."""
    number = int.from_bytes(entropy, "little")
    random.seed(number)
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        numpy.seed(number & 0xFFFFFFFF)
    sympy = sys.modules.get("sympy.core.random")
    if sympy is not None:
        sympy.seed(number)


def run(main: types.ModuleType, code: bytes, flags: mmap.mmap) -> None:
    """Compiles and runs `code` as `__main__`, then ends the process with Python's own exit code. Does not return."""
    leave, say, excepthook = os._exit, traceback.print_exception, sys.excepthook
    join_threads, flush_c = threading._shutdown, _libc.fflush  # type: ignore[attr-defined]
    memory_error, flag = MemoryError, MEMORY_FLAG
    status = 1
    try:
        gc.enable()
        try:
            exec(compile(code, NAME, "exec", dont_inherit=True), main.__dict__)  # bytes: BOM and coding cookie count
            status = 0
        except SystemExit as e:
            status = _exit_status(e.code)
        except BaseException as e:
            status = 1
            if isinstance(e, memory_error):
                flags[0] = flag
            _report(e, excepthook, say)
        status = _finish(join_threads, status)
        flush_c(None)
    except BaseException:
        status = status or 1
    finally:
        while True:
            leave(status)


def _exit_status(code: object) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    print(code, file=sys.stderr)
    return 1


def _report(error: BaseException, excepthook: object, say: object) -> None:
    """Prints the traceback as Python does, without the frames of this module."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    error = error.with_traceback(trace)
    hook = sys.excepthook
    if hook is excepthook:
        if sys.stderr is None:
            return  # print_exception() would take stdout instead
        say(type(error), error, trace)  # type: ignore[operator]
    else:
        hook(type(error), error, trace)


def _finish(join_threads: object, status: int) -> int:
    """What Python does at exit, in its order: join threads, atexit, flush. A lost flush is exit code 120."""
    import atexit

    join_threads()  # type: ignore[operator]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
        except BaseException:
            status = status or 120
    return status
