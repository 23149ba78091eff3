"""What every script needs and no reader of the method: flags, errors of one line, files written whole."""
import argparse
import contextlib
import dataclasses
import difflib
import errno
import inspect
import json
import os
import re
import signal
import sys
import typing
import warnings


class UserError(argparse.ArgumentTypeError):   # argparse adds the name of a flag to it
    """Bad input: what is wrong, in which file, what to do, in one line. Scripts print it; exit code 2."""


# ----------------------------------------------------------------------------------------------- command line
# Types for fields of a Config: a number, the least and the most that it can be; a word, all that it can be
Count = typing.Annotated[int, 1, 10 ** 9]
Whole = typing.Annotated[int, 0, 10 ** 9]
Amount = typing.Annotated[float, 0, 1e9]
Share = typing.Annotated[float, 0, 1]
Rate = typing.Annotated[float, 0, 0.99]   # of what is left out
Device = typing.Annotated[str, "auto", "cpu", "cuda"]
Precision = typing.Annotated[str, "auto", "fp32", "bf16", "fp16"]
Scheme = typing.Annotated[str, "auto", "none", "int8", "int4"]
TIME = r"\d{1,9}(?::[0-5]?\d){0,2}(?:\.\d*)?"   # seconds, m:ss or h:mm:ss, as one types it


class Seconds:
    """A time as one types it -> float, seconds. Raises UserError."""
    def __new__(cls, text):
        if not re.fullmatch(TIME, str(text)):
            raise UserError(f"{text} is no time; write seconds, m:ss or h:mm:ss")
        parts = reversed(str(text).split(":"))
        return sum(60 ** i * float(part) for i, part in enumerate(parts))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message.removeprefix("argument "))


def parse(Config, argv=None, positional=(), short={}, hint=""):
    """Command line -> Config. Each field of the dataclass is a flag, and its trailing comment the help. A
    field whose flag is a word of Python ends in `_`. positional: fields without a flag; short: {field:
    letter}; hint: what to say of a word too many. Raises UserError."""
    comments = dict(re.findall(r"^    (\w+):[^#]*# (.*)$", inspect.getsource(Config), re.M))
    parser = Parser(description=sys.modules[Config.__module__].__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Config):
        kind, *limits = kind_of(field)
        options = {"default": None if field.default is dataclasses.MISSING else field.default}
        shown = "" if options["default"] is None else f" (default: {field.default})"
        options["help"] = (comments.get(field.name, "") + shown).replace("%", "%%").strip()
        if field.name in positional:
            parser.add_argument(field.name, type=kind, nargs="?", **options)
            continue
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind is list:
            options.update(action="append", metavar="STR")   # given again, it adds
        else:
            metavar = "|".join(limits) if kind is str and limits else kind.__name__.upper()
            options.update(type=kind, metavar=metavar)
        letter = [f"-{short[field.name]}"] if field.name in short else []
        parser.add_argument(*letter, flag_of(field), dest=field.name, **options)
    values, unknown = parser.parse_known_intermixed_args(argv)   # flags may stand between the others
    if unknown and unknown[0].startswith("-"):
        word = unknown[0].strip("-").split("=")[0]
        names = [flag_of(field)[2:] for field in dataclasses.fields(Config)]
        advice = "give it without a flag" if word in positional else meant("--", word, names, "--help")
        raise UserError(f"{unknown[0]}: no such flag; {advice}")
    if unknown:
        raise UserError(f"{unknown[0]}: one word too many{hint}")
    for field in dataclasses.fields(Config):
        if field.default is dataclasses.MISSING and getattr(values, field.name) is None:
            name = field.name if field.name in positional else flag_of(field)
            raise UserError(f"{name}: needed, {comments[field.name]}")
    cfg = Config(**vars(values))
    check(cfg)
    return cfg


def meant(before, word, known, listing):
    """What to say of a word that is not among the known ones, which stand behind `before`."""
    near = difflib.get_close_matches(word, known, 1)
    return f"did you mean {before}{near[0]}?" if near else f"{listing} lists them"


def flag_of(field):
    return "--" + field.name.rstrip("_")


def kind_of(field):
    """A field of a Config -> its type, and what else its annotation says. `int | None` is an int."""
    given = typing.get_args(field.type)
    return typing.get_args(given[0]) or given[:1] if type(None) in given else given or (field.type,)


def check(cfg, **choices):
    """Raises UserError for the first field whose value its type excludes, or which is not among its choices:
    {field: table}, for tables in modules that import torch."""
    for field in dataclasses.fields(cfg):
        (kind, *limits), value = kind_of(field), getattr(cfg, field.name)
        limits = choices.get(field.name, limits)
        if value is None or not limits:
            continue
        if kind is str:
            good, needed = value in limits, f"choose one of {', '.join(limits)}"
        else:
            good, needed = limits[0] <= value <= limits[1], "must be from {:g} to {:g}".format(*limits)
        if not good:   # as NaN is
            raise UserError(f"{flag_of(field)} {value}: {needed}")


def fill(cfg, row):
    """A Config with a row of settings, {field: value}, in the place of None. What stays None is an error. Of
    epochs and steps, those that are given count."""
    given = {name: value for name, value in vars(cfg).items() if value is not None}
    given |= {"steps": 0} if "epochs" in given and "steps" not in given else {}
    cfg = dataclasses.replace(cfg, **{name: row[name] for name in row if name in vars(cfg)} | given)
    if lacking := [f"--{name}" for name, value in vars(cfg).items() if value is None]:
        raise UserError(f"{', '.join(lacking)}: needed")
    return cfg


def say(text):
    """A line on standard error."""
    print(text, file=sys.stderr, flush=True)


def table(columns, rows):
    """Markdown on standard output, each row as soon as it is there. A cell is a text or a number."""
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        cells = (cell if isinstance(cell, str) else f"{cell:.4g}" for cell in row)
        print("| " + " | ".join(cells) + " |", flush=True)
    print(flush=True)


def show_briefly(text):
    """On a terminal alone; what comes next goes over it."""
    if sys.stderr.isatty():
        print(f"{text:30}", end="\r", file=sys.stderr, flush=True)


def forget_output(stream):
    """Drops what is left in a stream that cannot be written: Python would try again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def program():
    """The name of this script as it was typed; of `python -m toy`, the folder's."""
    folder, name = os.path.split(sys.argv[0])
    return os.path.basename(folder) if name == "__main__.py" else name


@contextlib.contextmanager
def errors_of_one_line():
    """Bad input ends the program with one line and exit code 2, Ctrl-C with 130. A reader of standard output
    who has left (`| head -1`) ends it without a word."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        forget_output(sys.stdout)
    except OSError as e:
        if e.errno != errno.ENOSPC:   # of standard output: for files, write_atomic says it
            raise
        forget_output(sys.stdout)
        say(f"{program()}: standard output: {e.strerror}")
        sys.exit(2)
    except UserError as e:
        message = str(e).strip()
        if message.startswith("Caught "):   # in a loader's process; the message ends that process's traceback
            message = re.sub(r"^[\w.]+Error: ", "", message.splitlines()[-1])
        say(f"{program()}: {message}")
        sys.exit(2)
    except KeyboardInterrupt:
        interrupted()


def interrupted(*_):
    say(f"{program()}: interrupted")
    sys.exit(130)


def start(Config, **flags):
    """The beginning of every script -> its Config. It stands before the imports, which take seconds: a typing
    error is told at once. flags: see parse."""
    signal.signal(signal.SIGINT, interrupted)   # no traceback of whatever is imported just then
    warnings.formatwarning = lambda message, *_, **__: f"{program()}: {message}\n"   # no line of source code
    sys.stdout.reconfigure(errors="backslashreplace")   # names of files need not be UTF-8
    with errors_of_one_line():
        cfg = parse(Config, **flags)
    show_briefly(f"{program()}: starting")
    return cfg


def run(main, cfg):
    """The end of every script. cfg: what start returned."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    show_briefly("")
    with errors_of_one_line():
        main(cfg)


# ------------------------------------------------------------------------------------------------------ files
def shipped(path):
    """A path in this checkout -> the same, as seen from the folder one is in: defaults are found anywhere."""
    return os.path.relpath(os.path.join(os.path.dirname(__file__), os.pardir, path))


def own_folder(variable, base):
    """This program's folder under the one that an environment variable names, or under `base`:
    https://specifications.freedesktop.org/basedir."""
    return os.path.join(os.environ.get(variable) or os.path.expanduser(base), "nanobt")


def make_folder(path, mode=0o777):
    """Makes a folder and those above it, where they are missing. Raises UserError."""
    try:
        os.makedirs(path, mode, exist_ok=True)
    except OSError as e:
        raise UserError(f"{path}: cannot make this folder: {e.strerror}")


def replaceable(path, mark):
    """Raises UserError if something stands at `path` without `mark`, bytes in the first MB of what its writer
    writes. What a user names for output may be a typing error: a script replaces only what it wrote itself;
    training.take_folder is the same for a folder."""
    start = b""
    if os.path.isfile(path):   # reading a pipe would block
        with open(path, "rb") as f:
            start = f.read(1 << 20)
    if os.path.lexists(path) and mark not in start:
        raise UserError(f"{path}: there is something that this program did not write; choose another name")


def write_atomic(path, write):
    """Calls write(file) on a temporary file beside `path`, then renames it: there is the old file or the
    whole new one, never half. Raises UserError where the folder cannot be written."""
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:   # torch.save puts an error of its own in front of a full disk's
        cause = e if isinstance(e, OSError) else e.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"{path}: cannot write: {cause.strerror}")
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_rows(path, rows):
    """JSON, one object a line; see write_atomic."""
    write_atomic(path, lambda f: f.writelines(f"{json.dumps(row)}\n".encode() for row in rows))


def append_lines(path, lines):
    """Adds lines to a file; they are on the disk when it returns. Raises UserError."""
    try:
        with open(path, "a", encoding="utf-8") as f:
            f.write("".join(f"{line}\n" for line in lines))
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:
        raise UserError(f"{path}: cannot write: {e.strerror}")
