"""Chat about a video.

    python chat.py                                        # the sample clip and the tiny weights that come with the program
    python chat.py -q "What does the shape do?"           # one question, one line of answer
    python chat.py video.mp4 --weights weights/7b < questions.txt > answers.txt
    python chat.py video.mp4 --weights weights/7b --quantize int4 --json < questions.txt > answers.jsonl

On a terminal it is a conversation: answers appear as they come, later questions know the earlier ones, Ctrl-C stops an
answer, Ctrl-D leaves, /help lists what else there is. With -q, or with questions on standard input (one a line, blank lines
skipped), every question is a conversation of its own, and its answer is one line: white space inside it, line breaks too,
becomes one space; with --json it is one JSON object. Answers go to standard output, everything else to standard error. Exit
codes: 0, 2 for bad input, 130 for Ctrl-C.

The model sees the video once, as a few frames; its video tokens then stand in the prompt of every question. They are kept on
disk, so the next chat about this video begins at once. --verbose says where the time to the first answer goes: with the tiny
weights nearly all of it is importing torch.
"""
import sys
import time

STARTED = time.perf_counter()   # before torch is imported; what Python itself took to start is not in it
try:
    import concurrent.futures
    import contextlib
    import dataclasses
    import functools
    import json
    import math
    import os
    import re
    import threading
    import warnings

    import torch

    import data
    from llm import KVCache, generate, is_joined, stream_text
    from model import SYSTEMS, VIDEO_INDEX, VIDEO_TOKENS, load_chat, prompt_ids, read_sizes
    from plumbing import cli
    from plumbing import features as store
    from plumbing import memory, quant, terminal, training
    from plumbing.cli import UserError, say
    from plumbing.pictures import contact_sheet, thumbnail
    from plumbing.video import DamagedVideo
except KeyboardInterrupt:   # the imports are most of the start: who changes their mind meanwhile needs no traceback
    print("chat.py: interrupted", file=sys.stderr)
    sys.exit(130)
IMPORT_SECONDS = time.perf_counter() - STARTED

HERE = os.path.dirname(os.path.abspath(__file__))        # what is shipped lies beside this file
SMALL = 30_000_000                                       # parameters; below, threads wait for each other more than they work
ROOM = 64                                                # tokens that an answer should have room for before old turns must go
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")   # what a terminal could take for a command, in the text of a model
SETTINGS = ("temperature", "top_p", "max_new_tokens", "seed")   # can change between two answers
CONVERSATION = "nanoBT conversation"                     # how a saved one says what it is
HELP = '''\
"""              begins and ends a question of several lines
/frames          the frames that the model saw
/frames PNG      the same, as a picture file
/video PATH      another video, a new conversation
/reset           a new conversation
/set             what can be changed for the next answers
/set NAME VALUE  changes it
/stats           what the last answer took
/save FILE       the conversation, as JSON
/quit            leave; so does Ctrl-D
Ctrl-C           stop an answer'''


@dataclasses.dataclass
class Config:
    video: str = os.path.join(HERE, "assets", "sample.mp4")   # a video file
    question: str | None = None      # ask only this, and leave
    weights: str = os.path.join(HERE, "weights", "tiny")      # folder with clip, llava, branch.pth and maybe chat.bin
    base: str | None = None          # folder of the LLaMA that `llava` in the weights is only the difference to
    tokens: str = "branch"           # what the LLaMA sees of the video: branch, mean or st_pool
    tuned: bool = True               # use chat.bin, what was tuned on video; without it: the zero-shot setting
    system: str = "vicuna_v1"        # the sentence before the first question, vicuna_v1 or none: as the weights were tuned
    num_frames: int | None = None    # frames that the model sees; None: 100, or 8 where CLIP sees less than 224 pixels
    temperature: float = 0.0         # 0 takes the likeliest token, more is more varied; the released chat has 0.2
    top_p: float = 1.0               # draw from the likeliest tokens that together have this probability
    max_new_tokens: int = 256        # an answer's length at most
    seed: int = 0                    # every answer starts from it: the same question in the same place, the same answer
    device: str = "auto"             # cpu, cuda or auto
    dtype: str = "auto"              # fp32, bf16 or fp16 for what is not rounded; auto: fp16 on a GPU, else what is quick and fits
    quantize: str = "auto"           # int8, int4 or none for the LLaMA; on a CPU CLIP is int8 then; auto: int8 there from 1e9 parameters on
    cache: bool = True               # keep what the model saw of a video on disk, for the next chat about it
    cache_dir: str | None = None     # where; None: $XDG_CACHE_HOME/nanobt or ~/.cache/nanobt
    json: bool = False               # one JSON object a question on standard output, for -q and piped questions
    verbose: bool = False            # say where the time to the first answer went


FLAGS = {"positional": ["video"], "short": {"question": "q", "verbose": "v"}}


def check_settings(cfg):
    """Raises UserError for what /set may change and nothing can be sampled with."""
    if not (0 <= cfg.temperature < math.inf and 0 < cfg.top_p <= 1 and cfg.max_new_tokens >= 1 and 0 <= cfg.seed < 2 ** 63):
        given = ", ".join(f"--{name} {getattr(cfg, name)}" for name in SETTINGS)
        raise UserError(f"{given}: needed are 0 or more, more than 0 and at most 1, 1 or more, and 0 to 2^63 - 1")


def put(text):
    """Part of an answer -> standard output, at once. Raises UserError, and BrokenPipeError, which cli.run knows."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        raise   # see cli.run
    except OSError as e:
        cli.forget_output(sys.stdout)
        raise UserError(f"standard output: cannot write: {e.strerror}")


# ---------------------------------------------------------------------------------------------------- a video, a conversation
@contextlib.contextmanager
def decoding(path, num_frames, size):
    """Decodes a video in a thread, which libav lets run beside the caller: `with decoding(...) as pictures: ...; pictures()`.

    pictures() waits for what the model will see (T, 3, size, size), small pictures (T, 3, h, w), both uint8, and T times, or
    raises VideoError. Who leaves the block earlier, with an error or Ctrl-C, waits for the next frame that is wanted, not for the last."""
    left = threading.Event()

    def decode():
        seen = []
        for t, picture in data.sample_frames(path, num_frames, "uniform"):
            if left.is_set():
                raise concurrent.futures.CancelledError
            seen.append((data.squash(picture[None], size)[0], thumbnail(picture), t))
        pixels, frames, times = zip(*seen)
        return torch.stack(pixels), torch.stack(frames), list(times)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pictures = pool.submit(decode).result
        try:
            yield pictures
        finally:
            left.set()


@dataclasses.dataclass
class Cost:
    """What an answer took."""
    cached: int                        # tokens of its prompt that were known from the turns before
    new: int                           # tokens of its prompt that were not
    first_token: float | None = None   # seconds until the first token of the answer
    seconds: float = 0.0               # until the last one
    tokens: int = 0                    # of the answer
    cut: str | None = None             # what ended it, if not the model: "context" or "max_new_tokens"


class Session:
    """The model, the video before it and the conversation so far. Raises UserError.

    frames (T, 3, h, w) uint8, at most pictures.THUMBNAIL wide, and times, T floats in seconds: what the model saw.
    video_tokens (K, D_llm): what it remembers of it. turns: [(question, answer)], of which it has forgotten the first `forgotten`.
    kv_cache, heard: what the LLaMA has worked through, and its ids, VIDEO_INDEX for each row of the video: a prompt that
    begins alike is worked through only from where it differs, so a second question costs its own words.
    spent: {what was waited for since --verbose last reported: seconds}. cost: of the last answer, None before it."""
    def __init__(self, cfg):
        self.cfg, self.cost, self.weights_state = cfg, None, store.state_of(cfg.weights)
        self.spent = {"import": IMPORT_SECONDS, "weights": 0.0, "video": 0.0}
        self.device = training.pick_device(cfg.device)
        self.open(cfg.video, meanwhile=self.load)

    @contextlib.contextmanager
    def timed(self, part):
        start = time.perf_counter()
        yield
        self.spent[part] = self.spent.get(part, 0.0) + time.perf_counter() - start

    @functools.cached_property
    def sizes(self):
        """(CLIPConfig, LLaMAConfig) of the weights, from headers alone: enough to look at a video, and to know what fits."""
        return read_sizes(self.cfg.weights)

    @property
    def num_frames(self):
        return memory.usual_frames(self.sizes[0].image_size) if self.cfg.num_frames is None else self.cfg.num_frames

    def load(self):
        cfg, (clip, llama) = self.cfg, self.sizes
        dtype, self.scheme, self.precision = memory.choose(cfg.dtype, cfg.quantize, self.device, llama)
        joined = is_joined(os.path.join(cfg.weights, "llava"), cfg.base)

        def need(scheme):   # the one chosen, or another that may fit
            kind = dtype if scheme == self.scheme else memory.choose(cfg.dtype, scheme, self.device, llama)[0]
            return memory.needs(clip, llama, self.num_frames, kind, joined, scheme, self.device)
        if not memory.check(cfg.weights, need, self.scheme, self.device) and cfg.verbose:
            say("(this system does not say how much memory is free, so whether the weights fit was not checked)")
        if joined and self.device.type != "cpu":
            memory.check(cfg.weights, lambda scheme: memory.joining(llama), None, torch.device("cpu"))
        with self.timed("weights"):
            self.chat, self.kind = load_chat(cfg.weights, cfg.tokens, cfg.tuned, dtype, self.device, quantize=self.scheme, base=cfg.base)
        if sum(p.numel() for p in self.chat.parameters()) < SMALL:
            torch.set_num_threads(1)
        self.kv_cache = KVCache(llama, 1, min(llama.context_length, memory.LONGEST), self.device, dtype)

    def open(self, path, meanwhile=lambda: None):
        """Shows a video to the model, and does `meanwhile` while it is decoded; a new conversation begins. Raises VideoError,
        and then everything is as it was.

        What is known from an earlier chat is taken from the cache. That a file is no video, or that its first frame cannot be decoded,
        is said before anything else is done: nobody should wait for gigabytes of weights to hear it."""
        cfg, seen = self.cfg, None
        entry = store.entry(cfg.cache_dir or store.default_folder(), path, self.how(), self.weights_state) if cfg.cache else None
        with self.timed("video"), self.unharmed():
            seen = store.recall(entry) if entry else None
        if seen is None:
            with self.timed("video"):
                probed = data.probe(path)
            with decoding(path, self.num_frames, self.sizes[0].image_size) as pictures:
                meanwhile()
                with self.timed("video"):
                    pixels, frames, times = pictures()
                    if self.scheme in ("int8", "int4") and self.device.type == "cpu":   # 100 frames are 16e12 operations, a prompt 4e12
                        quant.quantize(self.chat.encoder.clip.vision_model, "int8")
                    with torch.inference_mode():
                        video_tokens = self.chat.encode_video(pixels[None].to(self.device))[0]   # (K, D_llm)
            seen = store.Seen(probed.duration, probed.damage, times, frames, video_tokens)
            with self.timed("video"), self.unharmed():
                if entry:
                    store.keep(entry, seen)
        else:
            if seen.damage:   # whoever decodes it is told; so is who does not have to
                warnings.warn(DamagedVideo(f"{path}: {seen.damage}"))
            meanwhile()
        video_tokens = seen.video_tokens.to(self.device)
        self.forget()   # first: a Ctrl-C must not leave the new video with the old conversation
        self.path, self.duration, self.frames, self.times, self.video_tokens = path, seen.duration, seen.frames, seen.times, video_tokens

    def how(self):
        """All that decides what the model sees of a video, but the video and the weights."""
        cfg = self.cfg
        return ["uniform", cfg.num_frames, cfg.tokens, cfg.tuned, cfg.dtype, cfg.quantize, self.device.type]

    @contextlib.contextmanager
    def unharmed(self):
        """The cache saves time, and nothing else: where it fails, that is said, and all goes on without it."""
        try:
            yield
        except UserError as e:
            say(f"({e}; going on without it)")

    def forget(self):
        """Begins a new conversation."""
        self.turns, self.forgotten, self.heard = [], 0, []
        self.kv_cache.truncate(0)

    def describe(self):
        return f"{self.path} ({self.duration:.1f} s, {len(self.times)} frames, {len(self.video_tokens)} video tokens)"

    def ask(self, question, show):
        """Answers `question`: hands the text to `show`, piece by piece as it comes, then a line break.

        What was said becomes a turn of the conversation, also where Ctrl-C or an error breaks it off. Where the conversation
        leaves no room for an answer, its oldest turns are forgotten. Raises UserError where the question alone leaves none."""
        began, cfg, chat = time.perf_counter(), self.cfg, self.chat
        context, tokens, said, forgotten = self.kv_cache.max_len, [], "", self.forgotten
        question = question.encode(errors="replace").decode()   # no lone surrogates: they stand for input that is not UTF-8
        while True:
            ids, _ = prompt_ids(chat.tokenizer, [*self.turns[forgotten:], (question, None)], cfg.system)
            room = context - (len(ids) - 1 + len(self.video_tokens) + len(chat.start_end))
            if room >= min(cfg.max_new_tokens, ROOM) or forgotten == len(self.turns):
                break
            forgotten += 1
        if room < 1:
            advice = "ask more briefly" if len(self.video_tokens) < context // 2 else f"{len(self.video_tokens)} are the video's; choose fewer --num_frames"
            raise UserError(f"no room for an answer: the prompt has {context - room} tokens, and this model reads {context}; {advice}")
        if forgotten > self.forgotten:
            say(f"(forgotten, for lack of room: {', '.join(q for q, _ in self.turns[self.forgotten:forgotten])})")
            self.forgotten = forgotten
        with torch.inference_mode():
            embeds = chat.splice(ids, self.video_tokens)[None]   # (1, S, D_llm)
        at = ids.index(VIDEO_INDEX)
        heard = ids[:at] + [VIDEO_INDEX] * (len(self.video_tokens) + len(chat.start_end)) + ids[at + 1:]   # S ids
        same = min(len(os.path.commonprefix([heard, self.heard])), len(heard) - 1)
        self.heard = heard[:same]   # before the cache: a Ctrl-C between them must not leave more here than there
        self.kv_cache.truncate(same)
        cost = self.cost = Cost(same, len(heard) - same)

        def remembered(new):
            for token in new:
                tokens.append(token)
                cost.tokens, cost.seconds = len(tokens), time.perf_counter() - began
                cost.first_token = cost.first_token or round(cost.seconds, 6)
                yield token
        new = generate(chat.llm, embeds=embeds[:, same:], max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature,
                       top_p=cfg.top_p, seed=cfg.seed, stop_ids=chat.tokenizer.stop_ids, kv_cache=self.kv_cache)
        try:
            for piece in stream_text(chat.tokenizer, remembered(new)):
                said += piece
                show(CONTROL.sub("\ufffd", piece))
        finally:
            self.heard = (heard + tokens)[:self.kv_cache.length]   # however far it came
            if said.strip():
                self.turns.append((question, said.strip()))
            show("\n")
        if len(tokens) == room:
            cost.cut = "context"
            say(f"(cut: question and answer fill the {context} tokens that this model reads)")
        elif len(tokens) == cfg.max_new_tokens:
            cost.cut = "max_new_tokens"
            say(f"(cut after {cfg.max_new_tokens} tokens, see --max_new_tokens)")
        if cfg.verbose:
            spent = self.spent | {"first token": cost.first_token or 0.0}
            say(f"({', '.join(f'{part} {seconds:.2f} s' for part, seconds in spent.items())}; in all {sum(spent.values()):.2f} s)")
            self.spent.clear()


def answer_line(session, question):
    """A question in a conversation of its own -> its answer as one line on standard output, or one JSON object."""
    pieces, session.turns, session.forgotten = [], [], 0
    session.ask(question, pieces.append)
    answer, cost = "".join(pieces), session.cost
    if session.cfg.json:
        put(json.dumps({"question": question, "answer": answer.strip(), "seconds_to_first_token": cost.first_token,
                        "tokens": cost.tokens, "cached": cost.cached, "cut": cost.cut}) + "\n")
    else:
        put(" ".join(answer.split()) + "\n")


# ---------------------------------------------------------------------------------------------------- commands
def save_frames(session, path):
    """/frames PNG. Raises UserError; replaces nothing but what it has written before."""
    contact_sheet(session.frames, session.times, path)
    say(f"wrote {path}")


def save_conversation(session, path):
    """/save FILE. Raises UserError; replaces nothing but what it has written before."""
    first = json.dumps({"kind": CONVERSATION})[:-1]   # where a file of its own begins
    cli.replaceable(path, "saved conversation", lambda start: start.decode(errors="replace").startswith(first))
    cfg = session.cfg
    settings = {name: getattr(cfg, name) for name in ("tokens", "tuned", "system", "dtype", "quantize", *SETTINGS)}
    conversation = {
        "kind": CONVERSATION, "video": os.path.abspath(session.path), "duration": session.duration, "times": session.times,
        "weights": os.path.abspath(cfg.weights), "settings": settings,
        "turns": [{"question": question, "answer": answer, "forgotten": i < session.forgotten} for i, (question, answer) in enumerate(session.turns)]}
    cli.write_atomic(path, lambda f: f.write(json.dumps(conversation).encode() + b"\n"))
    say(f"wrote {path}")


def change(session, name, value):
    """/set NAME VALUE. Raises UserError, and then everything is as it was."""
    if name not in SETTINGS:
        raise UserError(f"/set {name}: can be changed are {', '.join(SETTINGS)}")
    try:
        cfg = dataclasses.replace(session.cfg, **{name: type(getattr(session.cfg, name))(value)})
    except ValueError:
        kind = "whole number" if isinstance(getattr(session.cfg, name), int) else "number"
        raise UserError(f"/set {name} {value}: not a {kind}")
    check_settings(cfg)
    session.cfg = cfg


def show_settings(session):
    say("\n".join(f"{name} {getattr(session.cfg, name)}" for name in SETTINGS))


def show_stats(session):
    """/stats: what the video and the last answer took."""
    cost, resident = session.cost, memory.resident(session.device)
    lines = [f"video: {len(session.video_tokens)} tokens from {len(session.times)} frames"]
    if cost:
        lines.append(f"prompt: {cost.cached} tokens known, {cost.new} new")
    if cost and cost.tokens:
        rate = f", then {(cost.tokens - 1) / max(cost.seconds - cost.first_token, 1e-9):.1f} a second" * (cost.tokens > 1)
        lines.append(f"answer: {cost.tokens} token{'s' * (cost.tokens > 1)}, the first after {cost.first_token:.2f} s{rate}")
    kept = session.kv_cache.length * sum(t[:, :, :1].nbytes for t in (*session.kv_cache.k, *session.kv_cache.v))
    lines.append(f"memory: {resident / 1e9:.2f} GB, of it {kept / 1e9:.3f} GB KV cache for {session.kv_cache.length} tokens")
    say("\n".join(lines))


def obey(session, line):
    """A line that begins with "/". -> False where it asks to leave. Raises UserError."""
    command, _, rest = line.partition(" ")
    words, path = rest.split(), os.path.expanduser(rest.strip())
    match command, len(words):
        case "/quit", 0:
            return False
        case "/help", 0:
            say(HELP)
        case "/reset", 0:
            session.forget()
            say("a new conversation")
        case "/frames", 0:
            terminal.show_frames(session.frames, session.times)
        case "/frames", _:
            save_frames(session, path)
        case "/video", n if n:
            session.open(path)
            say(session.describe())
        case "/set", 0:
            show_settings(session)
        case "/set", 2:
            change(session, *words)
        case "/stats", 0:
            show_stats(session)
        case "/save", n if n:
            save_conversation(session, path)
        case _:
            raise UserError(f"{line}: not a command; /help lists them")
    return True


def converse(session):
    """Questions and commands from a terminal, until it says to leave. No mistake in a line ends the program."""
    while True:
        try:
            line = question = terminal.read_line("> ").strip()
            if line.startswith(terminal.QUOTES):
                question = terminal.rest_of(line)
        except EOFError:
            return say("")
        except KeyboardInterrupt:
            say("\nCtrl-D or /quit leaves")
            continue
        try:
            if line.startswith("/"):
                if not obey(session, line):
                    return
            elif question:
                session.ask(question, put)
        except KeyboardInterrupt:
            say("(stopped)")
        except UserError as e:
            say(str(e))


# ---------------------------------------------------------------------------------------------------- main
def main(cfg):
    for flag, known in (("tokens", VIDEO_TOKENS), ("system", SYSTEMS), ("dtype", memory.DTYPES), ("quantize", memory.SCHEMES)):
        if getattr(cfg, flag) not in known:
            raise UserError(f"--{flag} {getattr(cfg, flag)}: choose one of {', '.join(known)}")
    check_settings(cfg)
    if cfg.num_frames is not None:
        cli.at_least(cfg, num_frames=1)
    if cfg.question is not None and not cfg.question.strip():
        raise UserError("--question: it is empty")
    if sys.stdin is None or sys.stdout is None:
        raise UserError("standard input or output is closed; give it a file, or /dev/null")
    if cfg.json and cfg.question is None and sys.stdin.isatty():
        raise UserError("--json: is for -q and for questions on standard input; in a conversation, /save FILE writes JSON")
    sys.stdout.reconfigure(errors="replace")   # an answer may hold characters that a terminal's encoding lacks
    session = Session(cfg)
    say(f"video {session.describe()}; weights {cfg.weights} ({session.kind}), {session.precision}")
    if cfg.question is not None:
        return answer_line(session, cfg.question)
    sys.stdin.reconfigure(errors="surrogateescape")   # names of files need not be UTF-8
    if sys.stdin.isatty():
        say("Ask about the video; /help lists commands, Ctrl-D leaves.")
        with terminal.history(terminal.history_file()):
            return converse(session)
    for line in sys.stdin:
        if question := line.removeprefix("\ufeff").strip():   # how editors on Windows begin a file
            answer_line(session, question)


if __name__ == "__main__":
    cli.run(main, Config, **FLAGS)
