"""What a chat needs, made in a moment: random, small weights in the layouts of the released ones; videos."""
import os

import numpy as np
import torch

from clip import CLIP, CLIPConfig, Tokenizer, save_clip
from films import film
from llm import LLaMA, LLaMAConfig, load_tokenizer, save_llama
from model import Branch, branch_tensors
from plumbing.training import save_checkpoint
from toy.tiny_models import init_clip


def write_clip(folder, tokenizer=Tokenizer([]), **sizes):
    """A CLIP with images of 32 pixels, patches of 16 and three layers, unless `sizes` say otherwise."""
    torch.manual_seed(0)
    config = {"image_size": 32, "patch_size": 16, "vision_width": 32, "vision_layers": 3, "vision_heads": 2,
              "vision_mlp": 64, "text_width": 16, "text_layers": 1, "text_heads": 2, "text_mlp": 16,
              "context_length": 8, "projection_dim": 16}
    config = CLIPConfig(vocab_size=tokenizer.vocab_size, **{**config, **sizes})
    clip = CLIP(config)
    init_clip(clip)
    save_clip(str(folder), clip, tokenizer)


def write_branch(path, width=32, seed=0):
    """A pretraining checkpoint: a branch of two layers beside that CLIP."""
    torch.manual_seed(seed)
    save_checkpoint(path, {"state_dict": branch_tensors(Branch(width, 2, 64, 2), "backbone.")})


def write_llava(folder, tokenizer_model, visual=32, context=4096):
    """A LLaVA of random weights that always says something one can see, and never ends."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(os.path.dirname(tokenizer_model))
    config = {"width": 32, "layers": 2, "heads": 2, "mlp": 48, "context_length": context}
    llm = LLaMA(LLaMAConfig(tokenizer.vocab_size, **config))
    with torch.no_grad():
        for parameter in llm.parameters():
            if parameter.ndim == 2:   # drawn wider than a new LLaMA's, so that answers depend on the prompt
                parameter.normal_(std=0.3)
        for token in range(tokenizer.vocab_size):
            if token < 259 or not tokenizer.decode([token]).strip():   # 259: control tokens and bytes
                llm.lm_head.weight[token] = 0   # some other has a logit above 0
    projector = {"model.mm_projector.weight": torch.randn(32, visual) / 8,
                 "model.mm_projector.bias": torch.zeros(32)}
    save_llama(folder, llm, tokenizer_model, projector)


def write_video(path, width=64, height=48, seconds=2):
    """A white bar that moves from left to right, at 10 frames a second."""
    pictures = np.zeros((10 * seconds, height, width, 3), np.uint8)
    for i, picture in enumerate(pictures):
        picture[:, i * width // len(pictures):][:, :8] = 255
    return film(path, "libx264", pictures, rate=10)
