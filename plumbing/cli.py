"""What every script needs and no reader of the method: flags, errors of one line, files written whole."""
import argparse
import dataclasses
import inspect
import os
import re
import select
import sys
import warnings


class UserError(Exception):
    """Bad input: what is wrong, in which file, what to do, in one line. Scripts print it; exit code 2."""


# ----------------------------------------------------------------------------------------------- command line
def parse(Config, argv=None, positional=(), short={}):
    """Command line -> Config. Each field of the dataclass is a flag, and its trailing comment the help. A
    field whose flag is a word of Python ends in `_`. positional: fields without a flag; short: {field:
    letter}."""
    comments = dict(re.findall(r"^    (\w+):.*? # (.*)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser(description=sys.modules[Config.__module__].__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Config):
        kind = getattr(field.type, "__args__", [field.type])[0]   # `int | None`: an int, if given
        required = field.default is dataclasses.MISSING
        options = {"default": None if required else field.default}
        shown = "" if options["default"] is None else f" (default: {field.default})"
        options["help"] = (comments.get(field.name, "") + shown).replace("%", "%%").strip()
        if field.name in positional:
            parser.add_argument(field.name, type=kind, nargs=None if required else "?", **options)
            continue
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options.update(type=kind, required=required, metavar=kind.__name__.upper())
        letter = [f"-{short[field.name]}"] if field.name in short else []
        parser.add_argument(*letter, "--" + field.name.rstrip("_"), dest=field.name, **options)
    return Config(**vars(parser.parse_intermixed_args(argv)))   # flags may stand between positional ones


def fill(cfg, row):
    """A Config with a row of settings, {field: value}, in the place of None. What stays None is an error."""
    given = {name: value for name, value in vars(cfg).items() if value is not None}
    cfg = dataclasses.replace(cfg, **{name: row[name] for name in row if name in vars(cfg)} | given)
    if lacking := [f"--{name}" for name, value in vars(cfg).items() if value is None]:
        raise UserError(f"{', '.join(lacking)}: needed")
    return cfg


def at_least(cfg, **bounds):
    """Raises UserError for the first field of `cfg` that is below its bound, or not a number."""
    for name, bound in bounds.items():
        if not getattr(cfg, name) >= bound:
            raise UserError(f"--{name} {getattr(cfg, name)}: must be at least {bound}")


def one_of(cfg, **choices):
    """Raises UserError for the first field of `cfg` that is none of its choices."""
    for name, known in choices.items():
        if getattr(cfg, name) not in known:
            raise UserError(f"--{name} {getattr(cfg, name)}: choose one of {', '.join(known)}")


def say(text):
    """A line on standard error. Where that cannot be written, nobody reads it, and the work goes on."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        forget_output(sys.stderr)


def forget_output(stream):
    """Drops what is left in a stream that cannot be written: Python would try again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run(main, Config, **flags):
    """The end of every script: bad input is one line and exit code 2, Ctrl-C is 130. A reader of standard
    output who has left (`| head -1`) ends the program without a word."""
    folder, name = os.path.split(sys.argv[0])
    name = os.path.basename(folder) if name == "__main__.py" else name   # of `python -m toy`
    warnings.formatwarning = lambda message, *_, **__: f"{name}: {message}\n"   # no line of source code
    for stream, way in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, stream) is None:   # closed
            setattr(sys, stream, open(os.devnull, way))
    sys.stdout.reconfigure(errors="backslashreplace")   # names of files need not be UTF-8
    try:
        main(parse(Config, **flags))
        sys.stdout.flush()
    except BrokenPipeError:
        poll = select.poll()
        poll.register(sys.stdout, 0)   # errors are told in any case
        if not poll.poll(0):   # it was another pipe
            raise
        forget_output(sys.stdout)
    except UserError as e:
        message = str(e).strip()
        if message.startswith("Caught "):   # in a loader's process; the message ends that process's traceback
            message = re.sub(r"^[\w.]+Error: ", "", message.splitlines()[-1])
        say(f"{name}: {message}")
        sys.exit(2)
    except KeyboardInterrupt:
        say(f"{name}: interrupted")
        sys.exit(130)


# ------------------------------------------------------------------------------------------------------ files
def shipped(path):
    """A path in this checkout -> the same, as seen from the folder one is in: defaults are found anywhere."""
    return os.path.relpath(os.path.join(os.path.dirname(__file__), os.pardir, path))


def make_folder(path):
    """Makes a folder and those above it, where they are missing. Raises UserError."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as e:
        raise UserError(f"{path}: cannot make this folder: {e.strerror}")


def replaceable(path, kind, is_one):
    """Raises UserError if something stands at `path` that is no `kind`, as is_one(its first MB) tells. What a
    user names for output may be a typing error: a script replaces only a file that it wrote itself."""
    start = b""
    if os.path.isfile(path):   # reading a pipe would block
        with open(path, "rb") as f:
            start = f.read(1 << 20)
    if os.path.lexists(path) and not is_one(start):
        raise UserError(f"{path}: there is something that is not a {kind}; choose another name")


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
