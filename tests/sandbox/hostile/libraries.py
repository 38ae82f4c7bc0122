# ruff: noqa: E501  a program is one line of data
"""The standard library and the maths libraries: loops that check no signal, bombs in small data, and doors they open."""

from __future__ import annotations

from hostile import ANY, TIMEOUT, Hostile
from hostile.processes import refused
from torl_mega.types import ExecutionStatus as S

ERROR = frozenset({S.ERROR})
BOMB = frozenset({S.MEMORY, *TIMEOUT})

CASES = [
    Hostile("int_pow", "an integer of 10^10 bits", "x = 3 ** (10 ** 10)\n", BOMB),
    Hostile("int_parse", "parse ten million digits", "import sys\nsys.set_int_max_str_digits(0)\nint('9' * 10 ** 7)\n", TIMEOUT),
    Hostile("int_print", "print ten million digits", "import sys\nsys.set_int_max_str_digits(0)\nprint(len(str(7 ** (10 ** 7))))\n", ANY),
    Hostile("factorial", "a factorial without end", "import math\nmath.factorial(10 ** 9)\n", BOMB),
    Hostile("comb", "a binomial without end", "import math\nmath.comb(10 ** 9, 5 * 10 ** 8)\n", BOMB),
    Hostile("range_list", "a list of ten billion", "list(range(10 ** 10))\n", BOMB),
    Hostile("format_width", "a field of a hundred gigabytes", "format(1, '>99999999999')\n", frozenset({S.ERROR, S.MEMORY})),
    Hostile("sorted_key", "a sort whose key grows", "x = []\nsorted(range(10 ** 6), key=lambda i: x.append('y' * 10 ** 5) or i)\n", BOMB),
    Hostile("permutations", "walk through permutations in C", "import itertools, collections\ncollections.deque(itertools.permutations(range(30)), maxlen=0)\n", TIMEOUT),
    Hostile("regex_sub", "backtracking in a substitution", "import re\nre.sub(r'(x+x+)+y', '', 'x' * 50)\n", TIMEOUT),
    Hostile("regex_compile", "a pattern that explodes", "import re\nre.compile('(' * 90 + 'a?' * 100 + ')' * 90 + '{1000}{1000}')\n", ANY),
    Hostile("fnmatch", "a glob that explodes", "import fnmatch\nfnmatch.fnmatch('a' * 60, '*a' * 40 + 'b')\n", ANY),
    Hostile("pbkdf2", "a key derivation of 10^9 rounds", "import hashlib\nhashlib.pbkdf2_hmac('sha256', b'x', b'y', 2 * 10 ** 9)\n", TIMEOUT),
    Hostile("scrypt", "a key derivation of 16 GB", "import hashlib\nhashlib.scrypt(b'x', salt=b'y', n=1 << 24, r=8, p=1, maxmem=(1 << 31) - 1)\n", ANY),
    Hostile("lzma_bomb", "a decompressor with a huge dictionary", "import lzma\nlzma.compress(b'x', filters=[{'id': lzma.FILTER_LZMA2, 'dict_size': 1536 << 20}])\n", ANY),
    Hostile("sqlite_loop", "a recursion in SQL", "import sqlite3\nsqlite3.connect(':memory:').execute('with recursive c(x) as (select 1 union all select x + 1 from c) select count(*) from c').fetchall()\n", TIMEOUT),
    Hostile("sqlite_memory", "a blob of gigabytes", "import sqlite3\nsqlite3.connect(':memory:').execute('select length(hex(zeroblob(900000000)))').fetchall()\n", ANY),
    Hostile("xml_laughs", "a billion laughs", "import xml.etree.ElementTree as e\nd = ''.join(f'<!ENTITY a{i} \"{(\"&a%d;\" % (i - 1)) * 10 if i else \"lol\" * 10}\">' for i in range(12))\ne.fromstring(f'<!DOCTYPE x [{d}]><x>&a11;</x>')\n", ANY),
    Hostile("json_depth", "JSON of brackets", "import json\njson.loads('[' * 10 ** 6)\n", frozenset({S.ERROR, S.SIGNAL})),
    Hostile("literal_depth", "a literal of brackets", "import ast\nast.literal_eval('-' * 10 ** 6 + '1')\n", frozenset({S.ERROR, S.MEMORY, S.SIGNAL})),
    Hostile("nested_code", "a program of nested blocks", "exec('\\n'.join(' ' * i + 'if 1:' for i in range(99)) + '\\n' + ' ' * 99 + 'pass')\n", ANY),
    Hostile("nested_calls", "a program of nested calls", "f = abs\n" + "f(" * 1000 + "1" + ")" * 1000 + "\n", ANY),
    Hostile("huge_program", "a program of 12 MB", "x = '" + "y" * (12 << 20) + "'\nprint(len(x))\n", frozenset({S.OK}), stdout=f"{12 << 20}\n", wall_s=5.0),
    Hostile("many_lines", "a program of 200,000 lines", "x = 1\n" * 200_000 + "print(x)\n", ANY, wall_s=3.0),
    Hostile("deepcopy_ring", "a copy of what holds itself a million times", "import copy\nx = []\nx.append(x)\ny = x\nfor _ in range(10 ** 5): y = [y]\ncopy.deepcopy(y)\n", frozenset({S.ERROR})),
    Hostile("deep_free", "free a chain of a million", "x = None\nfor _ in range(10 ** 6): x = (x,)\ndel x\nprint('fine')\n", frozenset({S.OK, *TIMEOUT}), wall_s=3.0),
    Hostile("descriptor_depth", "recursion in C through attribute access", "import sys\nsys.setrecursionlimit(10 ** 9)\nclass A:\n    def __getattr__(self, n): return getattr(self, n + 'x')\nA().a\n", ANY),
    Hostile("ctypes_recursion", "recursion through callbacks", "import ctypes, sys\nsys.setrecursionlimit(10 ** 9)\n@ctypes.CFUNCTYPE(None)\ndef f(): f()\nf()\n", ANY),
    Hostile("sympy_prime", "a prime without end", "import sympy\nsympy.prime(10 ** 12)\n", ANY),
    Hostile("sympy_expand", "an expansion without end", "import sympy\nx, y, z = sympy.symbols('x y z')\n((x + y + z + 1) ** 300).expand()\n", BOMB),
    Hostile("sympy_integrate", "an integral without end", "from sympy import *\nx = symbols('x')\nintegrate(sqrt(1 + sin(x) ** 3) * log(x) ** x, x)\n", ANY),
    Hostile("sympy_sympify", "code in an expression", "import sympy\nprint(sympy.sympify(\"__import__('os').getcwd() and open('@FILE@').read()\"))\n", ERROR),
    refused("sympy_preview", "run LaTeX", "import sympy\nsympy.preview(sympy.Symbol('x'), viewer='file', filename='x.png')"),
    refused("sympy_autowrap", "compile C", "from sympy.utilities.autowrap import autowrap\nimport sympy\nautowrap(sympy.Symbol('x') + 1, backend='cython', tempdir='.')"),
    Hostile("numpy_eig", "a decomposition without end", "import numpy as np\nnp.linalg.svd(np.random.rand(3000, 3000))\n", BOMB),
    Hostile("numpy_strides", "write out of bounds", "import numpy as np\na = np.lib.stride_tricks.as_strided(np.zeros(1), shape=(1 << 40,), strides=(8,))\na[1 << 38] = 1\n", frozenset({S.SIGNAL})),
    Hostile("numpy_heap", "overrun the heap", "import numpy as np\na = np.lib.stride_tricks.as_strided(np.zeros(8), shape=(1 << 20,))\na[:] = 1e300\nb = [bytearray(100) for _ in range(10 ** 4)]\n", ANY),
    Hostile("numpy_kron", "products of products", "import numpy as np\na = np.ones((50, 50))\nwhile True: a = np.kron(a, a)\n", BOMB),
    Hostile("numpy_threads", "decompositions in many threads", "import numpy as np, threading\ndef f():\n    while True: np.linalg.svd(np.random.rand(300, 300))\nfor _ in range(30): threading.Thread(target=f).start()\n", ANY),
    refused("numpy_memmap", "map a file of the pool's user", "import numpy as np\nnp.memmap('@FILE@', mode='r+')"),
    refused("numpy_fromfile", "read it", "import numpy as np\nnp.fromfile('@FILE@', np.uint8)"),
    refused("sqlite_attach", "make a database where it must not", "import sqlite3\nsqlite3.connect('@DIR@/x.db').execute('create table a (b)')"),
    refused("sqlite_extension", "load a library into SQLite", "import sqlite3\nc = sqlite3.connect(':memory:')\nc.enable_load_extension(True)\nc.load_extension('/tmp/x')"),
    refused("zip_traversal", "unpack out of the folder", "import io, tarfile\nb = io.BytesIO()\nt = tarfile.open(fileobj=b, mode='w')\ni = tarfile.TarInfo('../../../../../../..@DIR@/evil'); i.size = 1\nt.addfile(i, io.BytesIO(b'x')); t.close(); b.seek(0)\ntarfile.open(fileobj=b).extractall('.', filter='fully_trusted')"),
    Hostile("rmtree_root", "delete everything it can", "import shutil\nshutil.rmtree('/', ignore_errors=True)\nprint('done')\n", ANY, wall_s=3.0),
    Hostile("rmtree_canary", "delete the user's folder", "import os, shutil\nshutil.rmtree(os.path.dirname('@FILE@'), ignore_errors=True)\nprint('done')\n"),
    Hostile("walk_for_secrets", "search every file it can find", "import os\nword = 'canary-' + 'secret'\nfor d, s, f in os.walk('/'):\n    if d.startswith(('/usr', '/lib', '/opt')): s[:] = []; continue\n    for n in f[:50]:\n        p = os.path.join(d, n)\n        if p == os.path.join(os.getcwd(), 'main.py'): continue\n        try:\n            fd = os.open(p, os.O_RDONLY | os.O_NONBLOCK)\n            if word.encode() in os.read(fd, 1 << 16): print('ESCAPED', p)\n            os.close(fd)\n        except OSError: pass\nprint('end')\n", ANY, wall_s=3.0),
    Hostile("glob_chmod", "open every folder's permissions", "import os\nfor d, s, f in os.walk('/'):\n    for n in s:\n        try: os.chmod(os.path.join(d, n), 0o777)\n        except OSError: pass\n", ANY),
    refused("browser", "start a browser", "import webbrowser\nif not webbrowser.open('http://127.0.0.1:@PORT@'): raise OSError"),
    Hostile("breakpoint", "start a debugger", "breakpoint()\nprint('on')\n", frozenset({S.ERROR, S.OK})),
    Hostile("interact", "start an interpreter", "import code\ncode.interact()\n", frozenset({S.OK, S.ERROR}), stdin="import os\nos.fork()\n"),
    Hostile("getpass", "ask for a password", "import getpass\ngetpass.getpass()\n", ERROR),
    Hostile("pip", "install something", "import runpy, sys\nsys.argv = ['pip', 'install', 'x']\nrunpy.run_module('pip', run_name='__main__')\n", ANY),
    Hostile("faulthandler_flood", "tracebacks without end from a thread of C", "import faulthandler, time\nfaulthandler.dump_traceback_later(0.001, repeat=True)\ntime.sleep(60)\n", frozenset({S.OUTPUT_LIMIT, *TIMEOUT})),
    Hostile("email_quadratic", "a header that takes quadratic time", "import email.policy, email\nemail.message_from_string('From: ' + '(' * 10 ** 5, policy=email.policy.default)['from']\n", ANY),
    Hostile("unicode_width", "combining marks without end", "import unicodedata\nunicodedata.normalize('NFC', '\\u0344' * 10 ** 6)\n", ANY),
    Hostile("ssl_entropy", "read entropy for ever", "import ssl\nwhile True: ssl.RAND_bytes(1 << 20)\n", TIMEOUT),
    Hostile("queue_wait", "wait for a queue", "import queue\nqueue.Queue().get()\n", frozenset({S.TIMEOUT_WALL})),
    Hostile("executor_wait", "threads that wait for each other", "from concurrent.futures import ThreadPoolExecutor as P\np = P(1)\np.submit(lambda: p.submit(print).result()).result()\n", frozenset({S.TIMEOUT_WALL})),
    Hostile("asyncio_block", "an event loop that never ends", "import asyncio\nasyncio.run(asyncio.sleep(10 ** 6))\n", frozenset({S.TIMEOUT_WALL})),
]  # fmt: skip
