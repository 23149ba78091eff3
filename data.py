"""Video files -> clip tensors: frames by time, the pixels that CLIP sees, data sets.

    python data.py video.mp4    # what it is, and a picture of its frames with their times   -> out/sheet.png

First half: clips and their captions, all that pretraining reads. Second half: events and conversations.
A clip is always (T, 3, H, W) and a batch (B, T, 3, H, W), uint8 RGB. Time is counted in seconds from the
moment at which the first frame is shown. plumbing/video.py finds frames in a file, and lets no file do harm.
"""
import dataclasses
import math
from typing import Annotated

from plumbing import cli


@dataclasses.dataclass
class Config:
    video: str                  # the file to look at
    num_frames: Annotated[int, 1, 1000] = 16   # frames on the sheet
    rule: Annotated[str, "uniform", "seq", "test", "train", "linspace"] = "uniform"   # that chooses them
    start: cli.Seconds = 0      # of its part to show: seconds, m:ss or h:mm:ss
    end: cli.Seconds = math.inf   # its end
    out: str = "out/sheet.png"  # the contact sheet


if __name__ == "__main__":
    CONFIG = cli.start(Config, positional=["video"])   # before the slow imports: a typing error shows at once

import array
import bisect
import contextlib
import csv
import itertools
import json
import os
import types

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from plumbing.cli import UserError
from plumbing.pictures import contact_sheet, thumbnail
from plumbing.store import ANEW, Store, state_of
from plumbing.video import EXTENSIONS, TOLERANCE, VideoError, open_regular, open_video
from plumbing.weightfile import read_file

PICTURES = ["PNG", "JPEG", "WEBP", "BMP", "TIFF"]   # Pillow's names: no format that runs another program


# -------------------------------------------------------------------------------------------- frames by time
def probe(path):
    """What a video file is -> duration: seconds, from the first frame shown to the end of the last one; fps:
    frames a second on average, as the container has it, else 0; width, height: pixels, as shown; rotation:
    degrees clockwise from the stored to the shown picture; codec. Decodes one frame. Raises VideoError."""
    with open_video(path) as video:
        height, width = video.shown_size
        return types.SimpleNamespace(
            duration=video.seconds(video.end()), fps=float(video.stream.average_rate or 0), width=width,
            height=height, rotation=-video.first.rotation % 360, codec=video.context.codec.canonical_name)


def frames(path, times):
    """The pictures that a viewer sees at `times` (seconds, ascending, repeats welcome). Yields (t, picture).
    t: the time at which this frame really appears. picture: (3, H, W) uint8 RGB, upright, with square pixels.

    A frame stays until the next one: at t one sees the last frame that began at or before t; before the first
    one the first, after the end the last readable one. Frames are taken as progressive, and light as it is
    coded: HDR is not tone-mapped. Raises VideoError. Warns of DamagedVideo where frames are missing."""
    assert all(a <= b for a, b in itertools.pairwise(times)), f"times must ascend: {times}"
    with open_video(path) as video:
        yield from video.pictures([video.tick(t) for t in times])


def sample_frames(path, num_frames, rule, seed=None, window=None):
    """`num_frames` frames spread over a video by a rule. Yields (t, picture) as `frames` does.

    "uniform": the middles of equal stretches of time, (i + 0.5) / T * duration; needs no frame count (chat).
    "seq", "test", "train", "linspace": frame numbers by the rules below; frames are counted, without decoding
    any. seed: whatever numpy.random.default_rng takes, for "train". window: (start, end) in seconds, that
    part alone. Raises UserError and VideoError."""
    start, end = window or (0, math.inf)
    if not 0 <= start < end:
        raise UserError(f"{path}: a window from {start} to {end} s; it must start at 0 or later, then end")
    with open_video(path) as video:
        duration = video.seconds(video.end()) if start or rule == "uniform" else math.inf
        if start and start >= duration:
            raise UserError(f"{path}: a window from {start} s on, of a video of {duration:.2f} s")
        if rule == "uniform":
            end = min(end, duration)
            chosen = [video.tick(start + (i + 0.5) / num_frames * (end - start)) for i in range(num_frames)]
        else:
            ticks = video.all_ticks()
            first, last = (bisect.bisect_left(ticks, t - TOLERANCE, key=video.seconds) for t in (start, end))
            ticks = ticks[first:last] or [ticks[max(first - 1, 0)]]   # between two frames: the first of them
            rng = np.random.default_rng(seed)
            chosen = [ticks[i] for i in INDEX_RULES[rule](len(ticks), num_frames, rng)]
        yield from video.pictures(chosen)


def get_seq_frames(n, num_frames, rng=None):
    """Video-ChatGPT's rule of that name: middles of num_frames stretches of n frames, or all n if fewer."""
    m = min(n, num_frames)
    bounds = [round((n - 1) / m * i) for i in range(m + 1)]   # half to even, here and below, as numpy rounds
    return [(a + b) // 2 for a, b in itertools.pairwise(bounds)]


def uniform_sample_test(n, num_frames, rng=None):
    """mmaction2's UniformSample at test time. It often differs from get_seq_frames by one frame."""
    stretch = (n - 1) / num_frames
    return [round(stretch * i) + int(stretch / 2) for i in range(num_frames)]


def uniform_sample_train(n, num_frames, rng):
    """mmaction2's UniformSample in training: one frame at random from each stretch, both ends included."""
    bounds = [round((n - 1) / num_frames * i) for i in range(num_frames + 1)]
    return [int(rng.integers(a, b, endpoint=True)) for a, b in itertools.pairwise(bounds)]


def truncated_linspace(n, num_frames, rng=None):
    """VTimeLLM's rule: from the first frame to the last, evenly, cut down to whole numbers."""
    return np.linspace(0, n - 1, num_frames).astype(int).tolist()


INDEX_RULES = {"seq": get_seq_frames, "test": uniform_sample_test, "train": uniform_sample_train,
               "linspace": truncated_linspace}


# ---------------------------------------------------------------------------------------------------- pixels
def resize(frames, height, width, mode="bilinear"):
    """uint8 (T, 3, H, W) -> uint8 (T, 3, height, width), no antialiasing, rounded. "bilinear" is as OpenCV's
    INTER_LINEAR. OpenCV 5.0.0 computes in fixed point: of noise, one value in eight differs by 1."""
    resized = (F.interpolate(frame[None].float(), (height, width), mode=mode) for frame in frames)
    return torch.cat([x.round().clamp(0, 255).byte() for x in resized])   # floats take four times the room


def short_side(frames, short):
    """uint8 (T, 3, H, W) -> the same with min(H, W) = short; the long side is int(x + 0.5), as in mmcv."""
    height, width = frames.shape[-2:]
    scale = short / min(height, width)
    return resize(frames, int(height * scale + 0.5), int(width * scale + 0.5))


def train_pixels(frames, size, seed=None, min_area=0.08):
    """uint8 (T, 3, H, W) -> uint8 (T, 3, size, size): short side to 256/224 of size, then one crop per clip.

    The crop has min_area..1 of the area and an aspect of 3/4..4/3 (log-uniform); after 10 tries that do not
    fit, the largest centred square. seed: whatever numpy.random.default_rng takes."""
    frames = short_side(frames, round(size * 256 / 224))
    top, left, height, width = random_crop(*frames.shape[-2:], np.random.default_rng(seed), min_area)
    return resize(frames[:, :, top:top + height, left:left + width], size, size)


def random_crop(height, width, rng, min_area):
    """-> top, left, height, width of a random part of a picture of height x width; see train_pixels."""
    for _ in range(10):
        area = height * width * rng.uniform(min_area, 1)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = max(1, round(math.sqrt(area * aspect))), max(1, round(math.sqrt(area / aspect)))
        if w <= width and h <= height:
            top, left = (int(rng.integers(room, endpoint=True)) for room in (height - h, width - w))
            return top, left, h, w
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def eval_pixels(frames, size, short=None):
    """uint8 (T, 3, H, W) -> uint8 (T, 3, size, size): short side to `short` (default: size), centre crop."""
    short = short or size
    assert short >= size, f"a short side of {short} pixels is too small for a crop of {size}"
    frames = short_side(frames, short)
    top, left = ((side - size) // 2 for side in frames.shape[-2:])
    return frames[:, :, top:top + size, left:left + size]


def bicubic_pixels(frames, size):
    """uint8 (T, 3, H, W) -> uint8 (T, 3, size, size): short side to `size`, bicubic, centre crop. So VTimeLLM
    saw frames, through torchvision before 0.17; what it left as floats beyond 0..255 is rounded here."""
    height, width = (int(size * side / min(frames.shape[-2:])) for side in frames.shape[-2:])
    top, left = (round((side - size) / 2) for side in (height, width))   # half to even
    return resize(frames, height, width, "bicubic")[:, :, top:top + size, left:left + size]


def squash(frames, size):
    """uint8 (T, 3, H, W) -> uint8 (T, 3, size, size), whatever that does to the aspect: what chat shows. By
    nearest neighbour. The released chat does this on floats and rounds: the same values."""
    return F.interpolate(frames, (size, size), mode="nearest")


# ------------------------------------------------------------------------------------------- annotation files
@contextlib.contextmanager
def opened(path):
    """A UTF-8 file, to be read. Raises UserError where it cannot be."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            yield f
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}")
    except UnicodeDecodeError as e:
        looks = "UTF-16" if b"\0" in e.object else "Latin-1, or another encoding of one byte a letter"
        raise UserError(f"{path}: not UTF-8 text; it looks like {looks}")


def read_text(path):
    """A UTF-8 file -> str. Raises UserError."""
    with opened(path) as f:
        text = f.read()
    if "\0" in text:
        raise UserError(f"{path}: not UTF-8 text; it looks like UTF-16")
    return text


def no_key_twice(pairs):
    """The pairs of a JSON object -> dict; json.loads would keep the last of two values and say nothing."""
    if len(row := dict(pairs)) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return row


def json_lines(path, text):
    """The text of a file of JSON lines -> [(where, row)]. Raises UserError with the line."""
    rows = []
    for number, line in enumerate(text.split("\n"), 1):   # splitlines would split at U+2028, too
        try:
            if line.strip():
                rows.append((f"{path}, line {number}", json.loads(line, object_pairs_hook=no_key_twice)))
        except ValueError as e:
            raise UserError(f"{path}, line {number}: not valid JSON ({e})")
    return rows


def read_rows(path):
    """JSON lines, or one JSON value -> [(where, row)], `where` for messages. A list is its entries, anything
    else one row. Raises UserError with the line."""
    text = read_text(path)
    try:
        whole = json.loads(text, object_pairs_hook=no_key_twice)
    except ValueError:   # not one JSON value: JSON lines, or damage that a line will show
        rows = json_lines(path, text)
    else:
        entries = isinstance(whole, list)
        rows = [(f"{path}, entry {i}", row) for i, row in enumerate(whole, 1)] if entries else [(path, whole)]
    if not rows:
        raise UserError(f"{path}: no rows in it")
    for where, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{where}: not a JSON object, but {type(row).__name__}")
    return rows


def field(row, where, name, kind=str):
    """row[name], checked. Raises UserError that names the line."""
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, kind) or not value or isinstance(value, str) and not value.strip():
        raise UserError(f"{where}: needs {name!r}, a {kind.__name__} that is not empty")
    return value


def read_captions(path):
    """JSON lines {"video", "caption"}, or WebVid's CSV (a name that ends in .csv), whose header names the
    columns: 2M has the caption second, 10M fifth. Yields (video, caption). Raises UserError with the line."""
    if not os.fspath(path).lower().endswith(".csv"):
        yield from ((field(row, at, "video"), field(row, at, "caption")) for at, row in read_rows(path))
        return
    with opened(path) as f:   # gigabytes: row by row
        rows = csv.DictReader(f, strict=True)
        try:
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                if None in row or None in row.values():
                    raise UserError(f"{where}: has not as many columns as the header, {len(rows.fieldnames)}")
                video = os.path.join(row.get("page_dir", ""), field(row, where, "videoid") + ".mp4")
                yield video, field(row, where, "name")
        except csv.Error as e:
            raise UserError(f"{path}, line {rows.reader.line_num}: not valid CSV ({e})")


def locate(root, name):
    """The file of a video that annotations name, maybe without extension or as Video-ChatGPT's `<id>.pkl`."""
    path = os.path.join(root, name.removesuffix(".pkl"))
    endings = ["", *EXTENSIONS, *map(str.upper, EXTENSIONS)]
    return next(filter(os.path.isfile, (path + ending for ending in endings)), path)


# --------------------------------------------------------------------------------------- videos with captions
class CaptionDataset(Dataset):
    """Videos with captions, as training sees them. Item (epoch, i) -> (pixels (T, 3, H, W) uint8, ids
    (context_length,), i); the VideoError in the place of a broken video.

    annotations: see read_captions. tokenizer(text, context_length) -> (1, context_length). Frames and crop
    follow from (seed, epoch, i). Raises UserError."""
    def __init__(self, annotations, root, num_frames, image_size, tokenizer, context_length=64, seed=0,
                 min_area=0.08):
        # Rows end to end in one array. Ten million Python strings take three times the room, and each process
        # of a loader would have its own, since counting a reference is a write.
        self.text, self.ends = bytearray(), array.array("q", [0])
        for row in read_captions(annotations):
            self.text += "\0".join(row).encode(errors="replace")   # JSON can spell half of a pair
            self.ends.append(len(self.text))
        self.root, self.num_frames, self.image_size = root, num_frames, image_size
        self.tokenizer, self.context_length = tokenizer, context_length
        self.seed, self.min_area = seed, min_area

    def __len__(self):
        return len(self.ends) - 1

    def row(self, i):
        """-> video, as in the file; caption."""
        return self.text[self.ends[i]:self.ends[i + 1]].decode().split("\0", 1)

    def __getitem__(self, key):
        epoch, i = key
        rng, (video, caption) = np.random.default_rng((self.seed, epoch, i)), self.row(i)
        try:
            found = sample_frames(locate(self.root, video), self.num_frames, "train", rng)
            clip = torch.stack([picture for _, picture in found])
        except VideoError as e:
            return e
        pixels = train_pixels(clip, self.image_size, rng, self.min_area)
        return pixels, self.tokenizer(caption, self.context_length)[0], i


def collate_skip(items):
    """Items of one of these data sets -> {"pixels" (B, T, 3, H, W) uint8, "index": a list of B, "text", where
    there is some: ids (B, S) or B conversations, "skipped": messages of broken videos}. B is what is left."""
    good = [item for item in items if not isinstance(item, VideoError)]
    if len({pixels.shape for pixels, *_ in good}) > 1:
        raise UserError("pictures and videos, or videos of several lengths, in one batch; put them into "
                        "annotation files of their own, or side by side with --in_order")
    columns = [torch.stack(c) if isinstance(c[0], torch.Tensor) else c for c in zip(*good)]
    pixels, *text, index = columns or (torch.empty(0), ())
    skipped = [str(item) for item in items if isinstance(item, VideoError)]
    return {"pixels": pixels, "index": index, "skipped": skipped, **({"text": text[0]} if text else {})}


class RetrievalDataset(Dataset):
    """Videos, each with a caption or a label, as an evaluation sees them. Item i -> (pixels (T, 3, H, W)
    uint8, i). rows: (video, caption) each. rule: of frames. short: see eval_pixels.

    Raises UserError for missing videos: now, not after an epoch. A broken one raises VideoError. With `skip`,
    items of both are their VideoError."""
    def __init__(self, rows, root, num_frames, image_size, short=None, rule="uniform", skip=False):
        self.videos, self.captions = map(list, zip(*rows))
        self.root, self.num_frames, self.rule, self.skip = root, num_frames, rule, skip
        self.image_size, self.short = image_size, short
        missing = [v for v in dict.fromkeys(self.videos) if not os.path.isfile(locate(root, v))]
        if missing and not skip:
            raise UserError(f"{root}: lacks {len(missing)} of {len(set(self.videos))} videos, the first is "
                            f"{missing[0]}")

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, i):
        path = locate(self.root, self.videos[i])
        try:   # one by one: sixty-four pictures as filmed take hundreds of megabytes
            found = sample_frames(path, self.num_frames, self.rule)
            pixels = [eval_pixels(picture[None], self.image_size, self.short) for _, picture in found]
        except VideoError as e:
            if self.skip:
                return e
            raise
        return torch.cat(pixels), i


# ----------------------------------------------------------------------------------- events and conversations
def clock(seconds, duration):
    """A moment of a video, both in seconds, on VTimeLLM's clock of 100 steps: "00" to "99"."""
    return f"{min(round(seconds / duration * 100), 99):02d}"


def two_numbers(span):
    return isinstance(span, list) and [type(t) in (int, float) for t in span] == [True, True]


def seconds(span, where):
    """[start, end], as JSON has it -> the same. Raises UserError unless these are times, in order."""
    if not two_numbers(span) or not 0 <= span[0] <= span[1] < math.inf:
        raise UserError(f"{where}: needs a start, then an end, in seconds of what is shown, not {span}")
    return span


def shown(window, duration, where):
    """The part [start, end] of a video that is shown, or None, and how long the video is, or None, in seconds
    -> both. Raises UserError where that is nothing."""
    for start, end in (seconds(span, where) for span in (window, duration and [0, duration]) if span):
        if start == end:
            raise UserError(f"{where}: nothing is shown from {start} to {end} s")
    return window, duration


def timed(row, where):
    """A row of JSON lines about events, {"video", "events": [{"start", "end", "text"}]}, in seconds of the
    video, maybe with "window": [start, end], if only that part is shown, and the video's "duration" ->
    {"video", "window": [start, end] or None, "duration": seconds or None, "events": [(start, end, text)]} in
    seconds of the window. Raises UserError with the line."""
    (window, duration), events = shown(row.get("window"), row.get("duration"), where), []
    first = window[0] if window else 0
    for event in field(row, where, "events", list):
        text = field(event, where, "text").strip()
        start, end = seconds([event.get("start"), event.get("end")], where)
        events.append((start - first, end - first, text))
    return {"video": field(row, where, "video"), "window": window, "duration": duration, "events": events}


def clip_length(path, window=None, duration=None):
    """Seconds of a video, or of its part in a window. duration: of the video, where that is known. Raises
    VideoError."""
    start, end = window or (0, math.inf)
    duration = duration or probe(path).duration
    if not start < min(end, duration):
        until = f"to {end:g} s" if end < math.inf else "s on"
        raise VideoError(path, f"nothing is from {start:g} {until}, of a video of {duration:.2f} s")
    return min(end, duration) - start


@dataclasses.dataclass
class Talk:
    """Questions and answers about a video, a part of it, or a picture."""
    files: list              # as the annotations name it; several, if videos follow each other
    turns: list              # [(question, answer)]
    picture: bool
    window: list | None      # [start, end] of the part, in seconds of the video; None: all of it
    duration: float | None   # of what is shown, in seconds; None: the file says it
    times: dict              # {"<s0>": seconds of what is shown}: words in turns that stand for times
    kind: str                # of question, for tables

    def paths(self, root):
        return [locate(root, file) for file in self.files]

    def said(self, root):
        """-> turns, with times as the clock tells them. Raises VideoError if the file cannot say how long it
        is."""
        if self.times and not self.duration:   # kept: a file is asked once
            self.duration = clip_length(self.paths(root)[0], self.window)
        said = [*itertools.chain(*self.turns)]
        for word, t in self.times.items():
            said = [text.replace(word, clock(t, self.duration)) for text in said]
        return list(zip(said[::2], said[1::2]))


def talk_of(row, where, number=0):
    """A row of an annotation file -> Talk. Raises UserError with the line. It is one of

    {"video" or "image": path, "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}, ...]}:
        Video-ChatGPT's. The marker "<video>" or "<image>" leaves a question, unless it stands amid words.
    the same with "id", the video's name, and "meta": {"split": [start, end], "duration", "token": {"<s0>":
        seconds, ...}}: VTimeLLM's; duration and token count from the start of the split.
    {"video", "question", "answer"}: your own, maybe with "window": [start, end] of a part, in seconds; or
        {"video_id", "q", "a"}: VideoInstruct's as released.
    {"video", "messages": [{"role": "user", "content"}, {"role": "assistant", "content"}, ...]}: OpenAI's.
    {"videos": [path, ...], "conversations"}: videos that follow each other, each with its own frames.
    {"video", "events"}: see timed. Its questions are drawn by the row's number: see dialogue."""
    if "events" in row:
        file, window, duration, events = timed(row, where).values()
        duration = duration and clip_length(f"{where}: {file}", window, duration)
        said, times = dialogue(events, number)
    else:
        name = next((name for name in ("videos", "image", "video", "video_id", "id") if name in row), "video")
        file = field(row, where, name, list if name == "videos" else str)
        said, meta = turns(row, where), field(row, where, "meta", dict) if row.get("meta") else {}
        window, duration = shown(meta.get("split") or row.get("window"), meta.get("duration"), where)
        times = field(meta, where, "token", dict) if meta.get("token") else {}
    for t in times.values():
        seconds([0, t], where)
    files = file if isinstance(file, list) else [file]
    if not all(file and isinstance(file, str) for file in files):
        raise UserError(f"{where}: needs 'videos', a list of names")
    return Talk(files, said, "image" in row, window, duration, times, row.get("kind", "all"))


ASK_WHEN = ("When does this happen: {}?", "From when to when is this: {}?", "At what time is this seen: {}?",
            "Which part of the video shows this: {}?", "When does this begin and end: {}?")
ASK_WHAT = ("What happens from {} to {}?", "What is seen from {} to {}?", "What goes on between {} and {}?",
            "Describe the video from {} to {}.", "Which event lasts from {} to {}?")
ASK_ALL = ("What happens in the video, and when? List all events.", "Which events are there, and when?",
           "Describe all events, each with its time.", "Tell what happens, with beginnings and ends.",
           "Make a timeline of the video.")


def dialogue(events, seed):
    """events [(start, end, text)] -> turns, {word: seconds}: see Talk. As in VTimeLLM's second stage, one
    dialogue in five is a question about all events; else each is asked for once, by its words or its time."""
    rng, turns, times = np.random.default_rng(seed), [], {}
    for i, (start, end, text) in enumerate(events):
        times |= {f"<s{i}>": start, f"<e{i}>": end}
        text = text.rstrip(".")
        by_words = str(rng.choice(ASK_WHEN)).format(text.lower()), f"From <s{i}> to <e{i}>."
        by_time = str(rng.choice(ASK_WHAT)).format(f"<s{i}>", f"<e{i}>"), f"{text}."
        turns.append(by_words if rng.random() < 0.5 else by_time)
    if rng.random() < 0.2:
        listed = (f"From <s{i}> to <e{i}>, {text.rstrip('.')}." for i, (*_, text) in enumerate(events))
        return [(str(rng.choice(ASK_ALL)), " ".join(listed))], times
    rng.shuffle(turns)
    return turns, times


def turns(row, where):
    """A row as talk_of describes it -> [(question, answer), ...]. Raises UserError."""
    asked = next((names for names in (("question", "answer"), ("q", "a")) if names[0] in row), None)
    if asked:
        said = [field(row, where, name) for name in asked]
    else:
        messages, who, what, *speakers = "conversations", "from", "value", "human", "gpt"
        if "messages" in row:
            messages, who, what, *speakers = "messages", "role", "content", "user", "assistant"
        said = [field(m, where, what) for m in field(row, where, messages, list)]
        if [m.get(who) for m in row[messages]] != speakers * (len(said) // 2):
            raise UserError(f"{where}: {messages} must go {speakers[0]}, {speakers[1]}, {speakers[0]}, ...")
    questions = [text.strip().replace("<image>", "<video>") for text in said[::2]]
    first = questions[0].removeprefix("<video>").removesuffix("<video>")
    later = [text.replace("<video>", "") for text in questions[1:]]
    return [(q.strip(), a.strip()) for q, a in zip([first, *later], said[1::2])]


# ---------------------------------------------------------------------------------- videos with conversations
class ConversationDataset(Dataset):
    """Questions and answers about videos or pictures. Item i -> (pixels (T, 3, H, W) uint8, [(question,
    answer), ...], i). A picture is a clip with T = 1. rule, pixels: of a kind of video tokens, so that frames
    are chosen and become pixels as in a chat. features: Features, whose tensors come in the place of pixels.

    annotations: rows as talk_of reads them. skip: a broken file gives its VideoError, else raises it."""
    features = None

    def __init__(self, annotations, root, num_frames, image_size, skip=False, rule="uniform", pixels=squash):
        self.talks = [talk_of(row, where, i) for i, (where, row) in enumerate(read_rows(annotations))]
        self.root, self.num_frames, self.image_size, self.skip = root, num_frames, image_size, skip
        self.rule, self.pixels = rule, pixels

    def __len__(self):
        return len(self.talks)

    def __getitem__(self, i):
        talk = self.talks[i]
        try:
            seen = torch.cat([self.seen(talk, path) for path in talk.paths(self.root)])
            return seen, talk.said(self.root), i
        except VideoError as e:
            if self.skip:
                return e
            raise

    def seen(self, talk, path):
        if self.features:
            return self.features.get(talk, path)
        if talk.picture:
            found = [(0.0, read_picture(path))]
        else:
            found = sample_frames(path, self.num_frames, self.rule, window=talk.window)
        return torch.cat([self.pixels(picture[None], self.image_size) for _, picture in found])


class Features:
    """What frozen weights said of videos, a tensor for each file and window: entries of a Store and, in the
    same folder, NAME.npy as VTimeLLM released them. made: what entries follow from beside file and window.
    shape: (T, P) of a video's NAME.npy; a picture's has (P,)."""
    def __init__(self, folder, made, shape):
        self.folder, self.store, self.made, self.shape = folder, Store(folder), made, shape

    def key(self, talk, path):
        return [state_of(path), talk.window, self.made]

    def file(self, talk, path):
        """Where its tensor is, or will be. A video that is not there has a NAME.npy at most."""
        released = os.path.join(self.folder, f"{os.path.splitext(os.path.basename(path))[0]}.npy")
        if os.path.exists(released) or not os.path.exists(path):
            return released
        return self.store.path(self.key(talk, path))

    def get(self, talk, path):
        """-> tensor in fp16, or pixels. Raises VideoError where there is none, UserError for a NAME.npy that
        is damaged or of another shape."""
        file = self.file(talk, path)
        if not os.path.exists(file):
            raise VideoError(path, f"has no features in {self.folder}")
        if not file.endswith(".npy"):
            return read_file(file, ANEW)["seen"]
        try:
            seen = np.lib.format.open_memmap(file, mode="r")   # executes nothing
        except (OSError, ValueError) as e:
            raise UserError(f"{file}: holds no features ({e})")
        if seen.shape not in (self.shape, self.shape[1:]) or seen.dtype.kind != "f":
            raise UserError(f"{file}: features {seen.shape} {seen.dtype}, needed are floats {self.shape}")
        return torch.from_numpy(np.array(seen, np.float16)).view(-1, self.shape[-1])


def read_picture(path):
    """A picture file -> (3, H, W) uint8 RGB, upright. Raises VideoError."""
    with open_regular(path) as f:
        try:
            picture = ImageOps.exif_transpose(Image.open(f, formats=PICTURES)).convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            kinds = ", ".join(PICTURES)
            raise VideoError(path, f"not a picture that can be read ({kinds}; {type(e).__name__})")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)   # (H, W, 3) -> (3, H, W)


# ------------------------------------------------------------------------------------------------------ main
def main(cfg):
    found = probe(cfg.video)
    print(f"{cfg.video}: {found.codec}, {found.width} x {found.height}, turned by {found.rotation} degrees, "
          f"{found.fps:.2f} frames/s, {found.duration:.2f} s")
    found = sample_frames(cfg.video, cfg.num_frames, cfg.rule, 0, (cfg.start, cfg.end))
    times, pictures = zip(*((t, thumbnail(picture)) for t, picture in found))
    cli.make_folder(os.path.dirname(os.path.abspath(cfg.out)))
    contact_sheet(torch.stack(pictures), times, cfg.out)
    print(f"{cfg.out}: {len(times)} frames, at {', '.join(f'{t:.2f}' for t in times)} s")


if __name__ == "__main__":
    cli.run(main, CONFIG)
