"""The toy world: coloured shapes that move, as real video files, in which every claim of the method can be true or false.

    python -m toy.shapes render    # clips, still pictures, captions, questions -> out/shapes (3 minutes on 2 cores)
    python -m toy.shapes sample    # the clip that chat.py opens by itself      -> assets/sample.mp4
    python -m toy.shapes clip      # a tiny CLIP from single frames             -> weights/tiny/clip
    python -m toy.shapes llama     # a tiny LLaMA from the world's language     -> weights/tiny/llama
    python -m toy.shapes score     # can the branch tell a clip from its twin?  -> a table

The rest is the business of the ordinary scripts: `runs/tiny.sh` has all the commands in order.

A clip is 64x64, 2 s, H.264 in MP4. It shows one shape on a grey ground that does one thing, or two things in turn. Every
clip has a *twin*, the same frames played backwards, with its own caption. An order-blind model gives both twins the same
embedding, so it cannot choose between their captions: 50 % is a provable ceiling. Frames are coded one by one with a
constant quantiser, so that twins hold the same pictures to the bit; and sampling the middle frames of equal stretches of
time picks the same pictures forwards and backwards. A quarter of the colour-shape-motion combinations never occur in
training: the test set has only those.
"""
import dataclasses
import io
import itertools
import json
import math
import multiprocessing
import os

import av
import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

import data
from clip import CLIP, CLIPConfig, Tokenizer, save_clip
from llm import LLaMA, LLaMAConfig, SentencePieceTokenizer, save_llama
from metrics import retrieval_metrics
from model import IGNORE_INDEX, SYSTEMS, VIDEO_INDEX, encode, load_encoder, prompt_ids
from plumbing import cli, training


@dataclasses.dataclass
class Config:
    stage: str                       # what to do: render, sample, clip, llama or score
    data: str = "out/shapes"        # where the clips, captions and questions are
    out: str = "weights/tiny"        # where the trained models go
    branches: str = "weights/tiny/branch.pth"   # branch files to score, one for each seed, with commas between
    scratch: str = "out/shapes_runs"   # checkpoints to go on from
    pairs: int = 4000                # training clips and their twins
    steps: int = 0                   # training steps of clip or llama; 0 = that stage's own number
    batch_size: int = 128            # pictures or texts a step
    seed: int = 0                    # everything random follows from it
    threads: int = 2                 # processes that render, or threads that train


# ---------------------------------------------------------------------------------------------------- the world
SIZE, FPS, FRAMES = 64, 12, 24
ASSETS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "assets")
COLOURS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 235), "yellow": (235, 220, 40),
           "purple": (150, 50, 200), "orange": (245, 140, 30), "cyan": (50, 210, 220), "white": (245, 245, 245)}
SHAPES = ["circle", "square", "triangle", "star", "cross", "ring", "bar", "arrow"]
SPINNING = {"bar": 180, "arrow": 360}   # degrees after which they look the same; the other shapes repeat too soon to be read
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
BACK = {"left": "right", "right": "left", "up": "down", "down": "up"}
CORNERS = [f"at the {v} {h}" for v in ("top", "bottom") for h in ("left", "right")] + ["in the middle"]
# Twins stand side by side: (forwards, backwards, places where it may happen).
MOTIONS = [("moves left", "moves right", ["at the top", "in the middle", "at the bottom"]),
           ("moves up", "moves down", ["on the left", "in the middle", "on the right"]),
           ("gets big", "gets small", CORNERS), ("spins clockwise", "spins counterclockwise", ["on the left", "in the middle", "on the right"]),
           ("gets big then blinks", "blinks then gets small", CORNERS), ("gets small then blinks", "blinks then gets big", CORNERS)]
MOTIONS += [(f"moves {a} then {b}", f"moves {BACK[b]} then {BACK[a]}", [""]) for a in ("left", "right") for b in ("up", "down")]
TURNS = {name: (pair, way) for pair, motion in enumerate(MOTIONS) for way, name in enumerate(motion[:2])}


@dataclasses.dataclass
class Clip:
    """What a clip shows. `jitter` holds random numbers in [0, 1) for ground, place, extent and speed; twins share it."""
    colour: str
    shape: str
    motion: str
    place: str
    size: str       # "small", "big", or "" where it changes
    jitter: tuple

    @property
    def caption(self):
        return " ".join(w for w in ("a", self.size, self.colour, self.shape, self.motion, self.place) if w)

    @property
    def twin(self):
        pair, way = TURNS[self.motion]
        return dataclasses.replace(self, motion=MOTIONS[pair][1 - way])

    def at(self, share):
        """The picture at a share 0..1 of the clip -> centre x, y in 0..1, radius in 0..1, angle in radians, visible."""
        pair, way = TURNS[self.motion]
        if way == 1:
            return dataclasses.replace(self, motion=MOTIONS[pair][0]).at(1 - share)
        j = self.jitter
        x, y = (0.5 + 0.24 * (self.place.endswith(b) - self.place.endswith(a) or (b in self.place) - (a in self.place)) + 0.06 * (k - 0.5)
                for a, b, k in (("left", "right", j[0]), ("top", "bottom", j[1])))
        radius = {"small": 0.15, "big": 0.24, "": 0.30 if "spins" in self.motion else 0.19}[self.size] * (0.92 + 0.16 * j[2])
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


def world(pairs, seed, held_out):
    """-> list of Clips, each followed by its twin. Held-out: every such caption once. Training: `pairs` drawn at random, every
    kind of motion equally often, though few shapes can spin."""
    kinds = []   # of captions, a list for each kind of motion
    for m, (motion, _, places) in enumerate(MOTIONS):
        sizes = [""] if motion.startswith(("gets", "blinks", "spins")) else ["small", "big"]
        shown = [(colour, shape) for (c, colour), (s, shape) in itertools.product(enumerate(COLOURS), enumerate(SHAPES))
                 if ((c + 3 * s + m) % 4 == 0) == held_out and (shape in SPINNING or not motion.startswith("spins"))]
        kinds.append([(*what, motion, place, size) for what, place, size in itertools.product(shown, places, sizes)])
    rng = np.random.default_rng([seed, held_out])
    chosen = list(itertools.chain(*kinds)) if held_out else [
        kind[rng.integers(len(kind))] for kind in (kinds[rng.integers(len(kinds))] for _ in range(pairs))]
    clips = []
    for kind in chosen:
        clip = Clip(*kind, jitter=tuple(rng.random(6).round(4)))
        clips += [clip, clip.twin] if rng.random() < 0.5 else [clip.twin, clip]
    return clips


def outline(shape, angle):
    """Corners of a shape of radius 1, turned clockwise by `angle` radians (y points down)."""
    def spokes(radii, start=-math.pi / 2):
        return [(r * math.cos(start + 2 * math.pi * i / len(radii)), r * math.sin(start + 2 * math.pi * i / len(radii)))
                for i, r in enumerate(radii)]
    corners = {"circle": spokes([1] * 48), "ring": spokes([1] * 48), "square": spokes([1.1] * 4, -math.pi / 4),
               "triangle": spokes([1.15] * 3), "star": spokes([1.2, 0.5] * 5),
               "cross": [(a * x, b * y) for a, b in ((1, -1), (1, 1), (-1, 1), (-1, -1))
                         for x, y in ([(.33, 1), (.33, .33), (1, .33)] if a * b < 0 else [(1, .33), (.33, .33), (.33, 1)])],
               "bar": [(-.35, -1.15), (.35, -1.15), (.35, 1.15), (-.35, 1.15)],
               "arrow": [(0, -1.2), (.9, -.1), (.32, -.1), (.32, 1.1), (-.32, 1.1), (-.32, -.1), (-.9, -.1)]}[shape]
    c, s = math.cos(angle), math.sin(angle)
    return [(c * x - s * y, s * x + c * y) for x, y in corners]


def draw(clip, share, size=SIZE):
    """The picture of a clip at a share 0..1 of its length -> (size, size, 3) uint8, drawn four times as large for soft edges."""
    x, y, radius, angle, visible = clip.at(share)
    ground = 30 + int(60 * clip.jitter[3])
    big = 4 * size
    image = Image.new("RGB", (big, big), (ground, ground, ground))
    if visible:
        pen = ImageDraw.Draw(image)
        pen.polygon([(big * (x + radius * u), big * (y + radius * v)) for u, v in outline(clip.shape, angle)], COLOURS[clip.colour])
        if clip.shape == "ring":
            pen.ellipse([big * (p + sign * 0.55 * radius) for sign in (-1, 1) for p in (x, y)], (ground, ground, ground))
    return np.asarray(image.resize((size, size), Image.BOX))


def write_video(path, frames, qp=18):
    """(size, size, 3) uint8 pictures -> H.264 in MP4. All frames are key frames with one quantiser: each depends on itself alone."""
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"qp": str(qp), "g": "1", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame))))
        container.mux(stream.encode())


# ---------------------------------------------------------------------------------------------------- captions and questions
def still_caption(clip, share):
    """What a single frame shows, in words: nothing about motion -> (caption, [(question, answer)]).

    Up and down, clockwise and counterclockwise are said of places and angles here, big and small of sizes. That is how the text
    tower, frozen later, learns to tell such words apart: of a word that it never met it makes next to nothing."""
    x, y, radius, angle, visible = clip.at(share)
    if not visible:
        return "an empty picture", [("What do you see?", "It is an empty picture.")]
    size = "small" if radius < 0.19 else "big"
    period = math.radians(SPINNING.get(clip.shape, 1))
    angle = math.degrees((angle + period / 2) % period - period / 2)   # the least turn that leads here
    tilt = "tilted clockwise" if angle > 7 else "tilted counterclockwise" if angle < -7 else ""
    vertical = "top" if y < 0.4 else "bottom" if y > 0.6 else ""
    horizontal = "left" if x < 0.4 else "right" if x > 0.6 else ""
    place = f"at the {vertical} {horizontal}".strip() if vertical else f"on the {horizontal}" if horizontal else "in the middle"
    what, way = f"a {size} {clip.colour} {clip.shape}", place
    questions = static_questions(clip.colour, clip.shape, size, place) + [("What do you see?", f"It is {what} {place}.")]
    frame = int(share * FRAMES)   # the same is said in several ways, so that every word has to carry its meaning
    if vertical and frame // 4 % 2:
        way = {"top": "up", "bottom": "down"}[vertical] + (f" on the {horizontal}" if horizontal else " in the middle")
    if frame // 8 % 2:
        what = f"a {clip.colour} {clip.shape} that is {size}"
    return " ".join(f"{what} {tilt} {way}".split()), questions


def static_questions(colour, shape, size, place):
    questions = [(q, f"It is {colour}.") for q in ("What colour is the shape?", "What color is it?")]
    questions += [(q, f"It is a {shape}.".replace("a arrow", "an arrow")) for q in ("What shape is it?", "Which shape do you see?")]
    questions += [("Is it big or small?", f"It is {size}.")] * bool(size) + [("Where is it?", f"It is {place}.")] * bool(place)
    return questions


def temporal_questions(clip):
    """Questions that no single frame answers: both twins show the same frames, and the answers differ."""
    questions = [(q, f"It {clip.motion}.") for q in ("What does the shape do?", "What happens in the video?")]
    first, _, last = clip.motion.partition(" then ")
    if last:
        last = f"moves {last}" if last in STEPS else last
        return questions + [("What does it do first?", f"It {first}."), ("What does it do last?", f"It {last}.")]
    question = {"moves": "Which way does it move?", "spins": "Which way does it spin?"}.get(first.split()[0], "Does it get big or small?")
    return questions + [(question, f"It {first}.")]


def conversation(name, pairs, **source):
    """One row of a conversation data set, in Video-ChatGPT's format."""
    turns = [{"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair)]
    turns[0]["value"] += "\n<video>"
    return {"id": name, **source, "conversations": turns}


# ---------------------------------------------------------------------------------------------------- render
def splits(cfg):
    """-> [(split, its clips, at which share of each pair's first clip the still is taken)]."""
    worlds = (("train", world(cfg.pairs, cfg.seed, False)), ("test", world(0, cfg.seed, True)))
    return [(split, clips, [(k + 0.5) / FRAMES for k in np.random.default_rng([cfg.seed, 7]).integers(FRAMES, size=len(clips) // 2)])
            for split, clips in worlds]


def render_clip(job):
    """Draws one clip, writes it, its twin, and a still: a frame as decoded, like those of a video."""
    clip, stem, share = job
    frames = [draw(clip, (i + 0.5) / FRAMES) for i in range(FRAMES)]
    write_video(f"{stem}a.mp4", frames)
    write_video(f"{stem}b.mp4", frames[::-1])
    [(_, still)] = data.frames(f"{stem}a.mp4", [share * FRAMES / FPS])
    cli.write_atomic(f"{stem}.png", lambda f: Image.fromarray(still.permute(1, 2, 0).numpy()).save(f, "PNG"))


def render(cfg):
    """Clips, stills and annotations of the training and the test world -> cfg.data. Pairs that have their still are done."""
    for split, clips, shares in splits(cfg):
        folder = os.path.join(cfg.data, split)
        cli.make_folder(folder)
        jobs = [(clip, os.path.join(folder, f"{i:05d}"), share) for i, (clip, share) in enumerate(zip(clips[::2], shares))]
        jobs = [job for job in jobs if not os.path.exists(f"{job[1]}.png")]
        with multiprocessing.get_context("spawn").Pool(cfg.threads) as pool:
            for _ in tqdm(pool.imap_unordered(render_clip, jobs, chunksize=16), total=len(jobs), desc=f"render {split}"):
                pass
    annotate(cfg)


def annotate(cfg):
    """Captions, conversations and stills -> JSON lines in cfg.data. In the test world twins are asked the same questions."""
    for split, clips, shares in splits(cfg):
        captions, talks, stills = [], [], []
        for i, clip in enumerate(clips):
            rng = np.random.default_rng([cfg.seed, 8, i // 2])   # one for both twins

            def pick(questions, count):
                return [questions[k] for k in rng.permutation(len(questions))[:count]]
            name = f"{i // 2:05d}{'ab'[i % 2]}"
            video = f"{split}/{name}.mp4"
            static, temporal = static_questions(clip.colour, clip.shape, clip.size, clip.place), temporal_questions(clip)
            captions.append({"video": video, "caption": clip.caption, **dataclasses.asdict(clip)})
            if split == "train":
                # one question about time in each: a second one could be answered from the first answer, without looking
                talks += [conversation(f"{name}-{k}", pick([asked, *pick(static, 1)], 2), video=video)
                          for k, asked in enumerate(pick(temporal, 2))]
            else:
                talks += [conversation(f"{name}-{kind}", pick(pairs, 1), kind=kind, video=video)
                          for kind, pairs in (("static", static), ("temporal", temporal))]
            if i % 2 == 0:
                questions = pick(still_caption(clip, shares[i // 2])[1], 4 if split == "train" else 1)
                stills.append(conversation(name, questions, image=f"{split}/{i // 2:05d}.png"))
        files = {f"{split}_captions": captions, f"{split}_talks": talks, f"{split}_stills": stills}
        if split == "test":   # every eighth pair, to watch while training
            files["watch_captions"] = [row for i, row in enumerate(captions) if i // 2 % 8 == 0]
        for name, rows in files.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            cli.write_atomic(os.path.join(cfg.data, f"{name}.jsonl"), lambda f: f.write(text.encode()))


def sample(cfg):
    """The clip that chat.py opens by itself: a held-out combination, large enough for people to look at."""
    clip = Clip("orange", "star", "moves left then up", "", "big", jitter=(0.5,) * 6)
    write_video(os.path.join(ASSETS, "sample.mp4"), [draw(clip, (i + 0.5) / FRAMES, 256) for i in range(FRAMES)])


# ---------------------------------------------------------------------------------------------------- training
def fit(name, cfg, model, loss_of, steps, warmup):
    """The loop of both stages below: AdamW, warm-up and cosine, a checkpoint now and then from which it goes on.

    loss_of(step) -> (loss, a note for the progress bar)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    last, start, settings = os.path.join(cfg.scratch, f"{name}.pth"), 0, [cfg.seed, cfg.pairs, cfg.batch_size, steps]
    cli.make_folder(cfg.scratch)
    if os.path.exists(last):
        saved = training.load_checkpoint(last)
        if saved.get("settings") != settings:
            raise cli.UserError(f"{last}: from a run with other settings; remove it, or choose another --scratch")
        training.put_back(model.state_dict(), saved["model"], last)
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name)
    for step in bar:
        training.seed_step(cfg.seed, step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * training.warmup_cosine(step, steps, warmup)
        loss, note = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f} {note}")
        if (step + 1) % 200 == 0 or step + 1 == steps:
            training.save_checkpoint(last, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1,
                                          "settings": settings})


def train_clip(cfg):
    """A tiny CLIP: contrastive training on single frames and what they show. Nothing it sees or reads says anything about time."""
    full = Tokenizer.from_file(os.path.join(ASSETS, "bpe_simple_vocab_16e6.txt.gz"))
    tokenizer = Tokenizer([(full.symbols[a], full.symbols[b]) for a, b in full.merges][:800])   # enough for this world's words
    torch.manual_seed(cfg.seed)
    model = CLIP(CLIPConfig(image_size=SIZE, patch_size=16, vision_width=128, vision_layers=6, vision_heads=4, vision_mlp=512,
                            text_width=128, text_layers=4, text_heads=4, text_mlp=512, vocab_size=tokenizer.vocab_size,
                            projection_dim=128))
    clips, per_clip = world(cfg.pairs, cfg.seed, False)[::2], 6
    shares = [(2 * i + 1) / (2 * per_clip) for i in range(per_clip)]
    paths = [os.path.join(cfg.data, "train", f"{i:05d}a.mp4") for i in range(len(clips))]
    frames = [picture for path in tqdm(paths, desc="read frames") for _, picture in data.frames(path, [s * FRAMES / FPS for s in shares])]
    frames = torch.stack(frames).view(len(clips), per_clip, 3, SIZE, SIZE)   # uint8
    captions = [[still_caption(clip, s)[0] for s in shares] for clip in clips]
    ids = tokenizer([text for row in captions for text in row], 32).view(len(clips), per_clip, 32)

    def loss_of(step):
        clip, frame = torch.randint(len(clips), (cfg.batch_size,)), torch.randint(per_clip, (cfg.batch_size,))
        image = F.normalize(model.encode_image(frames[clip, frame]), dim=-1)   # (B, P)
        text = F.normalize(model.encode_text(ids[clip, frame]), dim=-1)                        # (B, P)
        same = (ids[clip, frame][:, None] == ids[clip, frame]).all(-1).float()                 # (B, B): equal captions are no negatives
        logits, target = model.logit_scale.exp().clamp(max=100) * image @ text.T, same / same.sum(1, keepdim=True)
        right = same.gather(1, logits.argmax(1, keepdim=True)).mean()
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2, f"right {right:.3f}"
    fit("clip", cfg, model, loss_of, cfg.steps or 1000, 100)
    save_clip(os.path.join(cfg.out, "clip"), model, tokenizer)


def train_tokenizer(corpus, vocab_size):
    """Texts -> the bytes of a sentencepiece model with LLaMA's settings: BPE, byte fallback, <unk> <s> </s> first."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=written, model_type="bpe", vocab_size=vocab_size, byte_fallback=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_digits=True, minloglevel=2)
    return written.getvalue()


def train_llama(cfg):
    """A tiny LLaMA: the language of this world from text alone. With a caption in the place of the video, answer questions."""
    clips = world(cfg.pairs, cfg.seed, False)

    def talk(rng):
        clip = clips[rng.integers(len(clips))]
        caption, questions = still_caption(clip, rng.random())
        if rng.random() < 0.5:
            caption = clip.caption
            questions = static_questions(clip.colour, clip.shape, clip.size, clip.place) + temporal_questions(clip)
        return caption, [questions[i] for i in rng.permutation(len(questions))[:4]]
    corpus, rng = [SYSTEMS["vicuna_v1"]] * 100, np.random.default_rng([cfg.seed, 11])
    for caption, turns in (talk(rng) for _ in range(4000)):
        corpus += [caption] + [text for question, answer in turns for text in (f"USER: {question}", f"ASSISTANT: {answer}")]
    cli.make_folder(cfg.scratch)
    model_file = os.path.join(cfg.scratch, "tokenizer.model")
    cli.write_atomic(model_file, lambda f: f.write(train_tokenizer(corpus, 560)))
    tokenizer = SentencePieceTokenizer(model_file)
    torch.manual_seed(cfg.seed)
    model = LLaMA(LLaMAConfig(vocab_size=tokenizer.vocab_size, width=128, layers=4, heads=4, mlp=352, context_length=512))

    def loss_of(step):
        rng, rows, targets = np.random.default_rng([cfg.seed, 12, step]), [], []
        for caption, turns in (talk(rng) for _ in range(cfg.batch_size // 4)):
            ids, labels = prompt_ids(tokenizer, turns)
            at, words = ids.index(VIDEO_INDEX), tokenizer.encode(caption)
            rows.append(torch.tensor(ids[:at] + words + ids[at + 1:]))
            targets.append(torch.tensor(labels[:at] + [IGNORE_INDEX] * len(words) + labels[at + 1:]))
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)                                       # (B, S)
        target = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORE_INDEX)     # (B, S)
        return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), target[:, 1:].flatten(), ignore_index=IGNORE_INDEX), ""
    fit("llama", cfg, model, loss_of, cfg.steps or 1500, 50)
    save_llama(os.path.join(cfg.out, "llama"), model, model_file)


# ---------------------------------------------------------------------------------------------------- score
def twin_accuracy(video, text):
    """video, text (2Q, P) normalised, twins side by side -> (2Q,) 1.0 where a clip is nearer to its own caption than to its
    twin's, 0.5 where both are equally near."""
    own, other = (video * text).sum(1), (video * text.view(-1, 2, text.shape[1]).flip(1).flatten(0, 1)).sum(1)
    return (own > other).float() + 0.5 * (own == other).float()


def static_accuracy(video, clips, encode_text):
    """video (Q, P) -> share of clips whose caption is nearer than the captions with another colour, and with another shape."""
    right = []
    for field, values in (("colour", list(COLOURS)), ("shape", SHAPES)):
        rows = [[dataclasses.replace(clip, **{field: value}).caption for value in values] for clip in clips]
        features = encode_text([text for row in rows for text in row]).view(len(clips), len(values), -1)   # (Q, 8, P)
        truth = torch.tensor([values.index(getattr(clip, field)) for clip in clips])
        right.append(((features @ video[:, :, None])[:, :, 0].argmax(1) == truth).float().mean())
    return torch.stack(right).mean().item()


def score(cfg):
    """The method's claim: twins, statics and retrieval on held-out combinations, mean-pooled CLIP beside branches of several seeds."""
    dataset = data.RetrievalDataset(os.path.join(cfg.data, "test_captions.jsonl"), cfg.data, 8, SIZE)
    fields = [f.name for f in dataclasses.fields(Clip)]
    with open(os.path.join(cfg.data, "test_captions.jsonl")) as f:
        clips = [Clip(**{name: row[name] for name in fields}) for row in map(json.loads, f)]
    rows, by_motion = {}, {}   # {model: [metrics of a seed]}, {pairs of motions, how many: [twin accuracy of the branch, a seed each]}
    for file in cfg.branches.split(","):
        encoder, tokenizer = load_encoder(cfg.out, file, torch.device("cpu"))

        @torch.no_grad()
        def encode_text(texts):
            return torch.cat([F.normalize(encoder.clip.encode_text(tokenizer(texts[i:i + 512], 32)), dim=-1) for i in range(0, len(texts), 512)])
        branch, mean, text, _ = encode(encoder, tokenizer, dataset, torch.device("cpu"), 64)
        for name, video in (("mean-pooled CLIP", mean), ("branch", branch)):
            metrics = {"twins": 100 * twin_accuracy(video, text).mean().item(), "static": 100 * static_accuracy(video, clips, encode_text),
                       **retrieval_metrics(text @ video.T), "twin distance": (video[::2] - video[1::2]).norm(dim=1).max().item()}
            rows.setdefault(name, []).append(metrics)
            print(json.dumps({"branch file": file, "what": name, **{k: round(v, 7) for k, v in metrics.items()}}), flush=True)
        right = twin_accuracy(branch, text)
        for pair, (forwards, backwards, _) in enumerate(MOTIONS):
            which = [TURNS[clip.motion][0] == pair for clip in clips]
            by_motion.setdefault(f"{forwards} / {backwards} | {sum(which) // 2}", []).append(100 * right[torch.tensor(which)].mean().item())

    def spread(values):
        return f"{sum(values) / len(values):.1f} ({min(values):.1f} to {max(values):.1f})"
    columns = ["twins", "static", "R@1", "R@5", "R@10"]
    print(f"\n{len(clips) // 2} pairs of held-out twins, {len(rows['branch'])} seeds: mean (lowest to highest), in percent\n")
    print("| | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name, found in rows.items():
        print(f"| {name} | " + " | ".join(spread([metrics[c] for metrics in found]) for c in columns) + " |")
    print("\n| branch, twins of | pairs | told apart |\n|---|---|---|")
    for name, values in by_motion.items():
        print(f"| {name} | {spread(values)} |")


STAGES = {"render": render, "sample": sample, "clip": train_clip, "llama": train_llama, "score": score}


def main(cfg):
    if cfg.stage not in STAGES:
        raise cli.UserError(f"{cfg.stage}: no such stage; choose one of {', '.join(STAGES)}")
    torch.set_num_threads(cfg.threads)
    STAGES[cfg.stage](cfg)


if __name__ == "__main__":
    cli.run(main, Config, positional=["stage"])
