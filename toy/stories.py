"""Long toy videos with a clock: stories of two to four events with gaps between them, as real files.

Half of the stories have one look, the same colour and shape in all events: which is meant is said by what it
does. In the others every event looks different. Stories of the test world have only combinations of colour,
shape and motion that never occur in training. A story takes 10 to 60 s and has 120 frames, so that one of
them stands for about a hundredth of it.
"""
import dataclasses
import itertools
import multiprocessing
import os
from fractions import Fraction

import numpy as np
from tqdm import tqdm

from data import ASK_ALL
from plumbing import cli, training
from toy.language import an, choice, conversation, looks, put, sentence, ways
from toy.world import MOTIONS, QUIET, SIZE, Clip, draw, looks_of, write_video

FRAMES = 120   # of a story
SPLITS = {   # stories; whether of the test world; which draw: that of the test is newer than the recipe
    "train": (1500, False, 0), "watch": (40, False, 1), "test": (120, True, 3)}
KINDS = [m for m, (motion, _, _) in enumerate(MOTIONS) if "blinks" not in motion]   # else an event has gaps
ANSWERS = ["It is from {} to {} that it happens.", "It happens from {} to {}."]   # in the third stage


@dataclasses.dataclass
class Story:
    """events: Clips on one ground. spans: when each happens, (start, end) in shares of all. duration: s."""
    events: list
    spans: list
    duration: float

    @property
    def said(self):
        """What happens in each event, in words."""
        return [an(f"{clip.colour} {clip.shape} {clip.motion}") for clip in self.events]

    def at(self, share, size=SIZE):
        """The picture at a share 0..1 of the story -> (size, size, 3) uint8."""
        for clip, (start, end) in zip(self.events, self.spans):
            if start <= share < end:
                return draw(clip, (share - start) / (end - start), size)
        ground = 30 + int(60 * self.events[0].jitter[3])   # as `draw` has it
        return np.full((size, size, 3), ground, np.uint8)

    @property
    def seconds(self):
        """When each event starts and ends."""
        return [[round(share * self.duration, 3) for share in span] for span in self.spans]


def spread_out(count, rng):
    """`count` spans (start, end), each 8 to 40 % of a story, with gaps of at least 2 %."""
    while True:
        lengths = rng.uniform(0.08, 0.4, count)
        room = 1 - lengths.sum() - 0.02 * (count + 1)
        if room > 0.01:
            gaps = 0.02 + room * rng.dirichlet(np.ones(count + 1))
            starts = gaps[:-1].cumsum() + lengths.cumsum() - lengths
            return list(zip(starts.round(4).tolist(), (starts + lengths).round(4).tolist()))


def make_story(held_out, rng):
    does = {}   # {(colour, shape): all (kind of motion, motion) of it}
    for m in KINDS:
        for look, motion in itertools.product(looks_of(m, held_out), MOTIONS[m][:2]):
            does.setdefault(look, []).append((m, motion))
    count = rng.integers(2, 5)
    if rng.random() < 0.5:   # one look
        look = choice(rng, [look for look in does if len(does[look]) >= count])
        events = [(look, does[look][i]) for i in rng.permutation(len(does[look]))[:count]]
    else:
        looks = [list(does)[i] for i in rng.permutation(len(does))[:count]]
        events = [(look, choice(rng, does[look])) for look in looks]
    clips, ground = [], rng.random()
    for look, (m, motion) in events:
        size = "" if motion.startswith(("gets", "spins")) else choice(rng, ["small", "big"])
        jitter = rng.random(6).round(4)
        jitter[3] = ground
        clips.append(Clip(*look, motion, choice(rng, MOTIONS[m][2]), size, tuple(jitter.tolist())))
    return Story(clips, spread_out(len(clips), rng), round(rng.uniform(10, 60), 2))


def make_stories(split, seed):
    count, held_out, number = SPLITS[split]
    return [make_story(held_out, np.random.default_rng([seed, number, i])) for i in range(count)]


# large enough for people to look at, and of the test world
SAMPLE = Story([Clip(*kind, jitter=(0.5,) * 6) for kind in (
    ("blue", "triangle", "moves left", "in the middle", "small"),
    ("red", "arrow", "spins clockwise", "in the middle", ""),
    ("yellow", "square", "gets big", "at the top right", ""))],
    [(0.07, 0.29), (0.41, 0.62), (0.72, 0.93)], 20.0)


# -------------------------------------------------------------------------------- conversations
def ordinary(story, rng):
    """What takes no clock to answer -> [(kind of question, question, answer)]."""
    said, clips = [sentence(text) for text in story.said], story.events
    found = [("order", "What happens first?", said[0]), ("order", "What happens last?", said[-1])]
    alike = len({(clip.colour, clip.shape) for clip in clips}) == 1
    for clip in clips[:1] if alike else clips:
        for topic, other in (("colour", "shape"), ("shape", "colour")):
            if alike or sum(getattr(c, other) == getattr(clip, other) for c in clips) == 1:
                turn = put(topic, clip, looks(clip)[topic], rng, named=[] if alike else [other])
                found.append(("static", *turn))
    return found


def moments(story, rng):
    """When events happen, and what happens when, in words that the second stage does not have -> turns. All
    events are asked for in its words, too, as chat.py does."""
    listed = [f"From <s{i}> to <e{i}>, {text}." for i, text in enumerate(story.said)]
    if rng.random() < 0.2:
        return [(choice(rng, [*ASK_ALL, *ways()["events"][0]]), " ".join(listed))]
    turns = []
    for i in rng.permutation(len(story.said)):
        start, end, text = f"<s{i}>", f"<e{i}>", story.said[i]
        if rng.random() < 0.3:
            turns.append((choice(rng, ways()["between"][0]).format(a=start, b=end), sentence(text)))
        else:
            turns.append((sentence(choice(rng, ways()["when"][0]).format(what=text))[:-1],
                          choice(rng, ANSWERS).format(start, end)))
    return turns


# -------------------------------------------------------------------------------- files
def render_story(job):
    story, path, *size = job
    pictures = [story.at(i / FRAMES, *size) for i in range(FRAMES)]
    rate = Fraction(FRAMES / story.duration).limit_denominator(1000)
    write_video(path, pictures, rate=rate, group=FRAMES)


def render(cfg):
    """Stories and what is asked about them -> files in cfg.stories. Videos that are there are done."""
    training.take_folder(cfg.stories)
    for split in SPLITS:
        stories = make_stories(split, cfg.seed)
        names = [f"{split}{i:04d}.mp4" for i in range(len(stories))]
        jobs = [(story, os.path.join(cfg.stories, name)) for story, name in zip(stories, names)]
        jobs = [job for job in jobs if not os.path.exists(job[1])]
        with multiprocessing.get_context("spawn").Pool(cfg.processes, *QUIET) as pool:
            list(tqdm(pool.imap_unordered(render_story, jobs, chunksize=4), f"render {split}", len(jobs)))
        events, talks = [], []
        for i, (story, name) in enumerate(zip(stories, names)):
            rng = np.random.default_rng([cfg.seed, 9, i])
            events.append({"video": name, "duration": story.duration, "events": [
                {"start": start, "end": end, "text": text}
                for (start, end), text in zip(story.seconds, story.said)]})
            asked = ordinary(story, rng)
            if split == "train":   # half of what the third stage reads has no clock in it
                turns = [asked[k][1:] for k in rng.permutation(len(asked))[:4]]
                words = {f"<{edge}{k}>": t
                         for k, span in enumerate(story.seconds) for edge, t in zip("se", span)}
                meta = {"duration": story.duration, "token": words}   # the words for times
                talks.append(conversation(f"{name}-talk", turns, video=name))
                talks.append(conversation(f"{name}-when", moments(story, rng), video=name, meta=meta))
            else:
                for kind in ("order", "static"):
                    if questions := [turn for what, *turn in asked if what == kind]:
                        turn = choice(rng, questions)
                        talks.append(conversation(f"{name}-{kind}", [turn], kind=kind, video=name))
        for what, rows in (("events", events), ("talks", talks)):
            cli.write_rows(os.path.join(cfg.stories, f"{split}_{what}.jsonl"), rows)
