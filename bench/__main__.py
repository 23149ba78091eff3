"""Every speed claim, most as ratios: ours beside programs that do the same work, in the same run.

    python -m bench frames    # frames of a video, beside decord   -> a table
    python -m bench loader    # clips a second for a training, by decoding processes   -> a table
    python -m bench line      # a chat about 5 seconds, a minute, ten minutes, an hour   -> a table, a picture
    python -m bench chat      # prompts and answers of a 7B, beside transformers   -> a table
    python -m bench clip      # a frame in CLIP, beside the machine's products   -> a table
    python -m bench linvt     # LinVT of a 7B's size, beside all tokens of its frames   -> a table
    python -m bench gpu       # what a GPU computes and how fast: 7 minutes at most   -> tables

Each measurement but those of gpu is a process of its own, on Linux. Those of a table take turns, after a
round that is not counted; the tables have medians. The physical limits, what the machine reads and
multiplies, are measured in the same run. The peers, decord and transformers, take part if installed.
Clips (2.7 GB) and weights of the full size with random numbers (15 GB; `--layers 2` is a quick look) are made
in out/bench when they are first wanted.
"""
import dataclasses
import importlib
from typing import Annotated

from plumbing import cli


@dataclasses.dataclass
class Config:
    stage: Annotated[str, "frames", "loader", "line", "chat", "clip", "linvt", "gpu"]   # what to measure
    data: str = "out/bench"   # where the clips and weights are, or will be
    pictures: str = "docs"    # folder for the picture
    runs: cli.Count = 5       # measurements of each; the medians are shown
    tokens: Annotated[str, "branch", "frame_cls", "linvt"] = "branch"   # of line: BT-Adapter, VTimeLLM, LinVT
    layers: cli.Count = 32    # of the 7B; fewer for a quick look, the work of a layer stays the same


def main(cfg):
    file = {"frames": "frames", "loader": "frames", "gpu": "gpu"}.get(cfg.stage, "chat")
    getattr(importlib.import_module(f"bench.{file}"), cfg.stage)(cfg)


if __name__ == "__main__":
    cli.run(main, cli.start(Config, positional=["stage"]))
