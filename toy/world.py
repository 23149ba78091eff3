"""The toy world: coloured shapes that move, as real video files. Every claim of the method is true or false.

A clip is 64x64, 2 s, H.264 in MP4. It shows one shape on a grey ground that does one thing, or two things in
turn. Every clip has a *twin*: the same frames played backwards, with its own caption. An order-blind model
gives both twins the same embedding, so it cannot choose between their captions: 50 % is a provable ceiling.
Frames are coded one by one with a constant quantiser, so that twins hold the same pictures to the bit. Middle
frames of equal stretches of time are the same ones forwards and backwards. A quarter of the combinations of
colour, shape and motion never occur in training: the test set has only those.
"""
import dataclasses
import itertools
import math
import multiprocessing
import os
import signal

import av
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

import data
from plumbing import cli, pictures

ASSETS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "assets")
SIZE, FPS, FRAMES = 64, 12, 24
COLOURS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 235), "yellow": (235, 220, 40),
           "purple": (150, 50, 200), "orange": (245, 140, 30), "cyan": (50, 210, 220),
           "white": (245, 245, 245)}
SHAPES = ["circle", "square", "triangle", "star", "cross", "ring", "bar", "arrow"]
SPINNING = {"bar": 180, "arrow": 360}   # degrees after which they look the same; the others repeat too soon
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
BACK = {"left": "right", "right": "left", "up": "down", "down": "up"}
CORNERS = [f"at the {v} {h}" for v in ("top", "bottom") for h in ("left", "right")] + ["in the middle"]
ROWS = ["at the top", "in the middle", "at the bottom"]
COLUMNS = ["on the left", "in the middle", "on the right"]
MOTIONS = [   # twins stand side by side: (forwards, backwards, places where it may happen)
    ("moves left", "moves right", ROWS), ("moves up", "moves down", COLUMNS),
    ("gets big", "gets small", CORNERS), ("spins clockwise", "spins counterclockwise", COLUMNS),
    ("gets big then blinks", "blinks then gets small", CORNERS),
    ("gets small then blinks", "blinks then gets big", CORNERS),
    *((f"moves {a} then {b}", f"moves {BACK[b]} then {BACK[a]}", [""])
      for a in ("left", "right") for b in ("up", "down"))]
TURNS = {name: (pair, way) for pair, motion in enumerate(MOTIONS) for way, name in enumerate(motion[:2])}


# -------------------------------------------------------------------------------- clips
@dataclasses.dataclass
class Clip:
    """What a clip shows. jitter: in [0, 1), for ground, place, extent and speed; twins share it."""
    colour: str
    shape: str
    motion: str
    place: str
    size: str       # "small", "big", or "" where it changes
    jitter: tuple

    @property
    def caption(self):
        return " ".join(f"a {self.size} {self.colour} {self.shape} {self.motion} {self.place}".split())

    @property
    def twin(self):
        pair, way = TURNS[self.motion]
        return dataclasses.replace(self, motion=MOTIONS[pair][1 - way])

    def at(self, share):
        """At a share 0..1 of the clip -> centre x, y in 0..1, radius in 0..1, angle in radians, visible."""
        pair, way = TURNS[self.motion]
        if way == 1:
            return dataclasses.replace(self, motion=MOTIONS[pair][0]).at(1 - share)
        j = self.jitter
        sides = [(b in self.place) - (a in self.place) for a, b in (("left", "right"), ("top", "bottom"))]
        x, y = (0.5 + 0.24 * side + 0.06 * (k - 0.5) for side, k in zip(sides, j))
        radius = {"small": 0.15, "big": 0.24, "": 0.30 if "spins" in self.motion else 0.19}[self.size]
        radius *= 0.92 + 0.16 * j[2]
        angle, visible, travel = 0.6 * (j[3] - 0.5), True, 0.52 + 0.08 * j[4]
        events = self.motion.split(" then ")
        for i, event in enumerate(events):   # one after the other; done: the share of this one that is over
            done = min(max(len(events) * share - i, 0), 1)
            if event.split()[-1] in STEPS:   # "moves left", or "up" after it
                dx, dy = STEPS[event.split()[-1]]
                x, y = x + dx * travel * (done - 0.5), y + dy * travel * (done - 0.5)
            elif event in ("gets big", "gets small"):
                radius *= 0.5 + (done if event == "gets big" else 1 - done)
            elif event == "blinks":
                visible = not 0.2 + 0.1 * j[5] < done < 0.7 + 0.1 * j[5]
            else:   # spins clockwise, through upright: two thirds of the turn after which it looks the same
                angle += math.radians(min(120, 0.66 * SPINNING[self.shape])) * (done - 0.5)
        return x, y, radius, angle, visible


def looks_of(m, held_out):
    """(colour, shape) of everything that does MOTIONS[m] in the test world, or in the training world."""
    return [(colour, shape) for c, colour in enumerate(COLOURS) for s, shape in enumerate(SHAPES)
            if ((c + 3 * s + m) % 4 == 0) == held_out
            and (shape in SPINNING or not MOTIONS[m][0].startswith("spins"))]


def make_clips(pairs, seed, held_out):
    """-> list of Clips, each followed by its twin. Held-out: every such caption once. Training: `pairs` drawn
    at random, every kind of motion equally often, though few shapes can spin."""
    kinds = []   # of captions, a list for each kind of motion
    for m, (motion, _, places) in enumerate(MOTIONS):
        sizes = [""] if motion.startswith(("gets", "blinks", "spins")) else ["small", "big"]
        kinds.append([(*look, motion, place, size)
                      for look in looks_of(m, held_out) for place in places for size in sizes])
    rng = np.random.default_rng([seed, held_out])
    chosen = list(itertools.chain(*kinds)) if held_out else [
        kind[rng.integers(len(kind))] for kind in (kinds[rng.integers(len(kinds))] for _ in range(pairs))]
    clips = []
    for kind in chosen:
        clip = Clip(*kind, jitter=tuple(rng.random(6).round(4)))
        clips += [clip, clip.twin] if rng.random() < 0.5 else [clip.twin, clip]
    return clips


# large enough for people to look at, and of the test world
SAMPLE = Clip("orange", "star", "moves left then up", "", "big", jitter=(0.5,) * 6)


def read_clips(path):
    """A file of captions that `annotate` wrote -> list of Clips. Raises UserError."""
    fields = [field.name for field in dataclasses.fields(Clip)]
    return [Clip(**{name: row[name] for name in fields}) for _, row in data.read_rows(path)]


# -------------------------------------------------------------------------------- pictures
def outline(shape, angle):
    """Corners of a shape of radius 1, turned clockwise by `angle` radians (y points down)."""
    def spokes(radii, start=-math.pi / 2):
        angles = [start + 2 * math.pi * i / len(radii) for i in range(len(radii))]
        return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles)]
    corners = {"circle": spokes([1] * 48), "ring": spokes([1] * 48), "triangle": spokes([1.15] * 3),
               "square": spokes([1.1] * 4, -math.pi / 4), "star": spokes([1.2, 0.5] * 5),
               "cross": [(.33, -1), (.33, -.33), (1, -.33), (1, .33), (.33, .33), (.33, 1),
                         (-.33, 1), (-.33, .33), (-1, .33), (-1, -.33), (-.33, -.33), (-.33, -1)],
               "bar": [(-.35, -1.15), (.35, -1.15), (.35, 1.15), (-.35, 1.15)],
               "arrow": [(0, -1.2), (.9, -.1), (.32, -.1), (.32, 1.1), (-.32, 1.1), (-.32, -.1), (-.9, -.1)]}
    c, s = math.cos(angle), math.sin(angle)
    return [(c * x - s * y, s * x + c * y) for x, y in corners[shape]]


def draw(clip, share, size=SIZE):
    """At a share 0..1 of the clip -> (size, size, 3) uint8, drawn four times as large for soft edges."""
    x, y, radius, angle, visible = clip.at(share)
    ground, big = 30 + int(60 * clip.jitter[3]), 4 * size
    image = Image.new("RGB", (big, big), (ground, ground, ground))
    if visible:
        pen = ImageDraw.Draw(image)
        corners = [(big * (x + radius * u), big * (y + radius * v)) for u, v in outline(clip.shape, angle)]
        pen.polygon(corners, COLOURS[clip.colour])
        if clip.shape == "ring":
            hole = [big * (p + sign * 0.55 * radius) for sign in (-1, 1) for p in (x, y)]
            pen.ellipse(hole, (ground, ground, ground))
    return np.asarray(image.resize((size, size), Image.BOX))


def film(clip, size=SIZE):
    """All pictures of a clip -> list of (size, size, 3) uint8."""
    return [draw(clip, (i + 0.5) / FRAMES, size) for i in range(FRAMES)]


def write_video(path, frames, rate=FPS, group=1):
    """Pictures (size, size, 3) uint8 -> H.264 in MP4, with one quantiser. rate: frames a second, a whole
    number or a Fraction; group: frames from one key frame to the next."""
    with av.open(path, "w") as container:
        options = {"qp": "18", "g": str(group), "threads": "1"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame))))
        container.mux(stream.encode())


def join(paths, out):
    """Videos of one kind -> a file, or its path, of their packets: nothing is coded again."""
    with av.open(out, "w", format="mp4") as container:
        target, end = None, 0
        for path in paths:
            with av.open(path) as source:
                stream = source.streams.video[0]
                target = target or container.add_stream_from_template(stream)
                for packet in source.demux(stream):
                    if packet.dts is not None:
                        packet.dts, packet.pts, packet.stream = packet.dts + end, packet.pts + end, target
                        container.mux(packet)
                end += stream.duration


# -------------------------------------------------------------------------------- files
def splits(pairs, seed):
    """Yields "train" or "test", its clips, at which share of each pair's first clip the still is taken."""
    for split in ("train", "test"):
        clips = make_clips(pairs, seed, split == "test")
        frames = np.random.default_rng([seed, 7]).integers(FRAMES, size=len(clips) // 2)
        yield split, clips, (frames + 0.5) / FRAMES


def render_clip(job):
    """Draws one clip, writes it, its twin, and a still: a frame as decoded, like those of a video."""
    clip, stem, share = job
    frames = film(clip)
    write_video(f"{stem}a.mp4", frames)
    write_video(f"{stem}b.mp4", frames[::-1])
    [(_, still)] = data.frames(f"{stem}a.mp4", [share * FRAMES / FPS])
    cli.write_atomic(f"{stem}.png", lambda f: pictures.image_of(still).save(f, "PNG"))


QUIET = signal.signal, (signal.SIGINT, signal.SIG_IGN)   # Ctrl-C: the parent ends the processes of a pool


def render(cfg):
    """The training and the test world -> files in cfg.data. Pairs that have their still are done."""
    for split, clips, shares in splits(cfg.pairs, cfg.seed):
        folder = os.path.join(cfg.data, split)
        cli.make_folder(folder)
        jobs = [(clip, os.path.join(folder, f"{i:05d}"), share)
                for i, (clip, share) in enumerate(zip(clips[::2], shares))]
        jobs = [job for job in jobs if not os.path.exists(f"{job[1]}.png")]
        with multiprocessing.get_context("spawn").Pool(cfg.processes, *QUIET) as pool:
            list(tqdm(pool.imap_unordered(render_clip, jobs, chunksize=16), f"render {split}", len(jobs)))
