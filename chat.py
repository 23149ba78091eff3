"""Chat about a video.

    python chat.py                                        # the sample clip and the tiny weights that come with the program
    python chat.py -q "Which way does the shape move?"    # one question, one line of answer
    python chat.py video.mp4 --weights weights/7b < questions.txt > answers.txt

On a terminal it is a conversation: answers appear as they come, later questions know the earlier ones, Ctrl-C stops an
answer, Ctrl-D leaves, /help lists what else there is. With -q, or with questions on standard input (one a line, blank lines
skipped), every question is a conversation of its own, and its answer is one line: white space inside it, line breaks too,
becomes one space. Answers go to standard output, everything else to standard error. Exit codes: 0, 2 for bad input, 130 for
Ctrl-C.

The model sees the video once, as a few frames; its video tokens then stand in the prompt of every question. --verbose says
where the time to the first answer goes: with the tiny weights nearly all of it is importing torch.
"""
import sys
import time

STARTED = time.perf_counter()   # before torch is imported; what Python itself took to start is not in it
try:
    import contextlib
    import dataclasses
    import os
    import re

    import torch
    import torch.nn.functional as F

    import common
    import data
    from common import UserError
    from llm import KVCache, generate, stream_text
    from model import SYSTEMS, VIDEO_INDEX, VIDEO_TOKENS, load_chat, prompt_ids
except KeyboardInterrupt:   # the imports are most of the start: who changes their mind meanwhile needs no traceback
    print("chat.py: interrupted", file=sys.stderr)
    sys.exit(130)
IMPORT_SECONDS = time.perf_counter() - STARTED

HERE = os.path.dirname(os.path.abspath(__file__))        # what is shipped lies beside this file
CELL = 18                                                # width of a frame in characters on a terminal
PNG = b"\x89PNG\r\n\x1a\n"                               # the first bytes of a PNG file
SMALL = 30_000_000                                       # parameters; below, threads wait for each other more than they work
ROOM = 64                                                # tokens that an answer should have room for before old turns must go
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")   # what a terminal could take for a command, in the text of a model
HELP = """\
/frames        the frames that the model saw
/frames PNG    the same, as a picture file
/video PATH    another video, a new conversation
/reset         a new conversation
/quit          leave; so does Ctrl-D
Ctrl-C         stop an answer"""


@dataclasses.dataclass
class Config:
    video: str = os.path.join(HERE, "assets", "sample.mp4")   # a video file
    question: str | None = None      # ask only this, and leave
    weights: str = os.path.join(HERE, "weights", "tiny")      # folder with clip, llava, branch.pth and maybe chat.bin
    tokens: str = "branch"           # what the LLaMA sees of the video: branch, mean or st_pool
    tuned: bool = True               # use chat.bin, what was tuned on video; without it: the zero-shot setting
    system: str = "vicuna_v1"        # the sentence before the first question, vicuna_v1 or none: as the weights were tuned
    num_frames: int | None = None    # frames that the model sees; None: 100, or 8 where CLIP sees less than 224 pixels
    temperature: float = 0.0         # 0 takes the likeliest token, more is more varied; the released chat has 0.2
    top_p: float = 1.0               # draw from the likeliest tokens that together have this probability
    max_new_tokens: int = 256        # an answer's length at most
    seed: int = 0                    # every answer starts from it: the same question in the same place, the same answer
    device: str = "auto"             # cpu, cuda or auto
    verbose: bool = False            # say where the time to the first answer went


FLAGS = {"positional": ["video"], "short": {"question": "q", "verbose": "v"}}


def usual_frames(image_size):
    """How many frames weights were tuned with, told by the size of what their CLIP sees: 100 from 224 pixels on, as released;
    8 below, where only the toy world is."""
    return 100 if image_size >= 224 else 8


def say(text):
    print(text, file=sys.stderr, flush=True)


def put(text):
    """Part of an answer -> standard output, at once. A reader who has left (`| head -1`) ends the program without a word."""
    try:
        print(text, end="", flush=True)
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())   # else Python tries again as it ends, and complains
        if isinstance(e, BrokenPipeError):
            sys.exit(0)
        raise UserError(f"standard output: cannot write: {e.strerror}")


# ---------------------------------------------------------------------------------------------------- a video, a conversation
class Session:
    """The model, the video before it and the conversation so far. Raises UserError.

    frames (T, 3, h, w) uint8, at most data.THUMBNAIL wide, and times, T floats in seconds: what the model saw.
    video_tokens (K, D_llm): what it remembers of it. turns: [(question, answer)].
    kv_cache, heard: what the LLaMA has worked through, and its ids, VIDEO_INDEX for each row of the video: a prompt that
    begins alike is worked through only from where it differs, so a second question costs its own words.
    spent: {what was waited for since --verbose last reported: seconds}."""
    def __init__(self, cfg):
        self.cfg, self.spent = cfg, {"import": IMPORT_SECONDS}
        self.device = common.start_distributed(cfg.device).device
        data.probe(cfg.video)   # first: nobody should wait for gigabytes of weights to hear that a video is broken
        with self.timed("weights"):
            dtype = torch.float16 if self.device.type == "cuda" else torch.float32   # CPUs are not faster in half precision
            self.chat, self.kind = load_chat(cfg.weights, cfg.tokens, cfg.tuned, dtype)
            self.chat.to(self.device)
            if sum(p.numel() for p in self.chat.parameters()) < SMALL:
                torch.set_num_threads(1)
            config = self.chat.llm.config
            self.kv_cache = KVCache(config, 1, config.context_length, self.device, dtype)
        with self.timed("video"):
            self.open(cfg.video)

    @contextlib.contextmanager
    def timed(self, part):
        start = time.perf_counter()
        yield
        self.spent[part] = time.perf_counter() - start

    def open(self, path):
        """Shows a video to the model; a new conversation begins. Raises VideoError, and then everything is as it was."""
        size = self.chat.encoder.clip.config.image_size
        num_frames = usual_frames(size) if self.cfg.num_frames is None else self.cfg.num_frames
        duration = data.probe(path).duration
        kept, times = data.sample_frames(path, num_frames, "uniform", keep=lambda p: (data.squash(p[None], size)[0], data.thumbnail(p)))
        seen, pictures = map(torch.stack, zip(*kept))   # (T, 3, size, size), (T, 3, h, w)
        with torch.inference_mode():
            video_tokens = self.chat.encode_video(data.normalise(seen)[None].to(self.device))[0]   # (K, D_llm)
        self.path, self.duration, self.frames, self.times, self.video_tokens = path, duration, pictures, times, video_tokens
        self.forget()

    def forget(self):
        """Begins a new conversation."""
        self.turns, self.heard = [], []
        self.kv_cache.truncate(0)

    def describe(self):
        return f"{self.path} ({self.duration:.1f} s, {len(self.times)} frames, {len(self.video_tokens)} video tokens)"

    def ask(self, question, show):
        """Answers `question`: hands the text to `show`, piece by piece as it comes, then a line break.

        What was said becomes a turn of the conversation, also where Ctrl-C or an error breaks it off. Where the conversation
        leaves no room for an answer, its oldest turns are forgotten. Raises UserError where the question alone leaves none."""
        began, cfg, chat = time.perf_counter(), self.cfg, self.chat
        context, tokens, said, turns = chat.llm.config.context_length, [], "", self.turns
        question = question.encode(errors="replace").decode()   # no lone surrogates: they stand for input that is not UTF-8
        while True:
            ids, _ = prompt_ids(chat.tokenizer, [*turns, (question, None)], cfg.system)
            room = context - len(ids) - len(self.video_tokens) - 1
            if room >= min(cfg.max_new_tokens, ROOM) or not turns:
                break
            turns = turns[1:]
        if room < 1:
            raise UserError(f"no room for an answer: the prompt has {context - room} tokens, and this model reads {context}; "
                            "ask more briefly")
        if len(turns) < len(self.turns):
            say(f"(forgotten, for lack of room: {', '.join(q for q, _ in self.turns[:len(self.turns) - len(turns)])})")
            self.turns = turns
        with torch.inference_mode():
            embeds = chat.splice(ids, self.video_tokens)[None]   # (1, S, D_llm)
        at = ids.index(VIDEO_INDEX)
        heard = ids[:at] + [VIDEO_INDEX] * (len(self.video_tokens) + 2) + ids[at + 1:]   # S ids
        same = min(len(os.path.commonprefix([heard, self.heard])), len(heard) - 1)
        self.kv_cache.truncate(same)

        def remembered(new):
            for token in new:
                tokens.append(token)
                yield token
        new = generate(chat.llm, embeds=embeds[:, same:], max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature,
                       top_p=cfg.top_p, seed=cfg.seed, stop_ids=chat.tokenizer.stop_ids, kv_cache=self.kv_cache)
        try:
            for piece in stream_text(chat.tokenizer, remembered(new)):
                if not said:
                    self.spent["first token"] = time.perf_counter() - began
                said += piece
                show(CONTROL.sub("\ufffd", piece))
        finally:
            self.heard = (heard + tokens)[:self.kv_cache.length]   # however far it came
            if said.strip():
                self.turns.append((question, said.strip()))
            show("\n")
        if len(tokens) == room:
            say(f"(cut: question and answer fill the {context} tokens that this model reads)")
        elif len(tokens) == cfg.max_new_tokens:
            say(f"(cut after {cfg.max_new_tokens} tokens, see --max_new_tokens)")
        if cfg.verbose:
            parts = [f"{part} {seconds:.2f} s" for part, seconds in self.spent.items()]
            say(f"({', '.join(parts)}; in all {sum(self.spent.values()):.2f} s)")
            self.spent.clear()


def answer_line(session, question):
    """A question in a conversation of its own -> its answer as one line on standard output."""
    pieces, session.turns = [], []
    session.ask(question, pieces.append)
    put(" ".join("".join(pieces).split()) + "\n")


# ---------------------------------------------------------------------------------------------------- pictures of what it saw
def shrink(frames, height, width):
    """(T, 3, H, W) uint8 -> (T, 3, height, width) uint8: every new pixel is the mean of those that it covers."""
    return torch.cat([F.interpolate(f[None].float(), (height, width), mode="area").round().byte() for f in frames])


def half_blocks(picture):
    """(3, h, w) uint8 with even h -> h / 2 strings for a terminal with 24-bit colours, each w characters wide.

    Each is U+2580, the upper half of a character's cell in the colour of one pixel, on a ground in that of the one below."""
    rows, cell = picture.permute(1, 2, 0).tolist(), "\x1b[38;2;{};{};{};48;2;{};{};{}m\u2580"   # h rows of w pixels (r, g, b)
    return ["".join(cell.format(*upper, *lower) for upper, lower in zip(*pair)) + "\x1b[0m"
            for pair in zip(rows[::2], rows[1::2])]


def frame_lines(frames, times, columns, colour):
    """Frames (T, 3, H, W) uint8 and their times -> lines for a terminal, none wider than `columns`: a table of pictures,
    each with its number and its seconds below; without colour only these."""
    H, W = frames.shape[2:]
    cell = min(CELL, columns)
    scale = min(cell / W, 2 * cell / H)   # upright pictures are at most twice as high as wide
    height, width = 2 * max(1, round(scale * H / 2)), max(1, round(scale * W))
    pictures = [half_blocks(f) if colour else [] for f in shrink(frames, height, width)]
    labels = [f"{i}: {t:.2f} s"[:cell] for i, t in enumerate(times)]
    lines, across, gap = [], (columns + 2) // (cell + 2), " " * (cell + 2 - width)
    for i in range(0, len(times), across):
        lines += [gap.join(row) for row in zip(*pictures[i:i + across])]   # a line of each picture, side by side
        lines.append("  ".join(label.ljust(cell) for label in labels[i:i + across]).rstrip())
    return lines


def show_frames(session):
    """/frames on standard error: in colour where that is a terminal that has some."""
    terminal = sys.stderr.isatty()
    columns = (os.get_terminal_size(sys.stderr.fileno()).columns if terminal else 0) or 80   # 0: it does not know
    colour = terminal and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
    say("\n".join(frame_lines(session.frames, session.times, columns, colour)))


def save_frames(session, path):
    """/frames PNG. Raises UserError; replaces nothing but a PNG."""
    if os.path.lexists(path):
        try:
            with data.open_regular(path) as f:
                is_png = f.read(len(PNG)) == PNG
        except data.VideoError:
            is_png = False
        if not is_png:
            raise UserError(f"{path}: there is something that is not a PNG; choose another name")
    data.contact_sheet(session.frames, session.times, path)
    say(f"wrote {path}")


# ---------------------------------------------------------------------------------------------------- on a terminal
def obey(session, line):
    """A line that begins with "/". -> False where it asks to leave. Raises UserError."""
    command, _, rest = line.partition(" ")
    path = os.path.expanduser(rest.strip())
    match command, bool(path):
        case "/quit", False:
            return False
        case "/help", False:
            say(HELP)
        case "/reset", False:
            session.forget()
            say("a new conversation")
        case "/frames", False:
            show_frames(session)
        case "/frames", True:
            save_frames(session, path)
        case "/video", True:
            session.open(path)
            say(session.describe())
        case _:
            raise UserError(f"{line}: not a command; /help lists them")
    return True


def converse(session):
    """Questions and commands from a terminal, until it says to leave. No mistake in a line ends the program."""
    with contextlib.suppress(ImportError):   # absent on some systems
        import readline   # noqa: F401  its import alone gives input() a history and keys to edit a line
    while True:
        try:
            if not sys.stdout.isatty():   # then input() would mix its prompt with the answers
                print("> ", end="", file=sys.stderr, flush=True)
            line = input("> " if sys.stdout.isatty() else "").strip()
        except EOFError:
            return say("")
        except KeyboardInterrupt:
            say("\nCtrl-D or /quit leaves")
            continue
        try:
            if line.startswith("/"):
                if not obey(session, line):
                    return
            elif line:
                session.ask(line, put)
        except KeyboardInterrupt:
            say("(stopped)")
        except UserError as e:
            say(str(e))


# ---------------------------------------------------------------------------------------------------- main
def main(cfg):
    for flag, value, known in (("tokens", cfg.tokens, VIDEO_TOKENS), ("system", cfg.system, SYSTEMS)):
        if value not in known:
            raise UserError(f"--{flag} {value}: choose one of {', '.join(known)}")
    if cfg.max_new_tokens < 1 or not 0 <= cfg.seed < 2 ** 63:
        raise UserError(f"--max_new_tokens {cfg.max_new_tokens}, --seed {cfg.seed}: needed are 1 or more, and 0 to 2^63 - 1")
    if cfg.question is not None and not cfg.question.strip():
        raise UserError("--question: it is empty")
    sys.stdout.reconfigure(errors="replace")   # an answer may hold characters that a terminal's encoding lacks
    session = Session(cfg)
    say(f"video {session.describe()}; weights {cfg.weights} ({session.kind})")
    if cfg.question is not None:
        return answer_line(session, cfg.question)
    sys.stdin.reconfigure(errors="surrogateescape")   # names of files need not be UTF-8
    if sys.stdin.isatty():
        say("Ask about the video; /help lists commands, Ctrl-D leaves.")
        return converse(session)
    for line in sys.stdin:
        if line.strip():
            answer_line(session, line.strip())


if __name__ == "__main__":
    common.run(main, Config, **FLAGS)
