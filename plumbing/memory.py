"""What a chat needs of memory, what this machine has, and what would fit: known before gigabytes are read."""
import os

import torch

from model import frames_at_once
from plumbing.cli import UserError
from plumbing.quant import fast_bf16, memory_need

DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCHEMES = {"auto": None, "none": None, "int8": "int8", "int4": "int4"}
LARGE = 1e9   # parameters of a LLaMA; from there on, what it reads for every token decides how fast it is
LONGEST = 8192   # tokens of a conversation, also where a LLaMA reads more: its cache must fit
GROUPS = "/sys/fs/cgroup"


def choose(dtype, quantize, device, llama):
    """--dtype, --quantize and a LLaMAConfig -> (torch.dtype, scheme or None, both in words).

    auto: a GPU has units for fp16, and room. On a CPU a token costs the time in which the weights are read, so a large LLaMA
    is read as int8. What is not rounded, attention and the branch, is quickest in fp32 on a CPU that cannot compute in bf16; but
    whoever asks for int4, or for all of a large LLaMA as it is, needs the room that bf16 saves. Without quantisation, quant's
    "bf16" is how a CPU multiplies by bf16 weights quickest."""
    large = memory_need(llama, None, torch.bfloat16)["weights"] > 2 * LARGE
    if quantize == "auto":
        quantize = "int8" if large and device.type == "cpu" else "none"
    if dtype == "auto":
        bf16 = large and (quantize != "int8" or fast_bf16())
        dtype = "fp16" if device.type == "cuda" else "bf16" if bf16 else "fp32"
    quickest = "bf16" if dtype == "bf16" and device.type == "cpu" else None
    return DTYPES[dtype], SCHEMES[quantize] or quickest, dtype if quantize == "none" else f"{quantize} and {dtype}"


def usual_frames(image_size):
    """How many frames weights were tuned with, told by the size of what their CLIP sees: 100 from 224 pixels on, as released;
    8 below, where only the toy world is."""
    return 100 if image_size >= 224 else 8


def needs(clip, llama, num_frames, dtype, joined, scheme, device):
    """{part: bytes} of a chat with these sizes, a CLIPConfig and a LLaMAConfig: weights exactly, but for what is thousands of
    bytes (the branch has three layers, the projector one: LLaVA-1.5's has a second, of 34 MB) and for CLIP, which int8 makes smaller once it
    is read; a video roughly. Python and torch come on top.

    joined: the LLaMA is put together in the CPU's memory (see llm.is_joined) before it is quantised or sent elsewhere."""
    language, c, D = memory_need(llama, scheme, dtype, min(llama.context_length, LONGEST)), clip, clip.vision_width
    attention, patches = 4 * (D + 1) * D, (c.image_size // c.patch_size) ** 2 + 1
    layer = attention + 2 * D * c.vision_mlp + D + c.vision_mlp + 4 * D   # with an MLP, and two LayerNorms
    need = {"LLaMA": language["weights"]}
    if joined and scheme in ("int8", "int4") and device.type == "cpu":
        need |= joining(llama)
    need["CLIP, image tower"] = dtype.itemsize * (c.vision_layers * layer + (3 * c.patch_size ** 2 + 1 + patches + 4) * D)
    need["branch"] = dtype.itemsize * (3 * (attention + (D + 1) * D + 2 * D + layer) + (1 + 64) * D)   # its own CLS and times
    need["projector"] = dtype.itemsize * (D + 1) * llama.width
    # for a patch of a frame and a number of its width, as measured: CLIP 36 numbers, the branch 70 bytes in fp32 and fewer in bf16; and it
    # looks at 64 frames at most, or at the means of neighbours
    kept = num_frames * (6 * patches * D + 6 * c.image_size ** 2)   # 3 layers' output, pixels; twice
    branch = num_frames / -(-num_frames // 64) if num_frames else 0
    need["video"] = int((min(num_frames, frames_at_once(c, device)) * patches * 36 * D + kept) * dtype.itemsize + branch * patches * D * 70)
    need["KV cache"] = language["kv_cache"]
    return need


def joining(llama):
    """{part: bytes}: a LLaMA that is put together in memory, always that of the CPU, in the dtype of its files."""
    return {"LLaMA, as it is joined": memory_need(llama, None, torch.bfloat16)["weights"]}


def check(folder, need, scheme, device):
    """-> True where need(scheme), {part: bytes}, is there; False where the system does not say what it has. Raises UserError with
    the schemes that would fit.

    A KV cache takes memory on a CPU only as a conversation grows; it is counted as full, so that none ends in the middle, and beside a
    video: the next one may be looked at then."""
    free, total = available(device), sum(need(scheme).values())
    if free is None:
        return False
    if total > free:
        parts = ", ".join(f"{part} {gigabytes(size)}" for part, size in need(scheme).items())
        others = {s: sum(need(s).values()) for s in ("int8", "int4")}
        fits = " and ".join(f"--quantize {s} needs {gigabytes(size)}" for s, size in others.items() if size <= free)
        raise UserError(f"{folder}: needs {gigabytes(total)} of memory ({parts}), and {gigabytes(free)} can be had; "
                        + (fits or "no quantisation would fit; take a smaller model or another machine"))
    return True


def gigabytes(size):
    return f"{size / 1e9:.1f} GB"


# ---------------------------------------------------------------------------------------------------- what there is
def available(device):
    """Bytes that this process could still take without anything being swapped out; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        free = next(int(line.split()[1]) * 1024 for line in read("/proc/meminfo").splitlines() if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):   # not Linux: at least not more than there is
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return None
    groups = read("/proc/self/cgroup") if os.path.exists("/proc/self/cgroup") else ""
    return min([free, *room_in_groups(groups.splitlines(), GROUPS)])


def room_in_groups(lines, root):
    """Bytes left under each memory limit of the control groups around a process: containers have one.

    lines: of /proc/self/cgroup, `number:controllers:path`, without controllers in version 2. What files hold in memory counts
    against a limit but makes room when it is needed."""
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            top, names, prefix = root, ("memory.max", "memory.current"), ""
        elif "memory" in controllers.split(","):
            top, names, prefix = os.path.join(root, "memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"
        else:
            continue
        folder = top + group.rstrip("/")
        while folder.startswith(top):   # the group, and those around it
            try:
                limit, used = (int(read(os.path.join(folder, name))) for name in names)
                held = dict(line.split() for line in read(os.path.join(folder, "memory.stat")).splitlines())
                yield limit - used + sum(int(held.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            except (OSError, ValueError):   # not to be seen from inside a container; or "max", which is no limit
                pass
            folder = os.path.dirname(folder)


def read(path):
    with open(path) as f:
        return f.read()


def resident(device):
    """Bytes of memory that this process has: on a GPU those of its tensors, else all pages (where that cannot be seen: the most it had)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return int(read("/proc/self/statm").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource  # here: not every system has it
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss   # not Linux; macOS counts bytes
