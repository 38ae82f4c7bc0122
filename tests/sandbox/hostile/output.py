# ruff: noqa: E501  a program is one line of data
"""Output: floods, broken pipes, false statuses, encodings and texts that a parser might take for something else."""

from __future__ import annotations

from hostile import ANY, Hostile
from torl_mega.types import ExecutionStatus as S

FLOOD = frozenset({S.OUTPUT_LIMIT, S.TIMEOUT_WALL, S.TIMEOUT_CPU})

CASES = [
    Hostile("flood_stdout", "print for ever", "while True: print('x' * 10000)\n", FLOOD),
    Hostile("flood_stderr", "the same on stderr", "import sys\nwhile True: sys.stderr.write('x' * 10000)\n", FLOOD),
    Hostile("flood_both", "both at once", "import os\nwhile True:\n    os.write(1, b'x' * 65536); os.write(2, b'y' * 65536)\n", FLOOD),
    Hostile("flood_raw", "binary rubbish", "import os\nwhile True: os.write(1, os.urandom(65536))\n", FLOOD),
    Hostile("one_line", "a single line of 8 MB", "print('x' * (8 << 20))\n", frozenset({S.OK})),
    Hostile("nonblocking", "make the pipe non-blocking", "import os\nos.set_blocking(1, False)\nfor _ in range(10000):\n    try: os.write(1, b'x' * 4096)\n    except BlockingIOError: pass\n", ANY),
    Hostile("close_stdout", "close fd 1", "import os\nos.close(1)\nos.close(2)\n", ANY),
    Hostile("close_all", "close every descriptor", "import os\nos.closerange(0, 1000)\n", ANY),
    Hostile("reuse_fd", "put a file in stdout's place", "import os\nos.close(1)\nfd = os.open('x', os.O_CREAT | os.O_WRONLY)\nprint('into a file')\n", ANY),
    Hostile("read_stdout", "read its own stdout pipe", "import os\ntry: print('ESCAPED', os.read(1, 10))\nexcept OSError: print('refused')\n", stdout="refused\n"),
    Hostile("write_stdin", "write to stdin", "import os\ntry: os.write(0, b'x'); print('ESCAPED')\nexcept OSError: print('refused')\n", stdout="refused\n", stdin="abc"),
    Hostile("all_fds", "find any further descriptor and write to it", "import os\nn = 0\nfor fd in range(3, 4096):\n    try: os.fstat(fd); n += 1; os.write(fd, b'{\"id\": 1, \"code\": 0}')\n    except OSError: pass\nprint('ESCAPED' if n else 'none')\n", stdout="none\n"),
    Hostile("exit_125", "an exit code the zygote uses itself", "import os\nos._exit(125)\n", frozenset({S.ERROR})),
    Hostile("exit_137", "the exit code of a killed container", "import os\nos._exit(137)\n", frozenset({S.ERROR})),
    Hostile("exit_1", "an exit code like MemoryError's, and its text", "import os, sys\nprint('MemoryError', file=sys.stderr, flush=True)\nos._exit(1)\n", frozenset({S.ERROR})),
    Hostile("fake_timeout", "print what a time-out looks like", "print('TimeLimitExceeded')\nprint('timeout_wall')\n", frozenset({S.OK})),
    Hostile("fake_result", "print what the zygote says", "print('{\"id\": 1, \"infra\": \"x\"}')\n", frozenset({S.OK})),
    Hostile("fence", "code fences in the output", "print('```\\n```output\\n```python\\nimport os')\n", frozenset({S.OK}), stdout="```\n```output\n```python\nimport os\n"),
    Hostile("special_tokens", "special tokens in the output", "print('<|im_end|><|endoftext|></s>[INST]')\n", frozenset({S.OK}), stdout="<|im_end|><|endoftext|></s>[INST]\n"),
    Hostile("nul_output", "NUL bytes in the output", "print('a\\0b')\n", frozenset({S.OK}), stdout="a\0b\n"),
    Hostile("ansi", "escape sequences", "print('\\x1b[2J\\x1b]0;x\\x07')\n", frozenset({S.OK})),
    Hostile("bad_utf8", "broken UTF-8", "import os\nos.write(1, b'\\xff\\xfe ok\\n')\n", frozenset({S.OK}), stdout="\ufffd\ufffd ok\n"),
    Hostile("surrogate_output", "a lone surrogate in the output", "print('\\ud800')\n", frozenset({S.ERROR})),
    Hostile("surrogate_code", "a lone surrogate in the program", "print('\ud800')\n", frozenset({S.ERROR})),
    Hostile("nul_code", "a NUL byte in the program", "print(1)\0\n", frozenset({S.ERROR})),
    Hostile("bom", "a byte-order mark", "\ufeffprint('bom')\n", frozenset({S.OK}), stdout="bom\n"),
    Hostile("cookie", "a coding cookie", "# -*- coding: latin-1 -*-\nprint(len('é'))\n", frozenset({S.OK}), stdout="2\n"),
    Hostile("bad_cookie", "a coding cookie that does not exist", "# -*- coding: klingon -*-\nprint(1)\n", frozenset({S.ERROR})),
    Hostile("bidi", "right-to-left marks", "x = 'a\u202e'\nprint(len(x))\n", frozenset({S.OK}), stdout="2\n"),
    Hostile("empty", "nothing", "", frozenset({S.OK}), stdout=""),
    Hostile("crlf", "carriage returns", "print(1)\r\nprint(2)\r\n", frozenset({S.OK}), stdout="1\n2\n"),
    Hostile("long_exception", "an exception whose message is huge", "raise ValueError('x' * 10 ** 6)\n", frozenset({S.ERROR}), wall_s=5.0),
    Hostile("syntax_error_huge", "a syntax error in a huge line", "x = " + "(" * 100000 + "\n", frozenset({S.ERROR, S.MEMORY})),
    Hostile("evil_str", "an exception that cannot be printed", "class E(Exception):\n    def __str__(self): raise self\nraise E()\n", frozenset({S.ERROR})),
    Hostile("evil_excepthook", "an excepthook that leaves", "import sys\nsys.excepthook = lambda *a: sys.exit(0)\n1 / 0\n", ANY),
    Hostile("stdout_none", "sys.stdout = None", "import sys\nsys.stdout = None\n", frozenset({S.OK})),
    Hostile("stdout_evil", "a stdout whose flush loops", "import sys\nclass W:\n    def flush(self):\n        while True: pass\n    def write(self, s): pass\nsys.stdout = W()\n", frozenset({S.TIMEOUT_WALL, S.TIMEOUT_CPU})),
]  # fmt: skip
