"""The toy world and the tiny models that know it: `runs/tiny.sh` has all the commands in order.

    python -m toy render     # clips, still pictures, captions, questions -> out/shapes, 3 minutes on 2 cores
    python -m toy sample     # the clip that chat.py opens, one of events -> assets/sample.mp4, events.mp4
    python -m toy clip --out out/tiny    # a tiny CLIP from single frames -> out/tiny/clip
    python -m toy stories    # long clips with events and their times     -> out/stories
    python -m toy llama --out out/tiny   # a tiny LLaMA, from language    -> out/tiny/llama
    python -m toy score      # can the branch tell a clip from its twin?  -> a table
    python -m toy picture    # the same for one clip, to look at          -> docs/twins.png
    python -m toy answers    # what three kinds of tokens answer           -> a table
    python -m toy times      # who says when it happens?  Of runs/vtimellm.sh -> a table
    python -m toy needle     # LinVT's principle without videos           -> a table

The rest is the business of the ordinary scripts, and of `python -m toy.ablate`, the paper's studies in this
world.
"""
import dataclasses
from typing import Annotated

from plumbing import cli


@dataclasses.dataclass
class Config:
    stage: Annotated[str, "render", "sample", "stories", "clip", "llama", "score", "picture",
                     "answers", "times", "needle"]        # what to do, see above
    data: str = "out/shapes"           # where the clips, captions and questions are
    stories: str = "out/stories"       # where the long clips are
    out: str = "weights/tiny"          # where the trained models go
    chats: str = "out/tiny"            # where runs/tiny.sh has tuned chats
    branches: str = "weights/tiny/branch.pth"   # branch files to score, one a seed, with commas between
    pairs: cli.Count = 4000            # training clips and their twins
    seed: cli.Whole = 0                # everything random follows from it
    processes: cli.Count = 2           # that render


if __name__ == "__main__":
    CONFIG = cli.start(Config, positional=["stage"])   # before the slow imports: an error shows at once

import os

import torch

from plumbing import training
from toy import language, needle, score, stories, tiny_models, world


def render(cfg):
    training.take_folder(cfg.data)
    world.render(cfg)
    language.annotate(cfg.data, cfg.pairs, cfg.seed)


def sample(cfg):
    world.write_video(os.path.join(world.ASSETS, "sample.mp4"), world.film(world.SAMPLE, 256))
    stories.render_story((stories.SAMPLE, os.path.join(world.ASSETS, "events.mp4"), 256))


STAGES = {"render": render, "sample": sample, "stories": stories.render, "clip": tiny_models.train_clip,
          "llama": tiny_models.train_llama, "score": score.score, "answers": score.answers,
          "times": score.times, "needle": needle.needle, "picture": score.picture}


def main(cfg):
    torch.set_num_threads(1)   # the models are too small for two
    STAGES[cfg.stage](cfg)


if __name__ == "__main__":
    cli.run(main, CONFIG)
