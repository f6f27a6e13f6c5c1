"""Programs in a process that knows neither the tests nor trimtab.

Each is forked from one process that has imported torch and timm and no more: the seconds that takes are spent once.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_FORK = """
import json, os, sys, traceback
import timm, torch

for line in sys.stdin:
    code, arguments, folder, out = json.loads(line)
    child = os.fork()
    if not child:
        failed = True
        try:
            os.dup2(os.open(out, os.O_WRONLY), 1)
            os.chdir(folder)
            sys.argv = ["-c", *arguments]
            exec(compile(code, "<elsewhere>", "exec"), {"__name__": "__main__"})
            failed = False
        except BaseException:
            traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
        os._exit(failed)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@functools.cache
def _forker() -> subprocess.Popen[str]:
    """Ends with the tests: it reads until its input is closed."""
    return subprocess.Popen([sys.executable, "-c", _FORK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def python(code: str, *arguments: str | Path) -> str:
    """What a program prints, given its words as `sys.argv[1:]`.

    Raises:
        RuntimeError: it ended with an error; what it said is in the message.
    """
    forker = _forker()
    assert forker.stdin is not None and forker.stdout is not None
    with tempfile.NamedTemporaryFile("r") as out:
        forker.stdin.write(json.dumps([code, [str(a) for a in arguments], os.getcwd(), out.name]) + "\n")
        forker.stdin.flush()
        status = forker.stdout.readline().strip()
        said = out.read()
    if status != "0":
        raise RuntimeError(f"the program ended with status {status or 'unknown'}: {said[-2000:]}")
    return said
