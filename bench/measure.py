"""A piece of work in a process of its own, what it cost, and what the machine can do at most."""
import concurrent.futures
import multiprocessing
import os
import platform
import re
import statistics
import time

import torch

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = os.path.join(HERE, "weights", "tiny")


def heading(cfg):
    """Says on standard output where this is."""
    where = f"{platform.platform()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"{where}; medians of {cfg.runs}.\n", flush=True)


def peak():
    """MB of memory that this process has had at most. (ru_maxrss counts what its parent had, too.)"""
    with open("/proc/self/status") as f:
        return int(re.search(r"VmHWM:\s*(\d+) kB", f.read())[1]) / 1024


def charged(function, arguments):
    memory, began = peak(), time.process_time()
    return function(*arguments), time.process_time() - began, peak() - memory


def call(function, *arguments):
    """Runs a function in a process of its own -> (what it returns; CPU seconds of all its threads, MB of
    memory at most, both without imports). A BrokenProcessPool is a lack of memory."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(charged, function, arguments).result()


def medians(runs):
    """Rows of numbers, one a run -> the median of each column."""
    return [*map(statistics.median, zip(*runs))]


def best(work, device=torch.device("cpu"), count=5):
    """Seconds: the best of a few runs, after one that is not counted."""
    times = []
    for _ in range(count + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def reading(device=torch.device("cpu")):
    """Bytes/s that are read from memory."""
    memory = torch.ones(128 << 20, device=device)   # 0.5 GB: no cache holds it
    return memory.nbytes / best(memory.sum, device)


def multiplying(rows, K, N, dtype=torch.float32, device=torch.device("cpu")):
    """Multiplications and additions/s of `rows` rows by a matrix (N, K)."""
    x, w = (torch.ones(n, K, dtype=dtype, device=device) for n in (rows, N))
    multiply = torch._int_mm if dtype == torch.int8 else torch.mm
    return 2 * rows * K * N / best(lambda: multiply(x, w.T), device)


def of_numbers(make, *arguments, device="cpu"):
    """-> what make(*arguments) makes, in bf16 with random numbers."""
    with torch.device("meta"):
        module = make(*arguments)
    return filled(module, device)


def filled(module, device="cpu"):
    """A module made on the meta device -> the same in bf16 with random numbers."""
    module = module.to(torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)
    for name, p in module.named_parameters():
        p.normal_("norm" in name, 0.02)
    return module
