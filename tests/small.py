"""What a chat needs, made in a moment: weights in the layouts of the released ones, random and small, and videos."""
import fractions
import os

import av
import numpy as np
import torch

from clip import CLIP, CLIPConfig, Tokenizer, save_clip
from llm import LLaMA, LLaMAConfig, load_tokenizer, save_llama
from model import Branch, branch_tensors
from plumbing.training import save_checkpoint

CORPUS = ["USER: which way does the red circle move? ASSISTANT: left, then up.", "what goes right? a blue square."] * 20


def write_clip(folder, width=32):
    torch.manual_seed(0)
    save_clip(folder, CLIP(CLIPConfig(
        image_size=32, patch_size=16, vision_width=width, vision_layers=3, vision_heads=2, vision_mlp=64, text_width=16,
        text_layers=1, text_heads=2, text_mlp=16, vocab_size=514, context_length=8, projection_dim=16)), Tokenizer([]))


def write_llava(folder, tokenizer_model, visual=32, context=4096):
    """A LLaVA of random weights that is never at a loss: it always says something one can see, and never ends."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(os.path.dirname(tokenizer_model))
    llm = LLaMA(LLaMAConfig(vocab_size=tokenizer.vocab_size, width=32, layers=2, heads=2, mlp=48, context_length=context))
    with torch.no_grad():
        llm.lm_head.weight.normal_()
        for token in range(tokenizer.vocab_size):
            if token < 3 or not tokenizer.decode([token]).strip():
                llm.lm_head.weight[token] = 0   # others have a logit above 0
    save_llama(folder, llm, tokenizer_model, {"model.mm_projector.weight": torch.randn(32, visual) / 8,
                                              "model.mm_projector.bias": torch.zeros(32)})


def write_branch(path, width=32):
    torch.manual_seed(0)
    save_checkpoint(path, {"state_dict": branch_tensors(Branch(width, 2, 64, 2), "backbone.")})


def write_video(path, width=64, height=48, seconds=2, sound_only=False):
    """A white bar that moves from left to right; or only silence."""
    with av.open(str(path), "w") as out:
        if sound_only:
            stream = out.add_stream("aac", rate=48000)
            silence = np.zeros((1, 1024), np.float32)
            frames = [av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono") for _ in range(9)]
        else:
            stream = out.add_stream("libx264", rate=10, options={"threads": "1"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            pictures = np.zeros((10 * seconds, height, width, 3), np.uint8)
            for i, picture in enumerate(pictures):
                picture[:, i * width // len(pictures):][:, :8] = 255
            frames = [av.VideoFrame.from_ndarray(picture) for picture in pictures]
        for i, frame in enumerate(frames):
            if sound_only:
                frame.rate, frame.pts = 48000, 1024 * i
            else:
                frame.pts, frame.time_base = i, fractions.Fraction(1, 10)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return str(path)
