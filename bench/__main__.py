"""Every speed claim of the README, as ratios: ours beside programs that do the same work, in the same run.

    python -m bench frames    # frames of a video, beside decord, OpenCV and PyAV; resizing, beside Pillow   -> a table
    python -m bench flat      # 101 frames of a minute, of ten minutes and of an hour   -> a table, docs/frames_flat.png
    python -m bench line      # a chat about 5 seconds, a minute, ten minutes, an hour   -> two tables, docs/chat_flat.png
    python -m bench pretrain  # a step of pretraining at the size of ViT-L/14, with and without masks   -> a table
    python -m bench load      # how soon ViT-L/14 and a LLaMA-7B are ready, and what memory that takes   -> a table
    python -m bench chat      # prompts and answers of a 7B, beside transformers and llama.cpp   -> a table
    python -m bench quality   # what rounding to int8 and int4 costs: a trained tiny LLaVA, CLIP, layers of a 7B   -> a table

Each measurement (but for quality, which takes no time) is a process of its own, and those of a table take turns, after one round (of pretrain: one step)
that is not counted; the tables have medians.
The physical limits, what the machine reads and multiplies, are measured in the same run. Peers take part if --peer_python can import them: decord,
opencv-python-headless, transformers, llama-cpp-python; who cannot is named. Clips (2.7 GB) and weights of the full size with random numbers (28 GB;
`--layers 2` is a quick look) are made in out/bench when they are first wanted. What is measured is in bench/, and how.
"""
import dataclasses
import sys

from bench import chats, frames, training
from plumbing import cli


@dataclasses.dataclass
class Config:
    stage: str                              # what to measure: frames, flat, line, pretrain, load, chat or quality
    data: str = "out/bench"                 # where the clips and weights are, or will be
    runs: int = 5                           # measurements of each; the medians are shown
    peer_python: str = sys.executable       # the interpreter that can import decord, cv2, transformers and llama_cpp
    layers: int = 32                        # of the 7B; fewer for a quick look, the work of a layer stays the same
    prompt: int = 300                       # tokens of a prompt
    tokens: int = 16                        # tokens of an answer
    picture: str = "docs/frames_flat.png"   # what flat draws
    weights: str | None = None              # of line: a folder for chat.py; None: random numbers, in the full size
    num_frames: int = 101                   # of line: frames of each video
    line_picture: str = "docs/chat_flat.png"   # what line draws


STAGES = {"frames": frames.frames, "flat": frames.flat, "line": frames.line, "pretrain": training.pretrain, "load": chats.load, "chat": chats.chat,
          "quality": chats.quality}


def main(cfg):
    if cfg.stage not in STAGES:
        raise cli.UserError(f"{cfg.stage}: no such stage; choose one of {', '.join(STAGES)}")
    STAGES[cfg.stage](cfg)


if __name__ == "__main__":
    cli.run(main, Config, positional=["stage"])
