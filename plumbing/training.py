"""What training loops have in common and is no lesson: processes, signals, batches, checkpoints, a log."""
import atexit
import dataclasses
import fcntl
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import re
import signal
import sys
import threading

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from plumbing.cli import UserError, make_folder, write_atomic, write_rows


# -------------------------------------------------------------------------------------------------- processes
@dataclasses.dataclass
class World:
    """This process among those that torchrun started (one, without torchrun)."""
    rank: int
    size: int
    device: torch.device


def pick_device(device="auto", index=0):
    """--device -> torch.device; of several GPUs the one with this number. Raises UserError."""
    if device == "cpu" or device == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: choose cpu; torch finds no GPU")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def start_distributed(device="auto"):
    """Joins torchrun's process group, if any (NCCL on GPUs, gloo on CPUs), and picks a device."""
    rank, size, local_rank = (int(os.environ.get(key, default)) for key, default in
                              (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = pick_device(device, local_rank)
    if size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(rank, size, device)


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_precision(precision, device):
    """--precision -> torch.dtype; auto: fp32 on a CPU, bf16 on a GPU that computes in it, else fp16."""
    auto = "fp32" if device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
    return PRECISIONS[auto if precision == "auto" else precision]


def gather_numbers(here, *numbers):
    """Numbers of this process, all whole or none -> those of all processes (size, numbers), on the CPU."""
    given = torch.tensor(numbers, device=here.device)
    rows = [given.clone() for _ in range(here.size)]
    if here.size > 1:
        try:
            dist.all_gather(rows, given)
        except RuntimeError as e:
            raise UserError(f"another process has stopped and says why ({str(e).splitlines()[0]})") from e
    return torch.stack(rows).cpu()


def on_sigterm():
    """-> an Event that SIGTERM sets instead of ending the program: a loop stops where nothing is lost."""
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    return asked


def leave_signals_to_the_parent(worker):
    """worker_init_fn for a DataLoader: Ctrl-C and SIGTERM reach the whole group, and the script decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.excepthook = lambda *error: None   # multiprocessing's thread would print that Ctrl-C cut its pipe


@atexit.register   # after multiprocessing's own, so it is called before that one
def end_loaders():
    """Python ends its children with SIGTERM and waits for them. A loader's ignore it: that lasts for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)   # torch's handler would report their end as an error
    for process in multiprocessing.active_children():
        process.kill()


# ---------------------------------------------------------------------------------------------------- batches
def batches(n, batch_size, together, seed, start, here):
    """Endless lists of this process's (epoch, index), from step `start` on: a fresh order each epoch, where
    `together` neighbours stay side by side, all n in their own order; incomplete batches are left out. A step
    has the same rows for any number of processes, which take turns in picking theirs."""
    groups = np.arange(n - n % together).reshape(-1, together)
    first, done = divmod(start, n // batch_size)
    for epoch in itertools.count(first):
        order = groups[np.random.default_rng([seed, epoch]).permutation(len(groups))].ravel()
        for k in range(done, n // batch_size):
            rows = order[k * batch_size:(k + 1) * batch_size]
            yield [(epoch, i) for i in rows[here.rank::here.size].tolist()]
        done = 0


def next_batch(loader, here):
    """-> a batch of as many rows as in every other process. Raises UserError where none has one.

    loader: yields dicts of tensors and lists, among them "index", and "skipped": what is wrong with the
    videos that are left out."""
    batch = next(loader)
    for message in batch.pop("skipped"):
        tqdm.write(f"skipped: {message}", file=sys.stderr)
    counts = gather_numbers(here, len(batch["index"]))
    if not counts.any():
        raise UserError("a batch without one readable video; the lines above say what is wrong with them")
    return {name: rows[:counts.min()] for name, rows in batch.items()}


def seed_step(seed, step, rank=0, part=0):
    """All random numbers of a step follow from (seed, step, rank, part): to resume takes no saved state."""
    torch.manual_seed((((seed * 1_000_003 + step) * 1_009 + rank) * 1_013 + part) % 2 ** 63)


def warmup_cosine(step, steps, warmup):
    """Share of the peak learning rate: linear up over `warmup` steps, then half a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ------------------------------------------------------------------------------------------------ checkpoints
def save_checkpoint(path, state):
    """A dict of tensors, numbers, strings and containers of these -> one torch.save file, atomically."""
    write_atomic(path, lambda f: torch.save(state, f))


def load_checkpoint(path):
    """What save_checkpoint wrote, on the CPU. A file with more than data is refused. Raises UserError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:   # a damaged or hostile file can make the reader raise anything
        raise UserError(f"{path}: not a checkpoint of this program, or damaged ({type(e).__name__})")


def take_folder(folder):
    """Makes a folder, or goes on in it, and keeps it for this process alone until that ends, however it does.
    Raises UserError where another run is at work, or other files are: its name may be a typing error."""
    make_folder(folder)
    path = os.path.join(folder, "run.lock")
    if not os.path.exists(path) and [name for name in os.listdir(folder) if name[0] != "."]:
        raise UserError(f"{folder}: there are other files than those of a run; choose another folder")
    try:   # the file stays open. A lock of this kind is not for children: a loader's can live a bit longer
        fcntl.lockf(os.open(path, os.O_CREAT | os.O_WRONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another run is at work in it; choose another folder")


FREE = {"out", "root", "features", "steps", "epochs", "workers", "device", "precision", "checkpointed",
        "micro_batch", "eval_annotations", "eval_every", "save_every", "log_every"}   # may change on the way


def save_run(cfg, trained, optimizer, scaler, step, skipped):
    """last.pth in --out: all that a run needs to go on. trained: {name: parameter}."""
    save_checkpoint(os.path.join(cfg.out, "last.pth"), {
        "state_dict": {name: p.detach().cpu() for name, p in trained.items()},
        "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "step": step, "skipped": skipped,
        "config": dataclasses.asdict(cfg)})


def resume(cfg, here, trained, optimizer, scaler):
    """Puts what save_run wrote back -> its step and skipped, (0, 0) where there is none. Raises UserError if
    it is of a run with other settings, but for those in FREE, or not the same for all processes."""
    path, step, skipped = os.path.join(cfg.out, "last.pth"), 0, 0
    if os.path.exists(path):
        saved = load_checkpoint(path)
        for key, value in dataclasses.asdict(cfg).items():
            if key not in FREE and saved["config"].get(key) != value:
                raise UserError(f"{path}: was made with --{key} {saved['config'].get(key)}, not {value}; "
                                "choose another --out")
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(saved["state_dict"][name])
        optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:   # empty after a run in another precision
            scaler.load_state_dict(saved["scaler"])
        step, skipped = saved["step"], saved["skipped"]
    if len(gather_numbers(here, step).unique()) > 1:
        raise UserError(f"{path}: not the same for all processes; --out must be a folder all machines share")
    return step, skipped


class Log:
    """log.jsonl in a folder, one JSON object a line. Resuming at a step drops the lines written after it, and
    what write_atomic leaves in the folder when it is killed: NAME.PROCESS.tmp."""
    def __init__(self, folder, start):
        self.path, self.rows = os.path.join(folder, "log.jsonl"), []
        for left in pathlib.Path(folder).iterdir():
            if re.fullmatch(r".+\.\d+\.tmp", left.name):
                left.unlink()
        if start and os.path.exists(self.path):
            with open(self.path) as f:
                rows = [json.loads(line) for line in f if line.endswith("\n")]   # a kill cuts one
            self.rows = [row for row in rows if row["step"] <= start]
        write_rows(self.path, self.rows)

    def add(self, **row):
        self.rows.append(row)
        with open(self.path, "a") as f:
            f.write(json.dumps(row) + "\n")

    def column(self, name):
        """[(step, value)] of the rows that have `name`."""
        return [(row["step"], row[name]) for row in self.rows if name in row]
