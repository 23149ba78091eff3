"""What the training loops have in common and is no lesson: processes, signals, checkpoints, a log."""
import atexit
import dataclasses
import json
import math
import multiprocessing
import os
import re
import signal
import threading

import torch
import torch.distributed as dist

from plumbing.cli import UserError, write_atomic


# ---------------------------------------------------------------------------------------------------- checkpoints
def remove_leftovers(folder):
    """Removes from a folder of ours what write_atomic leaves there when it is killed: NAME.PROCESS.tmp."""
    for name in os.listdir(folder):
        if re.fullmatch(r".+\.(pth|bin|png|jsonl)\.\d+\.tmp", name):
            os.remove(os.path.join(folder, name))


def save_checkpoint(path, state):
    """A dict of tensors, numbers, strings and containers of these -> one torch.save file, atomically."""
    write_atomic(path, lambda f: torch.save(state, f))


def load_checkpoint(path):
    """What save_checkpoint wrote, on the CPU. A file that holds anything but data is refused. Raises UserError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}")
    except Exception as e:   # a damaged or hostile file can make the reader raise anything
        raise UserError(f"{path}: not a checkpoint of this program, or damaged ({type(e).__name__})")


def put_back(parameters, saved, path):
    """Copies saved tensors into {name: parameter}, if names and sizes are the same on both sides. Raises UserError."""
    if {name: t.shape for name, t in saved.items()} != {name: p.shape for name, p in parameters.items()}:
        raise UserError(f"{path}: made with a model of other sizes; choose another --out")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(saved[name])


FREE = {"out", "root", "steps", "epochs", "workers", "device", "amp", "precision", "micro_batch", "checkpointed", "eval_annotations",
        "eval_every", "save_every", "log_every"}


def check_same_run(saved, path, cfg):
    """A run may go on from a checkpoint only with the settings that made it (those in FREE may change). Raises UserError."""
    if not isinstance(saved, dict) or "optimizer" not in saved or "config" not in saved:
        raise UserError(f"{path}: not a checkpoint of this script; choose another --out")
    for key, value in dataclasses.asdict(cfg).items():
        if key not in FREE and saved["config"].get(key) != value:
            raise UserError(f"{path}: was made with --{key} {saved['config'].get(key)}, not {value}; choose another --out")


class Log:
    """log.jsonl, one JSON object a line. Resuming at a step drops the lines that an interrupted run wrote after it."""
    def __init__(self, path, start):
        self.path, self.rows = path, []
        if start and os.path.exists(path):
            try:
                with open(path) as f:
                    self.rows = [row for row in (json.loads(line) for line in f if line.endswith("\n")) if row["step"] <= start]
            except (OSError, ValueError, KeyError, TypeError) as e:
                raise UserError(f"{path}: not a log of this program ({type(e).__name__}); move it away")
        write_atomic(path, lambda f: f.write("".join(json.dumps(row) + "\n" for row in self.rows).encode()))

    def add(self, **row):
        self.rows.append(row)
        try:
            with open(self.path, "a") as f:
                f.write(json.dumps(row) + "\n")
        except OSError as e:
            raise UserError(f"{self.path}: cannot write: {e.strerror}")

    def column(self, name):
        """[(step, value)] of the rows that have `name`."""
        return [(row["step"], row[name]) for row in self.rows if name in row]


# ---------------------------------------------------------------------------------------------------- processes
@dataclasses.dataclass
class World:
    """This process among those that torchrun started (one, without torchrun)."""
    rank: int
    size: int
    device: torch.device

    @property
    def first(self):
        return self.rank == 0


def pick_device(device="auto", index=0):
    """--device -> torch.device; of several GPUs the one with this number. Raises UserError."""
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine or this build of torch has no GPU; use --device cpu")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def start_distributed(device="auto"):
    """Joins the process group of torchrun, if any (NCCL on GPUs, gloo on CPUs), and picks this process's device."""
    rank, size, local_rank = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = pick_device(device, local_rank)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(rank, size, device)


def told_by_all(here, *numbers):
    """Every process says some numbers, all whole or none -> for each of them a list: what all said, in rank order.

    Raises UserError where another process has stopped."""
    said = torch.tensor(numbers, device=here.device)
    rows = [said.clone() for _ in range(here.size)]
    if here.size > 1:
        try:
            dist.all_gather(rows, said)
        except RuntimeError as e:
            raise UserError(f"another process has stopped and says why, or cannot be reached ({str(e).splitlines()[0]})") from e
    return torch.stack(rows, dim=1).tolist()


def on_sigterm():
    """-> an Event that SIGTERM sets, instead of ending the program: a loop looks at it where it can stop without loss."""
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    return asked


def leave_signals_to_the_parent(worker):
    """worker_init_fn for a DataLoader: Ctrl-C and SIGTERM reach the whole group, and the script itself decides what they mean."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register   # after multiprocessing's own, so it is called before that one
def end_loaders():
    """Python ends its child processes with SIGTERM and waits for them. A loader's ignore it: that would last for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)   # torch's handler would report their end as an error
    for process in multiprocessing.active_children():
        process.kill()


def seed_step(seed, step, rank=0, part=0):
    """Every random number of a part of a training step follows from (seed, step, rank, part): a resumed run needs no saved state."""
    torch.manual_seed((((seed * 1_000_003 + step) * 1_009 + rank) * 1_013 + part) % 2 ** 63)


def warmup_cosine(step, steps, warmup, floor=0.0):
    """Share of the peak learning rate at `step` of `steps`: linear up over `warmup` steps, then half a cosine to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
