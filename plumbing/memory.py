"""Precision and memory: what a machine does quickly, what is free, what a process has."""
import ctypes
import os

import torch

from plumbing.cli import UserError
from plumbing.quant import fast_bf16
from plumbing.training import PRECISIONS

SMALL = 3e7   # parameters; below, threads wait for each other longer than they work
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3   # malloc.h
LARGE = 1e9   # parameters of a LLaMA; from there on, what it reads for every token decides how fast it is


def parameters_of(module):
    return sum(p.numel() for p in module.parameters())


def choose(dtype, quantize, device, llama):
    """--dtype, --quantize and a LLaMA -> (torch.dtype, scheme or None, both in words).

    auto: a GPU has units for fp16, and room. On a CPU a token costs the time in which the weights are read,
    so a large LLaMA is int8. What is not rounded is quickest in fp32 on a CPU that cannot compute in bf16;
    but int4, or all of a large LLaMA as it is, needs the room that bf16 saves. quant's "bf16" is how a CPU
    multiplies by bf16 quickest."""
    large = parameters_of(llama) > LARGE
    if quantize == "auto":
        quantize = "int8" if large and device.type == "cpu" else "none"
    if dtype == "auto":
        bf16 = large and (quantize != "int8" or fast_bf16())
        dtype = "fp16" if device.type == "cuda" else "bf16" if bf16 else "fp32"
    if quantize == "none":
        return PRECISIONS[dtype], "bf16" if dtype == "bf16" and device.type == "cpu" else None, dtype
    return PRECISIONS[dtype], quantize, f"{quantize} and {dtype}"


def prepare_cpu(module):
    """One thread for a small model, as a loader's processes want cores, too; else as many as torch takes
    itself. And glibc, where that is the C library, keeps what is freed. Else it gives every tensor of some
    megabytes back to the kernel, which hands out new pages one by one: a tenth of CLIP's time in int8."""
    if parameters_of(module) < SMALL:
        torch.set_num_threads(1)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, 256 << 20)
        libc.mallopt(M_TOP_PAD, 64 << 20)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)   # the most that every version takes


def read(path):
    with open(path) as f:
        return f.read()


def available(device):
    """Bytes that this process could take without anything being swapped out; None where nothing says it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":") for line in read("/proc/meminfo").splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
        group = read("/proc/self/cgroup").rpartition("0::")[2].strip()
    except (OSError, KeyError):   # not Linux
        return None
    while True:   # the control groups around this process, version 2: containers have a limit
        folder = "/sys/fs/cgroup" + group.rstrip("/")
        try:
            held = dict(line.split() for line in read(f"{folder}/memory.stat").splitlines())
            free = min(free, int(read(f"{folder}/memory.max")) - int(read(f"{folder}/memory.current"))
                       + int(held["active_file"]) + int(held["inactive_file"]))   # makes room
        except (OSError, ValueError, KeyError):   # not to be seen from inside; or "max", which is no limit
            pass
        if not group:
            return free
        group = group.rpartition("/")[0]


def check(need_of, dtype, scheme, device, num_frames):
    """Raises UserError, with what would fit, if too little is free. need_of(...): {part of a chat: bytes}."""
    need, free = need_of(dtype, scheme, device, num_frames), available(device)
    if free is not None and sum(need.values()) > free:
        parts = ", ".join(f"{part} {size / 1e9:.1f} GB" for part, size in need.items())
        sizes = {s: sum(need_of(dtype, s, device, num_frames).values()) for s in ("int8", "int4")}
        fits = [f"--quantize {s} needs {size / 1e9:.1f} GB" for s, size in sizes.items() if size <= free]
        advice = " and ".join(fits) or "take fewer --num_frames, a smaller model or another machine"
        raise UserError(f"a chat needs {sum(need.values()) / 1e9:.1f} GB of memory ({parts}), and "
                        f"{free / 1e9:.1f} GB are free; {advice}")


def resident(device):
    """Bytes of memory that this process has; on a GPU those of its tensors."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return int(read("/proc/self/statm").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:   # not Linux
        import resource  # here: not every system has it
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
