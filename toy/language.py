"""The toy world's language: what can be asked about a clip, in about twenty ways each, and the right answer.

A fact is a topic and its answer, {"colour": "It is red."}; toy/questions.txt has the ways to ask for it.
Static facts are seen in any frame, temporal ones in none: twins show the same frames. Whatever the world
does not have is answered by NOTHING.
"""
import collections
import dataclasses
import functools
import gzip
import math
import os
import re

import numpy as np

from plumbing import cli
from toy.world import ASSETS, COLOURS, FRAMES, MOTIONS, SHAPES, SPINNING, STEPS, TURNS, splits

NOTHING = "I only know coloured shapes."
VIDEO = ["this video", "the clip", "this clip", "the film", "the scene", "the picture", "the image"]
GREETINGS = ["Hi,", "Hello,", "So", "And", "Now", "Please,", "Ok,", "Well,", "Then", "But", "Yes,", "Hey,"]


# -------------------------------------------------------------------------------- facts
def an(text):
    """A noun with what stands before it, and its article."""
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def sentence(text):
    """Starts with a capital, ends with a full stop, has single spaces."""
    text = " ".join(text.split())
    return text[0].upper() + text[1:] + "."


def looks(clip):
    """What a shape is in any frame -> {topic: answer}."""
    facts = {"colour": f"It is {clip.colour}.", "shape": f"It is {an(clip.shape)}.",
             "place": f"It is {clip.place}." if clip.place else "It moves across the picture."}
    size = "big" if "spins" in clip.motion else clip.size
    return facts | ({"size": f"It is {size}."} if size else {})


def events(clip):
    """What a shape does, one event after the other: "moves left", "moves up"."""
    return [f"moves {event}" if event in STEPS else event for event in clip.motion.split(" then ")]


def moves(clip):
    """What no single frame shows -> {topic: answer}."""
    motion, done = f"It {clip.motion}.", events(clip)
    size = [event for event in done if event.startswith("gets")]
    what = an(f"{clip.size} {clip.colour} {clip.shape}".strip())
    kind = {"moves": "way", "spins": "turn"}.get(clip.motion.split()[0], "growth")
    facts = {"motion": motion, kind: motion, "first": f"It {done[0]}.",
             "last": f"It {done[-1]}.", "look": sentence(f"it is {what} that {clip.motion} {clip.place}")}
    return facts | ({"size": f"It {size[0]}."} if size else {})


def still_caption(clip, share):
    """What a single frame shows, in words: nothing about motion -> (caption, facts).

    Up and down, clockwise and counterclockwise are said of places and angles here, big and small of sizes.
    So the text tower, frozen later, learns to tell such words apart."""
    x, y, radius, angle, visible = clip.at(share)
    if not visible:
        return "an empty picture", {"look": "It is an empty picture."}
    size = "small" if radius < 0.19 else "big"
    period = math.radians(SPINNING.get(clip.shape, 1))
    angle = math.degrees((angle + period / 2) % period - period / 2)   # the least turn that leads here
    tilt = "tilted clockwise" if angle > 7 else "tilted counterclockwise" if angle < -7 else ""
    vertical = "top" if y < 0.4 else "bottom" if y > 0.6 else ""
    horizontal = "left" if x < 0.4 else "right" if x > 0.6 else ""
    beside = f"on the {horizontal}" if horizontal else "in the middle"
    place = f"at the {vertical} {horizontal}".strip() if vertical else beside
    what, way = f"a {size} {clip.colour} {clip.shape}", place
    facts = looks(dataclasses.replace(clip, size=size, place=place, motion=""))
    facts["look"] = f"It is {what} {place}."
    frame = int(share * FRAMES)   # the same is said in several ways: every word has to carry its meaning
    if vertical and frame // 4 % 2:
        way = ("up " if vertical == "top" else "down ") + beside
    if frame // 8 % 2:
        what = f"a {clip.colour} {clip.shape} that is {size}"
    return " ".join(f"{what} {tilt} {way}".split()), facts


# -------------------------------------------------------------------------------- questions
@functools.cache
def ways():
    """questions.txt -> {topic: (ways of training, ways kept from it)}."""
    found = {}
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "questions.txt")) as f:
        for line in map(str.strip, f):
            if line.startswith("["):
                found[line.strip("[]")] = topic = [], []
            elif line and not line.startswith("#"):
                topic[line.startswith("* ")].append(line.removeprefix("* "))
    return found


def choice(rng, options):
    return options[rng.integers(len(options))]


def put(topic, clip, answer, rng, kept=False, named=()):
    """One thing, asked in one of its ways -> (question, answer). kept: in a way that training does not have.
    named: there are other shapes, and the question says by "shape", "colour" or "both" which one is meant."""
    names = [] if named else ["it", "it", "it", "the shape", "the thing", "the object"]
    for look in named or ("shape", "colour"):
        if look != topic:
            names += {"shape": [f"the {clip.shape}"],
                      "colour": [f"the {clip.colour} {noun}" for noun in ("shape", "one")],
                      "both": [f"the {clip.colour} {clip.shape}"]}[look]
    text = choice(rng, [way for way in ways()[topic][kept] if "{it}" in way or not named])
    both = MOTIONS[TURNS[clip.motion][0]][:2]   # the clip's motion and its twin's
    x = choice(rng, {"colour": list(COLOURS), "shape": SHAPES, "motion": both}.get(topic, [""]))
    bare = " ".join(word.removesuffix("s") if word in ("moves", "gets", "spins", "blinks") else word
                    for word in x.split())
    text = text.replace("a {x}", an(x)) if topic == "shape" else text
    return casual(text.format(it=choice(rng, names), x=bare, y=x), rng), answer


def casual(question, rng):
    """As people write: other words for a video, a greeting, a word too many, no capitals, no full stop."""
    if rng.random() < 0.3:
        question = question.replace("the video", choice(rng, VIDEO))
    if rng.random() < 0.1:
        question = f"{choice(rng, GREETINGS)} {question[0].lower()}{question[1:]}"
    if rng.random() < 0.15:
        words = question.split()
        words.insert(rng.integers(len(words)), any_word(rng))
        question = " ".join(words)
    question = question[0].upper() + question[1:]
    if rng.random() < 0.15:
        question = question.lower()
    return question[:-1] if rng.random() < 0.15 and question[-1] in ".?!" else question


@functools.cache
def english():
    """Words of CLIP's vocabulary that the world does not have, the frequent ones first."""
    with gzip.open(os.path.join(ASSETS, "bpe_simple_vocab_16e6.txt.gz"), "rt") as f:
        merged = [line.strip().replace(" ", "") for line in f.readlines()[1:20_000]]
    ours = {*SHAPES, *COLOURS, *" ".join(TURNS).split()}
    for topic, (trained, kept) in ways().items():
        if topic != "nothing of it":
            ours |= set(re.findall("[a-z]+", " ".join(trained + kept).lower()))
    words = [word.removesuffix("</w>") for word in merged if word.endswith("</w>")]
    return [word for word in words if re.fullmatch("[a-z]{3,}", word) and word not in ours]


def any_word(rng):
    return english()[int(len(english()) * rng.random() ** 2)]


def astray(rng):
    """A question that takes no look -> (question, answer)."""
    if rng.random() < 0.9:
        return nothing_of_it(rng)
    return casual(choice(rng, ways()["how many"][0]), rng), "There is one."


def nothing_of_it(rng, kept=False):
    """A question about something that the world does not have -> (question, NOTHING)."""
    text = choice(rng, ways()["nothing of it"][kept])
    while "{word}" in text:   # frequent words are likelier
        text = text.replace("{word}", any_word(rng), 1)
    while "{number}" in text:
        text = text.replace("{number}", str(rng.integers(100)), 1)
    return text if kept else casual(text, rng), NOTHING


def ask(facts, clip, count, rng, aside=0.0):
    """`count` of the facts, each asked in one of its ways -> [(question, answer)]. aside: how likely a
    question that takes no look stands among them."""
    topics = [list(facts)[i] for i in rng.permutation(len(facts))[:count]]
    turns = [put(topic, clip, facts[topic], rng) for topic in topics]
    if rng.random() < aside:
        turns.insert(rng.integers(len(turns) + 1), astray(rng))
    return turns


# -------------------------------------------------------------------------------- text alone, for the LLaMA
def talk(clips, rng):
    """What may stand in the place of a video, and a conversation about it -> (text, turns, learned).

    learned: how many of the last turns are to be learned. Most is about one clip or still. The rest prepares
    for long videos: rows that are exchanged for another scene's before the last question; and times."""
    clip, kind = choice(rng, clips), rng.random()
    if kind < 0.45:
        turns = ask(looks(clip) | moves(clip), clip, rng.integers(2, 7), rng, aside=0.3)
        return clip.caption, turns, len(turns)
    if kind < 0.7:
        caption, facts = still_caption(clip, rng.random())
        turns = ask(facts, clip, rng.integers(2, 7), rng, aside=0.3)
        return caption, turns, len(turns)
    scenes = unlike(clips, rng)
    if kind < 0.85:
        before = [about(scene, rng) for scene in scenes[1:]]
        last = about(scenes[0], rng) if rng.random() < 0.8 else after(scenes[1], scenes[0], rng)
        return scenes[0].caption, [*before, last], 1
    spans = timeline(len(scenes), rng)
    said = [f"{an(f'{scene.colour} {scene.shape}')} {scene.motion}" for scene in scenes]
    turns = ask_times(said, spans, rng)
    return ", ".join(f"from {a} to {b} {what}" for what, (a, b) in zip(said, spans)), turns, len(turns)


def unlike(clips, rng):
    """Two to four clips, each with a colour and a shape of its own."""
    chosen = [choice(rng, clips)]
    for _ in range(rng.integers(1, 4)):
        clip = choice(rng, clips)
        if all(clip.colour != other.colour and clip.shape != other.shape for other in chosen):
            chosen.append(clip)
    return chosen if len(chosen) > 1 else unlike(clips, rng)


def about(clip, rng):
    """One question about one of several scenes, which it names -> (question, answer)."""
    topic = choice(rng, ["colour", "colour", "motion", "motion", "shape", "place", "first"])
    return put(topic, clip, (looks(clip) | moves(clip))[topic], rng, named=("shape", "colour"))


def after(scene, other, rng):
    """What comes after a scene -> (question, answer)."""
    question = choice(rng, ways()["after"][0]).format(it=f"{scene.colour} {scene.shape}")
    return casual(question, rng), sentence(an(f"{other.colour} {other.shape}"))


def timeline(count, rng):
    """`count` events with gaps between them -> [(begin, end)], two digits each, of 100 parts of the video."""
    edges = np.sort(rng.choice(50, 2 * count, replace=False)) * 2 + rng.integers(2)
    return [(f"{a:02d}", f"{b:02d}") for a, b in edges.reshape(count, 2)]


def ask_times(said, spans, rng):
    """Events in words and their spans -> [(question, answer)]."""
    if rng.random() < 0.2:
        text = " ".join(f"From {a} to {b}, {what}." for what, (a, b) in zip(said, spans))
        return [(casual(choice(rng, ways()["events"][0]), rng), text)]
    turns = []
    for i in rng.permutation(len(said)):
        (a, b), topic = spans[i], "when" if rng.random() < 0.6 else "between"
        question = choice(rng, ways()[topic][0]).format(what=said[i], a=a, b=b)
        turns.append((casual(question, rng), f"From {a} to {b}." if topic == "when" else sentence(said[i])))
    return turns


# -------------------------------------------------------------------------------- files
def conversation(name, pairs, **source):
    """One row of a conversation data set, in Video-ChatGPT's format."""
    turns = [{"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair)]
    turns[0]["value"] += "\n<video>"
    return {"id": name, **source, "conversations": turns}


def four_options(rows, twins, clips, rng):
    """Rows of test_talks about time, of two twins, who are asked the same -> the same as multiple choice:
    both right answers and two that are right of other clips. Whoever is blind to order gets half of them."""
    question = rows[0]["conversations"][0]["value"].removesuffix("\n<video>")
    answers = [row["conversations"][1]["value"] for row in rows]
    both = list(map(moves, twins))
    topic = next(topic for topic in both[0] if [facts.get(topic) for facts in both] == answers)
    facts = [facts(clip) for clip in clips for facts in (looks, moves)]
    others = {fact[topic] for fact in facts if topic in fact}.difference(answers)
    options = rng.permutation([*answers, *rng.permutation(sorted(others))[:2]]).tolist()
    return [{"id": row["id"], "group": row["group"], "video": row["video"], "question": question,
             "options": options, "answer": answer} for row, answer in zip(rows, answers)]


def test_talks(clip, name, video, rng):
    """Four questions about a held-out clip, of the four kinds that are counted apart."""
    static, temporal = looks(clip), moves(clip)
    both = static | temporal
    asked = {"static": ask(static, clip, 1, rng), "temporal": ask(temporal, clip, 1, rng)}
    topic = choice(rng, list(both))
    asked["other words"] = [put(topic, clip, both[topic], rng, kept=True)]
    asked["nothing of it"] = [nothing_of_it(rng, kept=True)]
    return [conversation(f"{name}-{kind}", turns, kind=kind, group=name[:-1], video=video)
            for kind, turns in asked.items()]


def annotate(folder, pairs, seed):
    """Captions, conversations, stills -> JSON lines. In the test world twins are asked the same."""
    files = collections.defaultdict(list)
    for split, clips, shares in splits(pairs, seed):
        train = split == "train"
        captions, talks, stills = (files[f"{split}_{what}"] for what in ("captions", "talks", "stills"))
        for i, clip in enumerate(clips):
            rng = np.random.default_rng([seed, 8, i // 2])   # one for both twins
            name = f"{i // 2:05d}{'ab'[i % 2]}"
            video = f"{split}/{name}.mp4"
            captions.append({"video": video, "caption": clip.caption, **dataclasses.asdict(clip)})
            if train:   # one about time in each: the first would answer a second, without a look
                for k in range(2):
                    turns = ask(moves(clip), clip, 1, rng) + ask(looks(clip), clip, 1, rng, aside=0.5)
                    turns = [turns[j] for j in rng.permutation(len(turns))]
                    talks.append(conversation(f"{name}-{k}", turns, video=video))
            else:
                talks += test_talks(clip, name, video, rng)
                if i // 2 % 8 == 0:   # some pairs, to watch while training
                    files["watch_captions"].append(captions[-1])
                if i % 2:
                    files["test_options"] += four_options(talks[-7::4], clips[i - 1:i + 1], clips, rng)
            if i % 2 == 0:
                _, facts = still_caption(clip, shares[i // 2])
                turns = ask(facts, clip, 4 if train else 1, rng, aside=0.5 * train)
                stills.append(conversation(name, turns, image=f"{split}/{i // 2:05d}.png"))
    for name, rows in files.items():
        cli.write_rows(os.path.join(folder, f"{name}.jsonl"), rows)
