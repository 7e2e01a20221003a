"""A process that is killed at its n-th call that changes a file, for every n: a library of wrappers, preloaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_WRAPPERS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/types.h>
#include <unistd.h>
static long left;
void kill_at(long n) { left = n; }
static int due(void) { return left > 0 && --left == 0; }
static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }
#define WRAP(name, result, given, part, call) \
    result name given { \
        static result (*next) given; \
        if (!next) next = (result (*) given)dlsym(RTLD_NEXT, #name); \
        if (due()) { part; die(); } \
        return next call; \
    }
/* of a write that is the last one, a half is done */
WRAP(pwrite, ssize_t, (int f, const void *b, size_t n, off_t o), (void)!next(f, b, n / 2, o), (f, b, n, o))
WRAP(pwrite64, ssize_t, (int f, const void *b, size_t n, off64_t o), (void)!next(f, b, n / 2, o), (f, b, n, o))
WRAP(write, ssize_t, (int f, const void *b, size_t n), (void)!next(f, b, n / 2), (f, b, n))
WRAP(fsync, int, (int f), , (f))
WRAP(fdatasync, int, (int f), , (f))
WRAP(ftruncate, int, (int f, off_t n), , (f, n))
WRAP(ftruncate64, int, (int f, off64_t n), , (f, n))
WRAP(unlink, int, (const char *p), , (p))
WRAP(rename, int, (const char *a, const char *b), , (a, b))
"""

_DRIVER = r"""
import ctypes, json, os, shutil, sys
from pathlib import Path
{preparation}
arm = ctypes.CDLL(None).kill_at
root, n = Path(sys.argv[1]), 0
while True:
    n += 1
    folder = root / str(n)
    folder.mkdir()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        arm(ctypes.c_long(n))
        try:
            work(folder, lambda: ctypes.CDLL(None).syscall(1, writing, b".", 1))
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    os.close(writing)
    status = os.waitpid(child, 0)[1]
    done = len(os.read(reading, 1000))
    os.close(reading)
    print(json.dumps([n, status, done, look(folder)]), flush=True)
    shutil.rmtree(folder)
    if os.WIFEXITED(status):
        break
"""


def kill_at_every_write(folder: Path, preparation: str) -> list[tuple[int, int, int, Any]]:
    """Run `work(folder, done)` in a new folder for each n, killed at its n-th write, until it comes to its end.

    preparation: Python that defines it and `look(folder)`, which says as JSON what is found afterwards; `done` is
    called after each step. Returns (n, wait status, steps done, what was found) of each.
    """
    library = folder / "wrappers.so"
    (folder / "wrappers.c").write_text(_WRAPPERS)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, folder / "wrappers.c", "-ldl"], check=True)
    runs = folder / "runs"
    runs.mkdir()
    script = _DRIVER.replace("{preparation}", preparation)
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(runs)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return [tuple(json.loads(line)) for line in ran.stdout.splitlines()]
