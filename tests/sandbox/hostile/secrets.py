# ruff: noqa: E501  a program is one line of data
"""Secrets: the pool's environment, memory and files, other snippets' programs, and the machine's identity."""

from __future__ import annotations

from hostile import ANY, Hostile
from hostile.processes import refused

# Memory is searched through the kernel's own bounds checks: write() of an unmapped page fails softly. What is searched
# for is held backwards, so that the search does not find itself.
_SCAN = """import ctypes, os, sys, gc
needle = bytes([x ^ 1 for x in {needle!r}])
import resource
r, w = os.pipe()
os.set_blocking(w, False); os.set_blocking(r, False)
libc = ctypes.CDLL(None)
libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
seen = set()
for o in gc.get_objects():
    seen.add(id(o) >> 16)
found = False
for page in sorted(seen):
    for p in range(page << 16, (page + 1) << 16, 4096):
        n = libc.write(w, p, 4096)
        if n > 0 and needle in os.read(r, n)[::-1]: found = True
print('ESCAPED' if found else 'clean')
"""


def _masked(text: str) -> bytes:
    return bytes(b ^ 1 for b in reversed(text.encode()))


CASES = [
    Hostile("environ", "the pool's environment", "import os\nprint('ESCAPED' if any('SECRET' in k or 'canary-secret' in v for k, v in os.environ.items()) else 'clean')\n", stdout="clean\n"),
    Hostile("environ_c", "the C environment", "import ctypes\nl = ctypes.CDLL(None); l.getenv.restype = ctypes.c_char_p\nprint('ESCAPED' if l.getenv(b'TORL_SECRET') else 'clean')\n", stdout="clean\n"),
    Hostile("memory_secret", "the secret in inherited memory", _SCAN.format(needle=_masked("canary-secret-7f3a")), ANY, wall_s=8.0),
    Hostile("memory_other_snippet", "another snippet's program in inherited memory", _SCAN.format(needle=_masked("other-snippet-51c9")), ANY, wall_s=8.0),
    Hostile("main_module", "variables of the snippet before", "print('ESCAPED' if 'left_by_other' in globals() else 'clean')\n", stdout="clean\n"),
    refused("other_boxes", "other snippets' folders", "import glob\nd = os.path.dirname(os.getcwd())\nx = [p for p in os.listdir(d) if os.path.join(d, p) != os.getcwd() and 'box' in p]\nif not x: raise OSError()"),
    refused("project_source", "the project's own files", "open('@PROJECT@/torl_mega/types.py').read()"),
    refused("project_list", "the project's folder", "os.listdir('@PROJECT@')"),
    refused("git", "its history", "open('@PROJECT@/.git/HEAD').read()"),
    refused("ssh_keys", "keys", "os.listdir('/root/.ssh')"),
    refused("bash_history", "histories", "open('/root/.bash_history').read()"),
    refused("docker_socket", "docker", "os.stat('/var/run/docker.sock')\nopen('/var/run/docker.sock')"),
    refused("nvidia", "GPUs", "open('/dev/nvidiactl')"),
    refused("kcore", "kernel memory", "open('/proc/kcore', 'rb')"),
    refused("machine_id", "the machine's identity", "open('/etc/machine-id').read()"),
    Hostile("uid_zero", "be root, or the pool's user with rights", "import os\nprint(os.getuid() == 0 and 'root' or 'other')\n", ANY),
]  # fmt: skip
