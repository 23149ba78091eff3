"""A piece of work in a process of its own, and what it cost."""
import importlib.util
import inspect
import json
import os
import platform
import subprocess
import sys

import torch

from plumbing import cli

# A new process inherits the peak memory of the one that started it, so a small one stands between.
LAUNCHER = """
import json, os, sys
_, status, usage = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ), 0)
print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss]))
"""
HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))   # so that they can import ours
TINY = os.path.join(HERE, "weights", "tiny")
MEGABYTE = 2 ** 20 if sys.platform == "darwin" else 2 ** 10          # in units of ru_maxrss


def say(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


def launch(command, what):
    """Runs a command in a process of its own, in our folder -> (lines that it printed, CPU seconds, peak MB,
    what it said on standard error). Raises UserError with its last words where it fails."""
    launcher = [sys.executable, "-S", "-c", LAUNCHER, *command]
    done = subprocess.run(launcher, capture_output=True, text=True, cwd=HERE)
    *printed, last = done.stdout.splitlines()
    code, cpu, peak = json.loads(last)
    if code:
        words = done.stderr.strip().splitlines()[-1:] or [f"exit code {code}"]
        raise cli.UserError(f"{what} failed: {words[0]}")
    return printed, cpu, peak / MEGABYTE, done.stderr


def call(what, *functions, arguments):
    """Runs the last of `functions` in a process of its own -> (what it returns, through JSON; CPU seconds;
    peak MB).

    All of them are sent there as text: they can use nothing but each other and what they import."""
    source = [inspect.getsource(function) for function in functions]
    last = f"print(json.dumps({functions[-1].__name__}(*json.loads(sys.argv[1]))))"
    program = "\n".join(["import json, sys", *source, last])
    printed, cpu, peak, _ = launch([sys.executable, "-c", program, json.dumps(arguments)], what)
    return json.loads(printed[-1]), cpu, peak


def present(cfg, module=None, package=None):
    """Says on standard output where this is -> whether a peer, the module of a package, is installed."""
    found = module is not None and importlib.util.find_spec(module) is not None
    print(f"{platform.platform()}, {os.cpu_count()} cores, torch {torch.__version__}; medians of {cfg.runs}.")
    if module is not None and not found:
        print(f"{module} is not installed (pip install {package}); its rows are left out.")
    print(flush=True)
    return found


def filled(module, device="cpu", dtype=torch.bfloat16):
    """A module made on the meta device -> the same with random numbers."""
    module = module.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for name, p in module.named_parameters():
        p.normal_("norm" in name, 0.02)
    return module


def table(columns, rows):
    """Markdown, on standard output."""
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(cell if isinstance(cell, str) else f"{cell:.4g}" for cell in row) + " |")
    print(flush=True)
