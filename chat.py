"""Chat about a video.

    python chat.py                                        # the shipped clip and the shipped tiny weights
    python chat.py -q "What does the shape do?"           # one question, one line of answer
    python chat.py video.mp4 --weights weights/released --json < questions.txt > answers.jsonl

On a terminal it is a conversation: answers appear as they come, later questions know the earlier ones, /help
lists commands. With -q, or with questions on standard input, one a line, every question is a conversation of
its own. Its answer is one line, or with --json one JSON object. Answers go to standard output, everything
else to standard error. Exit codes: 0, 2 for bad input, 130 for Ctrl-C.

The model sees the video once, as a few frames. What it saw is kept on disk. -v says where the time goes.
"""
import dataclasses
import os
from typing import Annotated

from plumbing import cli


@dataclasses.dataclass
class Config:
    video: str = cli.shipped("assets/sample.mp4")   # a video file
    start: cli.Seconds = 0.0         # of its part to talk about: seconds, m:ss or h:mm:ss
    end: cli.Seconds | None = None   # its end; None: the end of the video
    question: list | None = None     # ask only this, and leave; may be given again
    weights: str = cli.shipped("weights/tiny")   # a folder with clip, llava, branch.pth
    branch: str | None = None        # a branch file in the place of branch.pth: what pretrain.py wrote
    chat: str | None = None          # a file in the place of chat.bin: what chat_tune.py wrote
    tuned: bool = True               # use what was tuned on video; --no-tuned is the zero-shot setting
    tokens: str | None = None        # branch, mean, st_pool, frame_cls, linvt, branch+linvt; None: as trained
    num_frames: cli.Count | None = None   # frames that the model sees; None: what the kind of tokens wants
    keep_tokens: bool = False        # of LinVT: the first question's stay, and later ones cost less
    explain: str | None = None       # with -q, of LinVT: a PNG of where the answer came from
    temperature: Annotated[float, 0, 2] = 0.0   # 0: the likeliest token; the released chat has 0.2
    top_p: Annotated[float, 0.001, 1] = 1.0   # draw from the likeliest tokens that have this probability
    max_new_tokens: cli.Count = 256  # an answer's length at most
    seed: cli.Whole = 0              # every answer starts from it: the same question, the same answer
    device: cli.Device = "auto"      # where to compute
    dtype: cli.Precision = "auto"   # fp32, bf16, fp16 for what is not rounded; auto: what is quick
    quantize: cli.Scheme = "auto"   # the LLaMA: int8, int4 or none; auto: int8 on a CPU if it is large
    cache: bool = True               # keep what the model saw of a video on disk
    cache_dir: str | None = None     # where; None: $XDG_CACHE_HOME/nanobt or ~/.cache/nanobt
    json: bool = False               # one JSON object a question on standard output
    verbose: bool = False            # say where the time goes


FLAGS = {"positional": ["video"], "short": {"question": "q", "verbose": "v"},
         "hint": "; a question goes behind -q"}
if __name__ == "__main__":
    CONFIG = cli.start(Config, **FLAGS)   # before the slow imports: a typing error shows at once

import contextlib
import copy
import functools
import itertools
import json
import math
import re
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm

import clip
import data
import model
from llm import generate, number_probabilities, stream_text
from metrics import SPAN, read_events, read_spans
from model import ALL_EVENTS, LONGEST, VIDEO_INDEX, VIDEO_TOKENS, WHEN, open_chat, prompt_ids
from plumbing import memory, pictures, quant, terminal, training, video
from plumbing.cli import UserError, say
from plumbing.store import Store, code_of, state_of
from plumbing.terminal import timestamp

ROOM = 64              # tokens that an answer should have; for these, old turns are forgotten
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")   # what a terminal could take for a command
SETTINGS = ("temperature", "top_p", "max_new_tokens", "seed")   # can change between two answers
ALIASES = {"exit": "/quit", "quit": "/quit", "q": "/quit", "help": "/help", "?": "/help"}   # "/" or not
KNOWN = {   # what the shipped weights can be asked, with tokens of a kind
    "branch": '"What does the shape do?", "What colour is it?", "Describe the video."',
    "branch+linvt": '"What does the red circle do?", "What colour is the star?"',
    "frame_cls": "/when and, as of assets/events.mp4, /when! a red arrow spins clockwise"}
CONVERSATION = '{"kind": "nanoBT conversation"'   # how a saved one begins
HELP = '''\
"""              begins and ends a question of several lines
/frames          the frames that the model saw
/frames PNG      the same, as a picture file
/video PATH      another video, a new conversation
/video 1:00-1:15 a part of the video; behind PATH, of that one
/when EVENT      when it happens; the conversation stays as it is
/when! EVENT     the same, and how likely each start and end was
/when            all events; /when --srt FILE also writes them as subtitles
/reset           a new conversation
/set             what can be changed for the next answers
/set NAME VALUE  changes it; /set NAME shows it
/stats           what the last answer took
/explain         where it came from: which parts of a video LinVT chose
/explain PNG     the same, as a picture file
/save FILE       the conversation, as JSON
/help            this list
/quit            leave; so does Ctrl-D
Ctrl-C           stop an answer'''


# ---------------------------------------------------------------------------------------------------- looking
@dataclasses.dataclass
class Seen:
    """What the model saw of a video, and what it remembers of it."""
    path: str
    duration: float          # of the whole video, in seconds
    window: tuple            # its part that was looked at: start and end in seconds of the video
    times: list              # T floats: seconds at which the frames appear
    frames: torch.Tensor     # (T, 3, h, w) uint8, small pictures of them
    rows: torch.Tensor       # (1, ...): what the kind of video tokens sees
    before: bool = False     # it comes from the cache


def seconds_of(clip, num_frames):
    """About how long CLIP looks at so many frames on a CPU: the time of a layer, times all of them."""
    layers, places = clip.vision_model.encoder.layers, model.place_embedding(clip)   # (1+N, D)
    together = model.frames_at_once(clip.config, places.device)
    states = torch.randn(together, *places.shape).to(places.dtype)
    for _ in range(2):   # the first call is slower
        began = time.perf_counter()
        layers[0](states)
    return (time.perf_counter() - began) * len(layers) * num_frames / together


class Viewer:
    """Looks at videos for a chat, and keeps what was seen on disk. precision: of the chat, in words."""
    def __init__(self, cfg, opened, precision):
        self.kind, self.size = opened.chat.video_tokens, opened.chat.clip.config.image_size
        self.frames_of = functools.partial(self.kind.frames_of, cfg.num_frames, self.size)   # of seconds
        code = code_of(clip, model, data, video, pictures, quant)
        self.key = [cfg.num_frames, self.kind.rule, opened.tokens, opened.states["clip"],
                    opened.states["branch"], precision, code]
        folder = cfg.cache_dir or cli.own_folder("XDG_CACHE_HOME", "~/.cache")
        self.store = Store(folder, max_bytes=1 << 30) if cfg.cache else None

    def cached(self, act, *given):
        """Store.get or Store.put. The cache saves time and nothing else, so an error of it is only said."""
        try:
            return act(self.store, *given) if self.store else None
        except UserError as e:
            say(f"({e}; going on without it)")

    def decode(self, path, window, left):
        """-> pixels (T, 3, size, size) uint8, small pictures (T, 3, h, w) uint8, T times. `left`: an Event
        that ends it at the next frame. Raises VideoError."""
        T, pixels, frames, times = self.frames_of(window[1] - window[0]), [], [], []
        found = data.sample_frames(path, T, self.kind.rule, window=window)
        for t, picture in tqdm(found, "frames", T, leave=False, disable=None, delay=2):
            if left.is_set():
                return None
            pixels.append(self.kind.pixels(picture[None], self.size))
            frames.append(pictures.thumbnail(picture))
            times.append(t)
        return torch.cat(pixels), torch.stack(frames), times

    @contextlib.contextmanager
    def looking(self, path, window=None):
        """Decodes a video, or the part within `window` seconds, in a thread while its block does something
        else. Yields see(chat) -> Seen, which waits for the frames and lets the model look at them. Warnings
        come at the end of the block. Raises UserError, before the block begins for a file that is no video
        or has no such part."""
        start, end = map(float, window or (0, math.inf))
        with data.open_regular(path):   # a folder is refused before all that is in it is looked at
            key = [state_of(path), start, end, *self.key]
        tensors, about = self.cached(Store.get, key) or (None, {})
        duration = json.loads(about["duration"]) if about else data.probe(path).duration
        data.clip_length(path, (start, end), duration)   # raises its error for a part that there is not
        window = start, min(end, duration)
        if tensors:
            for message in json.loads(about["damage"]):
                say(message)
            yield lambda chat: Seen(path, duration, window, tensors["times"].tolist(), tensors["frames"],
                                    tensors["rows"], before=True)
            return
        left = threading.Event()
        with warnings.catch_warnings(record=True) as noticed, ThreadPoolExecutor(1) as pool:
            warnings.simplefilter("always")
            decoded = pool.submit(self.decode, path, window, left)

            @torch.inference_mode()
            def see(chat):
                pixels, frames, times = decoded.result()
                pixels = pixels[None].to(chat.start_end.device)   # (1, T, 3, H, W)
                if pixels.device.type == "cpu" and self.size >= 224 and len(times) > 32:   # half a minute
                    fewer = f" (--num_frames 32 takes {32 / len(times):.0%})" * (not self.kind.has_clock)
                    seconds = seconds_of(chat.clip, len(times))
                    say(f"looking at {len(times)} frames, about {seconds:.0f} s{fewer}")
                rows = chat.video_tokens.see(chat.clip, pixels).cpu()
                damage = [str(w.message) for w in noticed if w.category is video.DamagedVideo]
                tensors = {"times": torch.tensor(times, dtype=torch.float64), "frames": frames, "rows": rows}
                about = {"duration": json.dumps(duration), "damage": json.dumps(damage)}
                self.cached(Store.put, key, tensors, about)
                return Seen(path, duration, window, times, frames, rows)
            try:
                yield see
            finally:
                left.set()
        for w in noticed:
            say(f"{w.message}")


# --------------------------------------------------------------------------------------------- a conversation
@dataclasses.dataclass
class Cost:
    """What an answer took."""
    cached: int             # tokens of its prompt that were known from the turns before
    new: int                # tokens of its prompt that were not
    times: list             # seconds until each token of the answer
    cut: str | None = None  # what ended it, if not the model: "context" or "max_new_tokens"


class Session:
    """A conversation about a video.

    video_tokens (K, D_llm): what stands in the prompt. turns: [(question, answer)], of which the first
    `forgotten` had to go. kv_cache, cached_ids: what the LLaMA has worked through, and its ids, VIDEO_INDEX
    for each row of the video. A prompt that begins alike is worked through only from where it differs, so a
    second question costs its own words. LinVT makes other rows for it, and then all from these rows on is
    worked through anew. cost: of the last answer, None before it."""
    def __init__(self, cfg, chat, viewer):
        self.cfg, self.chat, self.viewer, self.cost = cfg, chat, viewer, None
        self.kv_cache = chat.llm.new_cache(1, min(chat.llm.config.context_length, LONGEST))

    @torch.inference_mode()
    def rows_for(self, question, seen):
        """What was seen of a video -> its rows of the prompt (K, D_llm)."""
        return self.chat.embed_video(seen.rows.to(self.chat.start_end.device), [question])[0]

    def show(self, seen):
        """Begins a new conversation, about what was seen of a video."""
        video_tokens = self.rows_for("", seen)
        self.turns, self.forgotten, self.cached_ids = [], 0, []   # first: a Ctrl-C must not leave the new
        self.kv_cache.truncate(0)                                 # video with the old conversation
        self.seen, self.video_tokens = seen, video_tokens

    def open(self, path, window=None):
        """Looks at another video, or part of one. Raises UserError, and then everything is as it was."""
        with self.viewer.looking(path, window) as see:
            self.show(see(self.chat))

    @property
    def shipped(self):
        """Whether these are weights that lie beside this file."""
        cfg, beside = self.cfg, map(os.path.realpath, (Config.weights, cli.shipped("weights/tiny_time")))
        return os.path.realpath(cfg.weights) in beside and not cfg.branch and not cfg.chat

    def introduce(self):
        """Says what is looked at."""
        seen, (start, end) = self.seen, self.seen.window
        part = "" if end - start == seen.duration else f", {timestamp(start)} to {timestamp(end)}"
        say(f"video {seen.path}{part}: {end - start:.1f} s, {len(seen.times)} frames, "
            f"{len(self.video_tokens)} video tokens{', seen before' * seen.before}")
        if self.shipped and not os.path.samefile(os.path.dirname(seen.path) or ".", cli.shipped("assets")):
            say("(the shipped weights know coloured shapes and nothing else; README.md says how to get more)")

    def stats(self):
        """/stats: what the video and the last answer took."""
        K, cost = len(self.video_tokens), self.cost
        lines = [f"video: {K} tokens from {len(self.seen.times)} frames"]
        if self.viewer.kind.reads_linvt:
            units, N = self.seen.rows.shape[1:3]
            lines.append(f"LinVT: {units} units, {units * N} tokens seen, {K} given")
        if cost:
            lines.append(f"prompt: {cost.cached} tokens known, {cost.new} new")
        if cost and cost.times:
            lines.append(f"answer: the first token after {cost.times[0]:.2f} s, all {len(cost.times)} after "
                         f"{cost.times[-1]:.2f} s")
        return "\n".join([*lines, f"memory: {memory.resident(self.kv_cache.k[0].device) / 1e9:.2f} GB"])

    def need_linvt(self):
        if not self.viewer.kind.reads_linvt:
            raise UserError(f"explain: {self.cfg.tokens} tokens are the same for every question; those of "
                            "linvt and branch+linvt follow it")

    @torch.inference_mode()
    def shares(self):
        """Of LinVT -> (units, N): what share each token has in the last answer's rows; their sum is 1. Raises
        UserError."""
        self.need_linvt()
        if not self.turns:
            raise UserError("/explain: nothing has been asked yet")
        chat, (question, _) = self.chat, self.turns[0 if self.cfg.keep_tokens else -1]
        seen = self.seen.rows.to(chat.start_end.device)
        return chat.video_tokens.weigh(seen, *chat.embed_questions([question]))[0].mean(0).cpu()

    def prompt(self, question):
        """-> ids of the prompt, with the oldest turns forgotten where they leave no room for an answer; the
        same with VIDEO_INDEX for each row of the video (S); how many of these the LLaMA knows already; the
        room. Raises UserError where the question alone leaves none."""
        if re.search("[\0\ud800-\udfff\ufffd]", question):   # what bytes other than UTF-8 are read as
            raise UserError(f"a question must be UTF-8, and this is not: {ascii(question[:40])}")
        if self.viewer.kind.reads_linvt and not (self.cfg.keep_tokens and self.turns):
            rows = self.rows_for(question, self.seen)
            if not torch.equal(rows, self.video_tokens):   # a single unit is the same for all questions
                self.cached_ids = list(itertools.takewhile(lambda i: i != VIDEO_INDEX, self.cached_ids))
                self.video_tokens = rows
        cfg, K, context = self.cfg, len(self.video_tokens), self.kv_cache.max_len
        for forgotten in range(self.forgotten, len(self.turns) + 1):
            turns = [*self.turns[forgotten:], (question, None)]
            ids, _ = prompt_ids(self.chat.tokenizer, turns, self.viewer.kind.template)
            room = context - (len(ids) - 1 + K + len(self.chat.start_end))
            if room >= min(cfg.max_new_tokens, ROOM):
                break
        if room < 1:
            raise UserError(f"no room for an answer: the prompt has {context - room} tokens, {K} of them the "
                            f"video's, and a conversation {context}")
        for old, _ in self.turns[self.forgotten:forgotten]:
            say(f"(forgotten, for lack of room: {old})")
        self.forgotten = forgotten
        at, rows = ids.index(VIDEO_INDEX), K + len(self.chat.start_end)
        prompt = ids[:at] + [VIDEO_INDEX] * rows + ids[at + 1:]
        same = min(len(os.path.commonprefix([prompt, self.cached_ids])), len(prompt) - 1)
        return ids, prompt, same, room

    def fork(self, question):
        """-> another conversation, to ask `question` greedily. It copies what it needs of what the LLaMA has
        worked through, so that this one can go on."""
        other = copy.copy(self)
        other.cfg, other.turns, other.forgotten = dataclasses.replace(self.cfg, temperature=0.0), [], 0
        _, prompt, same, room = other.prompt(question)
        longest = len(prompt) + min(room, self.cfg.max_new_tokens + 10)   # 10: digits, side by side
        other.kv_cache = self.kv_cache.fork(same, longest)
        return other

    def ask(self, question, show):
        """Answers `question`: hands the text to `show`, piece by piece as it comes, then a line break. -> the
        ids of the answer.

        What was said becomes a turn of the conversation, also where Ctrl-C or an error breaks it off."""
        began, cfg, chat, tokens, said = time.perf_counter(), self.cfg, self.chat, [], ""
        ids, prompt, same, room = self.prompt(question)
        with torch.inference_mode():
            embeds = chat.splice(ids, self.video_tokens)[None]   # (1, S, D_llm)
        self.cached_ids = prompt[:same]   # first: a Ctrl-C must not leave more here than in the cache
        self.kv_cache.truncate(same)
        cost = self.cost = Cost(same, len(prompt) - same, [])

        def counted(new):
            for token in new:
                tokens.append(token)
                cost.times.append(round(time.perf_counter() - began, 6))
                yield token
        new = generate(chat.llm, embeds=embeds[:, same:], max_new_tokens=cfg.max_new_tokens, seed=cfg.seed,
                       temperature=cfg.temperature, top_p=cfg.top_p, stop_ids=chat.tokenizer.stop_ids,
                       kv_cache=self.kv_cache)
        try:
            for piece in stream_text(chat.tokenizer, counted(new)):
                said += piece
                show(CONTROL.sub("\ufffd", piece))
        finally:
            self.cached_ids = (prompt + tokens)[:self.kv_cache.length]   # however far it came
            if said.strip():
                self.turns.append((question, said.strip()))
            show("\n")
        if len(tokens) == room:
            cost.cut = "context"
            say(f"(cut: question and answer fill the {self.kv_cache.max_len} tokens of a conversation)")
        elif len(tokens) == cfg.max_new_tokens:
            cost.cut = "max_new_tokens"
            say(f"(cut after {cfg.max_new_tokens} tokens, see --max_new_tokens)")
        if cfg.verbose:
            say(self.stats())
        return tokens


def answer_line(session, question):
    """Asks in a conversation of its own -> the answer as a line, or as a JSON object."""
    pieces, session.turns, session.forgotten = [], [], 0
    session.ask(question, pieces.append)
    answer, cost = "".join(pieces), session.cost
    if not session.cfg.json:
        return " ".join(answer.split())
    return json.dumps({
        "question": question, "answer": answer.strip(), "tokens": len(cost.times), "cached": cost.cached,
        "seconds_to_first_token": cost.times[0] if cost.times else None, "cut": cost.cut})


# ------------------------------------------------------------------------------------- when does it happen?
def when(session, event, likely):
    """/when EVENT: a line of output for each time that the model names, and on standard error a bar over the
    clip; if `likely`, two more, of how likely each start and end was. /when: a line for each event that the
    model sees; /when --srt FILE also writes them as subtitles. Raises UserError."""
    if not session.viewer.kind.has_clock:
        raise UserError("/when: these weights have no clock; those for frame_cls have: weights/tiny_time or "
                        "VTimeLLM's (python -m weights get vtimellm)")
    path, (begin, end) = None, session.seen.window
    if event.startswith("--srt "):
        event, path = "", terminal.path_of(event.removeprefix("--srt ").strip())
        if os.path.lexists(path):
            raise UserError(f"{path}: is there already; choose another name")
    question = WHEN.replace("{}", event.lower().rstrip(".")) if event else ALL_EVENTS
    other = session.fork(question)
    tokens = other.ask(question, lambda piece: None)
    bars = start_and_end(other, tokens) if likely else [None, None]
    answer, length = CONTROL.sub("\ufffd", session.chat.tokenizer.decode(tokens)), end - begin
    timed = [(*span, event) for span in read_spans(answer, length)] if event else sorted(read_events(answer))
    rows = [{"event": text, "start": round(begin + min(a, b) * length, 3),
             "end": round(begin + max(a, b) * length, 3),
             "from": min(round(100 * a), 99), "to": min(round(100 * b), 99)} for a, b, text in timed]
    if session.cfg.json:
        nothing = {"event": event or None, **dict.fromkeys(("start", "end", "from", "to"))}
        for row in rows or [nothing]:
            row |= {"answer": answer.strip(), "p_start": bars[0], "p_end": bars[1]}
            print(json.dumps(row), flush=True)
    else:   # half a step of the clock; and times are written in tenths
        print(terminal.span_lines(rows, max(length / 200, 0.05), texts=not event), end="", flush=True)
    if not rows:
        return say(f"(the model did not name a time: {' '.join(answer.split())})")
    if event:
        inside = {k for row in rows for k in (row["from"], *range(*sorted((row["from"], row["to"]))))}
        terminal.show_bars({"start": bars[0], "end": bars[1], "": [k in inside for k in range(100)]})
    say(f"(a step of the clock, of 100, is {length / 100:.2f} s)")
    if path:
        cli.write_atomic(path, lambda f: f.write(terminal.subtitles(rows).encode()))
        say(f"wrote {path}")


def start_and_end(session, tokens):
    """Tokens of an answer that the LLaMA has just given -> how likely each of 00 to 99 was as its first start
    and, behind the start that it named, as the end: two lists of 100, or of None without a time."""
    tokenizer, cache = session.chat.tokenizer, session.kv_cache
    digits = [tokenizer.encode(str(digit))[-1] for digit in range(10)]
    named, bars = [m for m in SPAN.finditer(tokenizer.decode(tokens)) if read_spans(m[0], 1)], [None, None]
    for i in (1, 0) if named else ():   # the start last: it writes over what the cache has of the end
        place = named[0].start(2 * i + 1)   # of its first digit in the text
        at = next(n for n in range(len(tokens)) if len(tokenizer.decode(tokens[:n + 1])) > place)
        if tokens[at] not in digits:
            raise UserError("/when!: this LLaMA does not write numbers digit by digit; /when works")
        before = session.cost.cached + session.cost.new + at - 1
        cache.truncate(before)
        p = number_probabilities(session.chat.llm, cache, session.cached_ids[before], digits)
        bars[i] = [round(x, 6) for x in p.tolist()]
    return bars


# --------------------------------------------------------------------------------------------------- commands
def save_conversation(session, path):
    """/save FILE. Raises UserError; replaces nothing but what it has written before."""
    cli.replaceable(path, CONVERSATION.encode())
    cfg, seen = session.cfg, session.seen
    turns = [{"question": question, "answer": answer, "forgotten": i < session.forgotten}
             for i, (question, answer) in enumerate(session.turns)]
    about = {"video": os.path.abspath(seen.path), "duration": seen.duration, "window": seen.window,
             "times": seen.times, "weights": os.path.abspath(cfg.weights),
             "settings": dataclasses.asdict(cfg), "turns": turns}
    cli.write_atomic(path, lambda f: f.write(f"{CONVERSATION}, {json.dumps(about)[1:]}\n".encode()))
    say(f"wrote {path}")


def explain(session, path=None):
    """/explain: a line for each unit of the video that has 5 % or more of the last answer's rows, heaviest
    first; with `path`, a picture of all units. Raises UserError."""
    shares, seen, window = session.shares(), session.seen, session.viewer.kind.window or 1   # (units, N)
    units, (start, end), T = shares.sum(1).tolist(), seen.window, len(seen.times)
    edges = [start + min(i, T) / T * (end - start) for i in range(0, T + window, window)]
    names = [f"{a:.1f}-{b:.1f} s  {100 * share:.0f} %" for a, b, share in zip(edges, edges[1:], units)]
    if path is None:
        heavy = sorted((i for i, share in enumerate(units) if share >= 0.05), key=lambda i: -units[i])
        others = f"all else  {100 * sum(share for share in units if share < 0.05):.0f} %"
        return say("\n".join([names[i] for i in heavy] + [others] * (len(heavy) < len(units))))
    side, places = math.isqrt(shares.shape[1]), None
    if session.chat.video_tokens.linvt.w_token is not None:   # else a unit's patches are chosen all alike
        places = shares[:, :side ** 2].unflatten(1, (side, side))
        if shares.shape[1] > side ** 2:   # CLS has no place
            names = [f"{name}, whole frame {100 * s:.0f} %" for name, s in zip(names, shares[:, -1])]
    middles = [min(i * window + window // 2, T - 1) for i in range(len(units))]
    said = "\n".join(session.turns[-1])
    pictures.explanation(path, said, edges, units, names, seen.frames[middles], places)
    say(f"wrote {path}")


def settings(session, name=None, value=None):
    """/set NAME VALUE changes what counts for the next answers, and shows it; without a value it shows it,
    without a name all. Raises UserError, and then everything is as it was."""
    if name not in (None, *SETTINGS):
        raise UserError(f"/set {name}: can be changed are {', '.join(SETTINGS)}")
    if value is not None:
        try:
            value = getattr(cli.parse(Config, [f"--{name}={value}"]), name)
        except UserError as e:   # which names a flag
            raise UserError(str(e).replace("--", "/set ", 1))
        session.cfg = dataclasses.replace(session.cfg, **{name: value})
    for setting in SETTINGS if name is None else [name]:
        say(f"{setting} {getattr(session.cfg, setting)}")


def run_command(session, line):
    """A line that begins with "/". -> False where it asks to leave. Raises UserError."""
    command, _, rest = ALIASES.get(line.removeprefix("/"), line).partition(" ")
    words, path = rest.split(), terminal.path_of(rest.strip())
    match command, len(words):
        case "/quit", 0:
            return False
        case "/help", 0:
            say(HELP)
        case "/when", _ if rest.strip() != "--srt":
            when(session, rest.strip(), likely=False)
        case "/when!", n if n:
            when(session, rest.strip(), likely=True)
        case "/reset", 0:
            session.show(session.seen)
            say("a new conversation")
        case "/frames", 0:
            terminal.show_frames(session.seen.frames, session.seen.times)
        case "/frames", _:
            pictures.contact_sheet(session.seen.frames, session.seen.times, path)
            say(f"wrote {path}")
        case "/video", n if n:
            path, window = terminal.path_and_part(rest.strip())
            session.open(path or session.seen.path, window)
            session.introduce()
        case "/explain", _:
            explain(session, path or None)
        case "/set", n if n <= 2:
            settings(session, *words)
        case "/stats", 0:
            say(session.stats())
        case "/save", n if n:
            save_conversation(session, path)
        case _:
            usage = [entry for entry in HELP.splitlines() if entry.split()[0] == command]
            advice = cli.meant("/", command[1:], re.findall(r"^/(\S+)", HELP, re.M), "/help")
            raise UserError("\n".join(usage) or f"{line}: not a command; {advice}")
    return True


def converse(session):
    """Questions and commands from a terminal, until one says to leave. No mistake in a line ends it."""
    while True:
        try:
            line = terminal.read_line("> ").strip()
        except EOFError:
            return say("")
        except KeyboardInterrupt:
            say("\nCtrl-D or /quit leaves")
            continue
        try:
            if line.startswith("/") or line in ALIASES:
                if not run_command(session, line):
                    return
            elif question := terminal.rest_of(line) if line.startswith(terminal.QUOTES) else line:
                session.ask(question, functools.partial(print, end="", flush=True))
        except KeyboardInterrupt:
            say("(stopped)")
        except UserError as e:
            say(str(e))


# ------------------------------------------------------------------------------------------------------- main
def begin(cfg):
    """Opens the weights and looks at the video -> Session. Raises UserError."""
    began, device = time.perf_counter(), training.pick_device(cfg.device)
    opened = open_chat(cfg.weights, cfg.tokens, cfg.branch, cfg.chat if cfg.tuned else False)
    memory.prepare_cpu(opened.chat)
    dtype, scheme, precision = memory.choose(cfg.dtype, cfg.quantize, device, opened.chat.llm)
    viewer = Viewer(cfg, opened, f"{precision} on {device.type}")
    memory.check(opened.need, dtype, scheme, device, viewer.frames_of())   # of the longest video
    with viewer.looking(cfg.video, (cfg.start, math.inf if cfg.end is None else cfg.end)) as see:
        cfg = dataclasses.replace(cfg, tokens=opened.tokens)
        session = Session(cfg, opened.load(dtype, scheme, device), viewer)
        loaded = time.perf_counter()
        session.show(see(session.chat))
    session.introduce()
    choice = os.path.exists(os.path.join(cfg.weights, "linvt.bin")) and not viewer.kind.reads_linvt
    say(f"weights {cfg.weights}: {opened.description}, {precision}"
        + "; --tokens branch+linvt for long videos" * choice)
    if cfg.verbose:
        waited = time.perf_counter() - loaded
        say(f"(weights {loaded - began:.2f} s, then waited for the video {waited:.2f} s)")
    return session


def main(cfg):
    cli.check(cfg, tokens=VIDEO_TOKENS)
    if not cfg.question and sys.stdin.isatty() and (cfg.json or cfg.explain):
        raise UserError("--json and --explain: go with -q; a conversation has /save FILE and /explain PNG")
    if not all(map(str.strip, cfg.question or ())):
        raise UserError("--question: it is empty")
    session = begin(cfg)
    if cfg.explain:   # now, not after the answer
        session.need_linvt()
        cli.replaceable(cfg.explain, pictures.MARK)
    if cfg.question:
        lines = cfg.question
    elif sys.stdin.isatty():
        sys.stdin.reconfigure(errors="surrogateescape")   # names of files need not be UTF-8
        say("Ask about the video; /help lists commands, Ctrl-D leaves.")
        if session.shipped and session.cfg.tokens in KNOWN:
            say(f"These weights know {KNOWN[session.cfg.tokens]}")
        with terminal.history(os.path.join(cli.own_folder("XDG_STATE_HOME", "~/.local/state"), "history")):
            return converse(session)
    else:
        utf16 = sys.stdin.buffer.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff")   # byte order marks: PowerShell's
        sys.stdin.reconfigure(encoding="utf-16" if utf16 else "utf-8-sig", errors="replace")
        lines = sys.stdin
    for line in map(str.strip, lines):
        if line.startswith("/"):
            if not run_command(session, line):
                break
        elif line:
            print(answer_line(session, line), flush=True)
    if cfg.explain:
        explain(session, cfg.explain)


if __name__ == "__main__":
    cli.run(main, CONFIG)
