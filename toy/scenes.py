"""Long videos in the toy world: scenes of two seconds, and questions about one of them.

    python -m toy.scenes write       # long videos and questions for chat_tune.py -> out/shapes
    python -m toy.scenes sample      # a minute of video, to ask about            -> assets/scenes.mp4
    python -m toy.scenes answers     # what is said of it, all frames at once and by LinVT -> a table
    python -m toy.scenes table       # right answers of LinVT, and of other rows  -> a table
    python -m toy.scenes turns       # of second questions about another scene    -> a table
    python -m toy.scenes principle   # of answers that no training had            -> a table

The scene that is asked about has a look that no other scene has: shape, colour, or both together. A long
video is a list of clips. A file of their packets, one clip after the other, shows the same frames.
`runs/linvt.sh` has the commands in order.
"""
import dataclasses
from typing import Annotated

from plumbing import cli


@dataclasses.dataclass
class Config:
    stage: Annotated[str, "write", "sample", "answers", "table", "turns", "principle"]   # what to do
    data: str = "out/shapes"      # where the clips are, and the questions go
    weights: str = "weights/tiny"   # folders that chat.py opens, one a seed, with commas between
    out: str = "out/scenes"       # what the frozen weights say of clips
    steps: cli.Count = 2000       # of training
    questions: cli.Count = 192    # of each kind and length, to test
    seeds: cli.Count = 3          # of what is trained here for `principle`; `table` has one for each folder
    seed: cli.Whole = 0           # the questions follow from it


if __name__ == "__main__":
    CONFIG = cli.start(Config, positional=["stage"])   # before the slow imports: an error shows at once

import collections
import copy
import functools
import itertools
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from linvt import LinVT, diagonal
from llm import add_lora
from model import IGNORE_INDEX, VIDEO_INDEX, VideoTokens, WindowTokens, open_chat
from plumbing.store import Store, state_of
from toy import world
from toy.language import conversation, looks, moves, put
from toy.score import reply, spread
from toy.tiny_models import fit

# kinds of questions: the topic, and by which look the scene is named
KINDS = "colour by shape", "motion by shape", "motion by colour", "motion by both"
COUNTS, BATCH, TOGETHER = (1, 4, 16, 64), 16, 32   # scenes in tests; videos a step; videos tested at once
HEADS = [f"{count} scenes" for count in COUNTS]


# -------------------------------------------------------------------------------- long videos
class Scenes:
    """Clips of the training or the test world, from which long videos are drawn."""
    def __init__(self, folder, split):
        self.clips = world.read_clips(os.path.join(folder, f"{split}_captions.jsonl"))
        self.files = [f"{split}/{i // 2:05d}{'ab'[i % 2]}.mp4" for i in range(len(self.clips))]
        self.looks = {look: np.array([getattr(clip, look) for clip in self.clips])
                      for look in ("shape", "colour")}
        self.looks["both"] = np.array([f"{clip.colour} {clip.shape}" for clip in self.clips])

    def draw(self, kind, count, rng, colours=world.COLOURS):
        """A video of `count` scenes -> numbers of its clips, a turn about one of them, of these colours."""
        look = self.looks[kind.split(" by ")[1]]
        while self.looks["colour"][asked := rng.integers(len(self.clips))] not in colours:
            pass
        others = np.flatnonzero(look != look[asked])
        chosen = rng.choice(others, count)
        chosen[rng.integers(count)] = asked
        return chosen, self.ask(asked, kind, rng)

    def ask(self, i, kind, rng):
        """About a clip, by its number -> question, answer."""
        (topic, named), clip = kind.split(" by "), self.clips[i]
        return put(topic, clip, (looks(clip) | moves(clip))[topic], rng, named=[named])

    def draw_two(self, count, rng):
        """A video of `count` scenes, two of which have looks of their own -> numbers of its clips, a turn
        about the one, a turn about the other."""
        chosen, asked = rng.integers(len(self.clips), size=count), []
        for i in rng.permutation(chosen):
            kind = rng.choice(KINDS)
            look = self.looks[kind.split(" by ")[1]]
            if (look[chosen] == look[i]).sum() == 1:
                asked.append(self.ask(i, kind, rng))
        return (chosen, *asked[:2]) if len(asked) > 1 else self.draw_two(count, rng)


def lesson(share, rng):
    """How many scenes a video has, when a share 0..1 of training is over: at first few."""
    return int(rng.choice([2] if share < 0.15 else [2, 4] if share < 0.3 else [2, 4, 8, 16]))


def write(cfg):
    """Rows for chat_tune.py: each step of training has videos of one length, and so has each 32 of a test.
    In train_turns every other row has a second question, about another scene than the first."""
    train, test = (Scenes(cfg.data, split) for split in ("train", "test"))
    rng, files = np.random.default_rng([cfg.seed, 20]), collections.defaultdict(list)

    def add(file, scenes, chosen, *turns, **kind):
        videos = [scenes.files[i] for i in chosen]
        files[file].append(conversation(len(files[file]), turns, videos=videos, **kind))
    for step in tqdm(range(cfg.steps), "write"):
        count = lesson(step / cfg.steps, rng)
        for _ in range(BATCH):
            add("train_scenes", train, *train.draw(rng.choice(KINDS), count, rng))
    for i in range(cfg.steps // 4 * BATCH):
        chosen, *turns = train.draw_two(8, rng)
        add("train_turns", train, chosen, *turns[i % 2:])
    for count, kind in itertools.product(COUNTS, KINDS):
        rng = np.random.default_rng([cfg.seed, 21, count])
        for _ in range(cfg.questions):
            add("test_scenes", test, *test.draw(kind, count, rng), kind=f"{kind}, {count:2} scenes")
    for name, rows in files.items():
        cli.write_rows(os.path.join(cfg.data, f"{name}.jsonl"), rows)


SAMPLE = os.path.join(world.ASSETS, "scenes.mp4")


def chosen_for_sample(cfg, scenes):
    """-> numbers of 32 clips of the test world, all different. No other is red, cyan, a circle or a star: a
    question that says one of these words is about the red circle or the cyan star."""
    alone = [("red", "circle"), ("cyan", "star")]
    found, rng = {}, np.random.default_rng(cfg.seed)   # {(colour, shape): number of a clip}
    for i in rng.permutation(len(scenes.clips)):
        clip = scenes.clips[i]
        if (clip.colour, clip.shape) in alone or not {clip.colour, clip.shape} & {*itertools.chain(*alone)}:
            found.setdefault((clip.colour, clip.shape), i)
    others = [i for what, i in found.items() if what not in alone][:30]
    return rng.permutation([*(found[what] for what in alone), *others])


def sample(cfg):
    scenes = Scenes(cfg.data, "test")
    world.join([os.path.join(cfg.data, scenes.files[i]) for i in chosen_for_sample(cfg, scenes)], SAMPLE)


@torch.inference_mode()
def answers(cfg):
    """What is said of every fourth scene of the sample, of 256 frames: all at once, and chosen by LinVT."""
    scenes, rng = Scenes(cfg.data, "test"), np.random.default_rng(cfg.seed)
    chats = {kind: open_chat(cfg.weights, kind).load() for kind in ("branch", "branch+linvt")}
    pixels, _ = chats["branch"].video_tokens.watch(SAMPLE, world.SIZE, 256)   # both look alike at frames
    rows = []
    for at, i in list(enumerate(chosen_for_sample(cfg, scenes)))[::4]:
        question, right = scenes.ask(i, "motion by both", rng)
        said = [reply(chat, pixels, question) for chat in chats.values()]
        shown = (answer if answer == right else f"*{answer}*" for answer in said)   # wrong: in italics
        rows.append([f"{2 * at} to {2 * at + 2} s", question, *shown, right])
    cli.table(["scene", "question", *chats, "right"], rows)


# -------------------------------------------------------------------------------- what rows are worth
POOLS = {
    "mean of the windows": lambda x: x.mean(1), "the middle window": lambda x: x[:, x.shape[1] // 2],
    "evenly spaced tokens": lambda x: F.interpolate(x.flatten(1, 2).float().mT, 16, mode="nearest-exact").mT,
    "`st_pool` of windows": lambda x: torch.cat([x.mean(2), x.mean(1)], 1),
    "all tokens": lambda x: x.flatten(1, 2)}   # of (B, T, N, D)


class World:
    """The clips of a split, what the branch of a folder of weights says of each, and a chat about them."""
    def __init__(self, cfg, split, folder):
        self.cfg, self.scenes, self.chat = cfg, Scenes(cfg.data, split), open_chat(folder, "branch").load()
        self.branch = self.chat.video_tokens
        self.projector, self.llm = self.branch.mm_projector, self.chat.llm
        names, store = ("clip", "chat.bin"), Store(cfg.out)
        key = [split, *(state_of(os.path.join(folder, name)) for name in names), len(self.scenes.clips)]
        if not store.get(key):
            numbers = tqdm(range(len(self.scenes.clips)), f"see {split}")
            seen = [self.branch.see(self.chat.clip, self.pixels(i)[None]) for i in numbers]
            store.put(key, {"seen": torch.cat(seen).half()})
        self.seen = store.get(key)[0]["seen"]   # (clips, N, D)

    @functools.lru_cache(2000)   # 200 MB: a test asks about its clips again and again
    def pixels(self, i):
        """The number of a clip -> (8, 3, H, W) uint8."""
        return self.branch.watch(os.path.join(self.cfg.data, self.scenes.files[i]), world.SIZE)[0]

    def right(self, tokens, count, kind, pool=lambda x: x, pixels=False, colours=world.COLOURS, llm=None):
        """Per cent of questions that are answered exactly. tokens: the kind of video tokens. It gets windows
        of the branch, or what `pool` makes of these, or `pixels`. llm: another than the weights have."""
        self.chat.video_tokens, self.chat.llm, right = tokens.eval(), llm or self.llm, []
        rng = np.random.default_rng([self.cfg.seed, 21, count])
        for _ in range(0, self.cfg.questions, TOGETHER):
            drawn = [self.scenes.draw(kind, count, rng, colours) for _ in range(TOGETHER)]
            video = torch.stack([torch.cat([*map(self.pixels, chosen)]) if pixels else self.seen[chosen]
                                 for chosen, _ in drawn])
            right += self.chat.exact(pool(video), [[turn] for _, turn in drawn], "vicuna_v1")
        return 100 * sum(right) / len(right)

    def row(self, name, column, trained, kind, llms=itertools.repeat(None), **options):
        """A row of a table about trained kinds of video tokens, one a seed, and LLaMAs that read them."""
        return [name, column, *(spread([self.right(tokens, count, kind, llm=llm, **options)
                                        for tokens, llm in zip(trained, llms)]) for count in COUNTS)]

    def train(self, tokens, learned, seed, pool=lambda x: x, kinds=KINDS, colours=world.COLOURS, llm=None,
              lr=2e-3):
        """Trains modules of a kind of video tokens, or of a LLaMA, as the stages linvt of chat_tune.py do."""
        self.chat.video_tokens, self.chat.llm = tokens.train(), llm or self.llm
        rng = np.random.default_rng([seed, 22])
        learned.requires_grad_(True)

        def loss_of(step):
            count = lesson(step / self.cfg.steps, rng)
            drawn = [self.scenes.draw(rng.choice(kinds), count, rng, colours) for _ in range(BATCH)]
            prompts, asked = self.chat.prompts([[turn] for _, turn in drawn], "vicuna_v1")
            seen = torch.stack([self.seen[chosen] for chosen, _ in drawn])
            total, answered = self.chat(pool(seen), prompts, asked)
            return total / answered, ""
        fit("train", learned.parameters(), loss_of, self.cfg.steps, round(0.03 * self.cfg.steps), seed, lr,
            0, 1, betas=(0.9, 0.999))
        return tokens


def compared(cfg, folders, test, train):
    """Yields what a row is of: its name, trained kinds of video tokens, options of World.row. What is trained
    here has a seed for each folder."""
    for name, pool in POOLS.items():
        yield name, [VideoTokens(test.projector)], {"pool": pool}
    yield "`branch` over all frames", [test.branch], {"pixels": True}
    means, pool = [VideoTokens(copy.deepcopy(test.projector)) for _ in folders], lambda x: x.mean(1)
    means = [train.train(tokens, tokens.mm_projector, seed, pool) for seed, tokens in enumerate(means)]
    yield "mean, its projector trained", means, {"pool": pool}
    readers, pool = [VideoTokens(copy.deepcopy(test.projector)) for _ in folders], POOLS["all tokens"]
    llms = [add_lora(copy.deepcopy(test.llm), 16, 32) for _ in folders]
    for seed, (tokens, llm) in enumerate(zip(readers, llms)):
        loras = [part for name, part in llm.named_modules() if name.endswith(("lora_A", "lora_B"))]
        learned = nn.ModuleList([tokens.mm_projector, *loras])
        train.train(tokens, learned, seed, pool, llm=llm, lr=1e-3)
    yield "all tokens, projector and LoRA trained", readers, {"pool": pool, "llms": llms}
    yield "LinVT", [open_chat(folder, "branch+linvt").load().video_tokens for folder in folders], {}


def table(cfg):
    """Right answers about one scene of a long video of the test world, for every kind of rows."""
    folders = cfg.weights.split(",")
    test, train = (World(cfg, split, folders[0]) for split in ("test", "train"))
    cli.table(["rows", "question", *HEADS], (
        test.row(name, kind, trained, kind, **options)
        for name, trained, options in compared(cfg, folders, test, train) for kind in KINDS))


@torch.no_grad()
def turns(cfg):
    """Right second questions about 8 scenes, the first of which was about another scene: whose rows stand
    where? History is kept; a first question with its answer takes the place that it takes in a chat."""
    folders, found = cfg.weights.split(","), collections.defaultdict(list)
    for folder in folders:
        test = World(cfg, "test", folder)
        chat, rng = test.chat, np.random.default_rng([cfg.seed, 23])
        chat.video_tokens = open_chat(folder, "branch+linvt").load().video_tokens
        drawn = [test.scenes.draw_two(8, rng) for _ in range(cfg.questions)]
        for some in zip(*[iter(drawn)] * TOGETHER):
            seen = torch.stack([test.seen[chosen] for chosen, *_ in some])
            first, second = [[one] for _, one, _ in some], [[two] for *_, two in some]
            both = [[*talk] for _, *talk in some]
            for way, talks, asked in (
                    ("the first question, alone", first, first), ("the second, alone", second, second),
                    ("the second, rows replaced in place", both, second),
                    ("the second, rows of the first", both, first),
                    ("the second, rows before its answer", both, second)):
                prompts, _ = chat.prompts(talks, "vicuna_v1")
                if "before" in way:
                    prompts = [moved(chat.tokenizer, *prompt) for prompt in prompts]
                logits, target = chat.logits(seen, prompts, [question for [(question, _)] in asked])
                right = (logits.argmax(-1) == target) | (target == IGNORE_INDEX)
                found[way, folder] += right.all(1).tolist()
    for way in dict.fromkeys(way for way, _ in found):
        print(f"| {way} | {spread([100 * np.mean(found[way, folder]) for folder in folders])} |", flush=True)


def moved(tokenizer, ids, labels):
    """A prompt of prompt_ids -> the same with the video before the last ASSISTANT."""
    at, answer = ids.index(VIDEO_INDEX), next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
    new = answer - len(tokenizer.encode("ASSISTANT:"))
    return (ids[:at] + ids[at + 1:new] + [VIDEO_INDEX] + ids[new:],
            labels[:at] + labels[at + 1:new] + [IGNORE_INDEX] + labels[new:])


class WithMatrices(LinVT):
    """LinVT with what it must not have: a value and an output matrix, the identity at first."""
    def __init__(self, dim, tokens, **options):
        super().__init__(dim, tokens, **options)
        self.value, self.output = diagonal(dim, 1), diagonal(dim, 1)

    def forward(self, x, text, mask):
        return self.output(super().forward(x, text, mask, self.value(x)))


def principle(cfg):
    """Colours are asked about, but never orange or cyan. What is known of these when the test asks?"""
    test, train = (World(cfg, split, cfg.weights) for split in ("test", "train"))
    held = ("orange", "cyan")
    known = [colour for colour in world.COLOURS if colour not in held]

    def rows():
        for terms, options in (("a + b", {"top_k": None}), ("a + b + c + d", {"content": True, "top_k": 64})):
            for name, module in (("averages", LinVT), ("value and output matrices", WithMatrices)):
                trained = []
                for seed in range(cfg.seeds):
                    torch.manual_seed(seed)
                    linvt = module(128, 17, **options)
                    tokens = WindowTokens(test.projector, test.branch.branch, linvt)
                    trained.append(train.train(tokens, linvt, seed, kinds=KINDS[:1], colours=known))
                for column, colours in (("trained", known), ("never asked about", held)):
                    yield test.row(f"{name}, {terms}", column, trained, KINDS[0], colours=colours)
    cli.table(["rows", "colours", *HEADS], rows())


STAGES = {"write": write, "sample": sample, "answers": answers, "table": table, "turns": turns,
          "principle": principle}


def main(cfg):
    torch.set_num_threads(1)   # the models are too small for two
    STAGES[cfg.stage](cfg)


if __name__ == "__main__":
    cli.run(main, CONFIG)
