"""A piece of work in a process of its own, and what it cost.

Who is measured is a function that is sent to a new process as text: it can use nothing but its arguments and what it imports. Peers may
need another interpreter, --peer_python; who is not installed there is said, and left out.
"""
import dataclasses
import inspect
import json
import os
import platform
import shutil
import subprocess
import sys
from typing import Callable

from plumbing import cli

# A new process inherits the peak memory of the one that started it, and this one has torch in it. So a small one stands between.
LAUNCHER = """
import json, os, sys
_, status, usage = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ), 0)
print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss]))
"""
HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))   # so that they can import ours
MEGABYTE = 2 ** 20 if sys.platform == "darwin" else 2 ** 10   # in units of ru_maxrss


@dataclasses.dataclass
class Contestant:
    name: str
    imports: str          # modules, whose import is not work
    function: Callable    # sent away as text; what it takes and returns is up to the benchmark
    package: str = ""     # what pip calls it, if it is none of the packages that this program needs anyway


def say(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


def launch(command, what):
    """Runs a command in a process of its own, in our folder -> (lines that it printed, CPU seconds, peak MB, what it said on standard error).

    Raises UserError with its last words where it fails; `what` it is, in words."""
    done = subprocess.run([sys.executable, "-S", "-c", LAUNCHER, *command], capture_output=True, text=True, cwd=HERE)
    *printed, last = done.stdout.splitlines()
    code, cpu, peak = json.loads(last)
    if code:
        raise cli.UserError(f"{what} failed: {last_line(done.stderr) or f'exit code {code}'}")
    return printed, cpu, peak / MEGABYTE, done.stderr


def last_line(text):
    return text.splitlines()[-1] if text.strip() else ""


def call(python, what, *functions, arguments):
    """Runs the last of `functions` in a process of its own, to which their texts are sent -> what it returns, through JSON, and its peak MB.

    `what` it is, in words, for the error."""
    program = "\n".join(["import json, sys", *map(inspect.getsource, functions), f"print(json.dumps({functions[-1].__name__}(*json.loads(sys.argv[1]))))"])
    printed, _, peak, _ = launch([shutil.which(python), "-c", program, json.dumps(arguments)], what)
    return json.loads(printed[-1]), peak


def present(cfg, contestants):
    """Says on standard output where this is and who takes part -> the names of those of `contestants` that are installed."""
    cli.at_least(cfg, runs=1)
    if shutil.which(cfg.peer_python) is None:
        raise cli.UserError(f"--peer_python {cfg.peer_python}: no such program")
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}; medians of {cfg.runs}.\n")
    names = [c.name for c in contestants]
    for c in [c for c in contestants if c.package]:
        command = [cfg.peer_python, "-c", f"import {c.imports}; print({c.imports}.__version__)"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            names.remove(c.name)
        print(f"- {c.name}: " + (f"not installed (pip install {c.package}); its rows are left out. {last_line(done.stderr) or f'exit code {done.returncode}'}"
                                 if done.returncode else f"{c.package} {done.stdout.strip()}"))
    print(flush=True)
    return names
