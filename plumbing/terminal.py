"""A conversation on a terminal: pictures made of characters, questions of several lines, paths, a history."""
import contextlib
import os
import re
import shlex
import shutil
import signal
import sys

import torch.nn.functional as F

from plumbing.cli import Seconds, say

CELL = 18       # width of a frame in characters
QUOTES = '"""'
SPAN = r"(?P<start>\d[\d:.]*)(?:-| to )(?P<end>\d[\d:.]*)(?: s)?(?: \(.*\))?"   # as is printed


# --------------------------------------------------------------------------------------------------- pictures
def half_blocks(picture):
    """(3, h, w) uint8 with even h -> h / 2 strings for a terminal with 24-bit colours, each w characters
    wide: U+2580, the upper half of a cell, in one pixel's colour on a ground in that of the pixel below."""
    cell = "\x1b[38;2;{};{};{};48;2;{};{};{}m\u2580"
    rows = picture.permute(1, 2, 0).tolist()   # h rows of w pixels (r, g, b)
    return ["".join(cell.format(*upper, *lower) for upper, lower in zip(*pair)) + "\x1b[0m"
            for pair in zip(rows[::2], rows[1::2])]


def is_plain():
    """Whether a terminal wants neither colours nor pictures made of characters."""
    return os.environ.get("TERM") == "dumb" or bool(os.environ.get("NO_COLOR"))


def show_frames(frames, times):
    """Frames (T, 3, H, W) uint8 and their times on standard error, no line wider than the terminal: a table
    of pictures, each with its number and its seconds below; where there are no colours only these."""
    H, W = frames.shape[2:]
    columns, colour = shutil.get_terminal_size().columns, sys.stderr.isatty() and not is_plain()
    cell = min(CELL, columns)
    scale = min(cell / W, 2 * cell / H)   # upright pictures are at most twice as high as wide
    height, width = 2 * max(1, round(scale * H / 2)), max(1, round(scale * W))
    small = F.interpolate(frames.float(), (height, width), mode="area").round().byte() if colour else frames
    blocks = [half_blocks(picture) if colour else [] for picture in small]
    labels = [f"{i}: {t:.2f} s"[:cell] for i, t in enumerate(times)]
    across, gap = (columns + 2) // (cell + 2), " " * (cell + 2 - width)
    for i in range(0, len(times), across):
        for row in zip(*blocks[i:i + across]):   # a line of each, side by side
            say(gap.join(row))
        say("  ".join(label.ljust(cell) for label in labels[i:i + across]).rstrip())


def show_bars(rows):
    """rows {label: 100 numbers from 0 on, of the steps of a clip, or None} -> a line each on standard error,
    no wider than the terminal: a cell for a step or a few, as high as their part of the line's largest."""
    simple = is_plain() or not (sys.stderr.encoding or "").lower().startswith("utf")
    heights = ".:-=+*#" if simple else ".▁▂▃▄▅▆▇█"
    rows = {name: values for name, values in rows.items() if values}
    label = max(map(len, rows)) + 1
    cells = max(1, min(100, shutil.get_terminal_size().columns - label - 2))
    for name, values in rows.items():
        highest, top = max(values) or 1, len(heights) - 1
        parts = [max(values[100 * i // cells:100 * (i + 1) // cells]) for i in range(cells)]
        say(f"{name:{label}}|{''.join(heights[round(x / highest * top)] for x in parts)}|")


# ------------------------------------------------------------------------------------------------------ times
def timestamp(seconds):
    """-> 0:23.4, and from an hour on 1:00:23."""
    tenths = round(10 * seconds)
    if tenths < 36000:
        return f"{tenths // 600}:{tenths % 600 / 10:04.1f}"
    return f"{tenths // 36000}:{tenths // 600 % 60:02}:{tenths // 10 % 60:02}"


def span_lines(rows, off, texts):
    """Events {"event": text; "start", "end": seconds, in order; "from", "to": as they were named} -> a line
    each. off: by how many seconds a time may be wrong; texts: whether to say what happens."""
    lines = []
    for row in rows:
        note = f"± {off:.1f} s" + ", named backwards" * (row["from"] > row["to"])
        text = f"  {' '.join(row['event'].split())}" if texts else ""
        lines.append(f"{timestamp(row['start'])} to {timestamp(row['end'])} ({note}){text}\n")
    return "".join(lines)


def subtitles(rows):
    """The same -> the text of an .srt file."""
    def stamp(seconds):
        ms = round(1000 * seconds)
        return f"{ms // 3600000:02}:{ms // 60000 % 60:02}:{ms // 1000 % 60:02},{ms % 1000:03}"
    return "\n".join(f"{i}\n{stamp(row['start'])} --> {stamp(row['end'])}\n{' '.join(row['event'].split())}\n"
                     for i, row in enumerate(rows, 1))


# ------------------------------------------------------------------------------------------------ typed lines
def read_line(prompt):
    """A line as it was typed. Raises EOFError and KeyboardInterrupt as input() does."""
    if not sys.stdout.isatty():   # then input() would mix its prompt with the answers
        print(prompt, end="", file=sys.stderr, flush=True)
    return input(prompt if sys.stdout.isatty() else "")


def rest_of(line):
    """A line that begins with three quotes -> the text up to the next ones, maybe lines further down. Lines
    after the first keep their indentation: they may be code. "" after Ctrl-C or Ctrl-D."""
    lines = [line.removeprefix(QUOTES).strip()]
    while not lines[-1].endswith(QUOTES):
        try:
            lines.append(read_line("... ").rstrip())
        except (EOFError, KeyboardInterrupt):
            say("\n(cancelled)")
            return ""
    return "\n".join(lines).removesuffix(QUOTES).strip("\n").rstrip()


def path_of(text):
    """A path that was typed, or dropped into the terminal, which quotes it or escapes its spaces -> the path.
    The text itself is the path where there is such a file."""
    typed = os.path.expanduser(text)
    try:
        words = shlex.split(text)
    except ValueError:   # an apostrophe of the name
        return typed
    return os.path.expanduser(words[0]) if len(words) == 1 and not os.path.lexists(typed) else typed


def path_and_part(text):
    """What stands behind a command, a path or a part of a video, as 1:00-1:15, or both -> path, "" without
    one; (start, end) in seconds, or None. A span that was printed may be pasted as it is. Raises UserError
    for what is like a span, but of no times."""
    found = re.fullmatch(rf"(?:(?P<path>.*)\s)?{SPAN}", text) or re.fullmatch(rf"{SPAN}\s+(?P<path>.*)", text)
    if not found or os.path.lexists(path_of(text)):
        return path_of(text), None
    return path_of((found["path"] or "").strip()), (Seconds(found["start"]), Seconds(found["end"]))


@contextlib.contextmanager
def history(path):
    """Within it, arrow-up also finds what was typed in earlier runs, and a paste of several lines is one
    line to input(). At the end, also where the terminal is closed, the new lines are added to the file.

    Where there is no such file and none can be made, this is said and nothing is kept."""
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(128 + signal.SIGHUP))   # ends the block as all else does
    try:
        import readline  # its import alone gives input() keys to edit a line
        from readline import append_history_file  # some systems have another library under this name
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)   # what was asked is one's own business
        open(path, "a").close()
        if os.path.getsize(path):   # libedit, that other library, minds an empty file
            readline.read_history_file(path)
    except (ImportError, OSError) as e:
        say(f"({path}: {getattr(e, 'strerror', e)}; what you type is not kept for the next time)")
        yield
        return
    readline.set_history_length(1000)   # lines that are kept from run to run
    readline.parse_and_bind("set enable-bracketed-paste on")
    before = readline.get_current_history_length()
    try:
        yield
    finally:   # added, not rewritten: another chat may be open beside this one
        try:
            append_history_file(readline.get_current_history_length() - before, path)
        except OSError as e:
            say(f"({path}: {e.strerror}; what you typed is not kept)")
