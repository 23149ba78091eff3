"""What several scripts use alike and a reader of the method may skip: flags, distributed start, schedules, checkpoints, plots."""
import argparse
import dataclasses
import inspect
import json
import math
import os
import re
import select
import signal
import sys
import threading
import types
import typing
import warnings

import torch
import torch.distributed as dist


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, in which file, what to do. Scripts print it and exit with code 2.

    Weights that do not fit add the table of what does not, on lines of its own."""


# ---------------------------------------------------------------------------------------------------- command line
def parse(Config, argv=None, positional=(), short={}):
    """Command line -> Config. Every field of the dataclass is a flag; its trailing comment is the help text. A field whose flag
    is a word of Python ends in an underscore.

    positional: names of fields that are given without a flag; short: {field: letter}."""
    module = sys.modules[Config.__module__]
    comments = dict(re.findall(r"^    (\w+):.*? # (.*)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser(description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field, kind in ((f, typing.get_type_hints(Config)[f.name]) for f in dataclasses.fields(Config)):
        if isinstance(kind, types.UnionType):   # `int | None`: the flag, if given, is an int
            kind = next(k for k in kind.__args__ if k is not type(None))
        required = field.default is dataclasses.MISSING
        shown = "required" if required else f"default: {field.default}"
        options = {"help": f"{comments.get(field.name, '')} ({shown})".replace("%", "%%").strip()}
        if not required:
            options["default"] = field.default
        if field.name in positional:
            parser.add_argument(field.name, type=kind, **({} if required else {"nargs": "?"}), **options)
            continue
        names = [f"-{short[field.name]}"] if field.name in short else []
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options.update(type=kind, required=required, metavar=kind.__name__.upper())
        parser.add_argument(*names, "--" + field.name.rstrip("_"), dest=field.name, **options)
    return Config(**vars(parser.parse_intermixed_args(argv)))   # flags may stand between positional ones


def say(text):
    """A line on standard error. Where that cannot be written there is nobody to tell, and the work goes on."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        forget_output(sys.stderr)


def forget_output(stream):
    """What is still in a stream that cannot be written goes nowhere, else Python tries again as it ends, and complains."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run(main, Config, **flags):
    """The end of every script: parse, run, and turn bad input into one line and exit code 2, Ctrl-C into 130.

    A reader of standard output who has left (`| head -1`) ends the program without a word."""
    name = os.path.basename(sys.argv[0])
    warnings.formatwarning = lambda message, *_, **__: f"{name}: {message}\n"   # for people: no line of source code
    if sys.stderr is None:   # closed; and print would take standard output instead
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")   # names of files need not be UTF-8
    try:
        main(parse(Config, **flags))
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        poll = select.poll()
        poll.register(sys.stdout, 0)   # asks for nothing, but errors are told in any case
        if not poll.poll(0):   # it was another pipe
            raise
        forget_output(sys.stdout)
    except UserError as e:
        message = str(e).strip()
        if message.startswith("Caught ") and "\nOriginal Traceback" in message:
            # an error from a loader's process comes with that process's traceback; its last line is the message
            message = re.sub(r"^[\w.]+(VideoError|UserError): ", "", message.splitlines()[-1])
        say(f"{name}: {message}")
        sys.exit(2)
    except KeyboardInterrupt:
        say(f"{name}: interrupted")
        sys.exit(130)


# ---------------------------------------------------------------------------------------------------- files
def make_folder(path):
    """Makes a folder and those above it, where they are missing. Raises UserError."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as e:
        raise UserError(f"{path}: cannot make this folder: {e.strerror}")


def at_least(cfg, **bounds):
    """Raises UserError for the first field of `cfg` that is below its bound."""
    for name, bound in bounds.items():
        if not getattr(cfg, name) >= bound:   # nor may it be NaN
            raise UserError(f"--{name} {getattr(cfg, name)}: must be at least {bound}")


def write_atomic(path, write):
    """Calls write(file) on a temporary file beside `path`, then renames it: the old file or the whole new one, never half.

    Raises UserError where the folder cannot be written."""
    path = os.fspath(path)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:   # torch.save puts an error of its own in front of that of a full disk
        cause = e if isinstance(e, OSError) else e.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"{path}: cannot write: {cause.strerror}")
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


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


# ---------------------------------------------------------------------------------------------------- training
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


def seed_step(seed, step, rank=0, part=0):
    """Every random number of a part of a training step follows from (seed, step, rank, part): a resumed run needs no saved state."""
    torch.manual_seed((((seed * 1_000_003 + step) * 1_009 + rank) * 1_013 + part) % 2 ** 63)


def warmup_cosine(step, steps, warmup, floor=0.0):
    """Share of the peak learning rate at `step` of `steps`: linear up over `warmup` steps, then half a cosine to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ---------------------------------------------------------------------------------------------------- a plot
def plot(path, panels, width=900, height=360):
    """Line plots as a PNG, one panel below another over the same x. panels: [(title, {label: [(x, y), ...]})]; empty series are
    left out, and what lies above four times the median of its panel is cut: the first steps would flatten all others."""
    from PIL import Image, ImageDraw, ImageFont   # here, because chat starts without plots
    colours = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf"]
    image = Image.new("RGB", (width, height * len(panels)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    all_xs = [x for _, series in panels for points in series.values() for x, y in points if math.isfinite(y)] or [0]
    x0, x1 = min([0, *all_xs]), max(all_xs) or 1
    for row, (title, series) in enumerate(panels):
        series = {label: points for label, points in series.items() if points}
        left, right, top, bottom = 70, width - 20, row * height + 54, (row + 1) * height - 34
        draw.text((left, top - 46), title, "black", ImageFont.load_default(16))
        draw.rectangle((left, top, right, bottom), outline="#888888")
        ys = sorted(y for points in series.values() for _, y in points if math.isfinite(y))
        if not ys:
            continue
        y0, y1 = min(0, ys[0]), min(ys[-1], 4 * ys[len(ys) // 2]) if ys[len(ys) // 2] > 0 else ys[-1]
        y1 = y1 if y1 > y0 else y0 + 1
        for ticks, low, high, horizontal in ((nice_ticks(x0, x1), x0, x1, True), (nice_ticks(y0, y1), y0, y1, False)):
            for tick in ticks:
                share, text = (tick - low) / (high - low), f"{tick:g}"
                if horizontal:
                    x = left + share * (right - left)
                    draw.text((x - draw.textlength(text, font) / 2, bottom + 6), text, "black", font)
                else:
                    y = bottom - share * (bottom - top)
                    draw.line((left, y, right, y), "#e4e4e4")
                    draw.text((left - 8 - draw.textlength(text, font), y - 9), text, "black", font)
        label_x = left
        for colour, (label, points) in zip(colours * 9, series.items()):
            line = [(left + (x - x0) / (x1 - x0) * (right - left), bottom - (min(y, y1) - y0) / (y1 - y0) * (bottom - top))
                    for x, y in points if math.isfinite(y)]
            draw.line(line, colour, 2) if len(line) > 1 else draw.point(line, colour)
            draw.line((label_x, top - 14, label_x + 18, top - 14), colour, 3)
            draw.text((label_x + 24, top - 23), label, "black", font)
            label_x += 44 + draw.textlength(label, font)
    write_atomic(path, lambda f: image.save(f, "PNG"))


def bars(path, title, rows, unit=""):
    """Horizontal bars from zero as a PNG, with a whisker from the lowest to the highest. rows: [(label, value, lowest, highest)]."""
    from PIL import Image, ImageDraw, ImageFont
    font, longest = ImageFont.load_default(15), max(high for *_, high in rows) or 1
    left = 30 + round(max(font.getlength(label) for label, *_ in rows))
    image = Image.new("RGB", (900, 70 + 34 * len(rows)), "white")
    draw = ImageDraw.Draw(image)
    draw.text((20, 14), title, "black", ImageFont.load_default(16))
    for i, (label, value, low, high) in enumerate(rows):
        top, value_x, low_x, high_x = 50 + 34 * i, *(left + (900 - 110 - left) * x / longest for x in (value, low, high))
        draw.text((left - 10 - font.getlength(label), top + 3), label, "black", font)
        draw.rectangle((left, top, value_x, top + 24), "#1f77b4")
        if high > low:
            draw.line((low_x, top + 12, high_x, top + 12), "black", 2)
        draw.text((max(value_x, high_x) + 8, top + 3), f"{value:.{1 if longest >= 10 else 2}f}{unit}", "black", font)
    write_atomic(path, lambda f: image.save(f, "PNG"))


def nice_ticks(low, high):
    """About five round numbers between low and high."""
    raw = (high - low) / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
