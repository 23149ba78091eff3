"""What a GPU computes, and how fast: errors of precisions and schemes, training in half precision, speed.

Seven minutes at most. Nothing is decoded.
"""
import copy
import importlib.util
import os
import sys
import time
from unittest import mock

import torch
import torch.nn as nn

if importlib.util.find_spec("av") is None:   # nothing here decodes, and a machine with a GPU may lack PyAV
    parts = "av", "av.error", "av.stream", "av.video", "av.video.frame", "av.video.reformatter"
    sys.modules |= dict.fromkeys(parts, mock.MagicMock())

from bench.measure import TINY, best, filled, multiplying, reading, table
from clip import CLIP, CLIPConfig, load_clip
from llm import KVCache, LLaMA, LLaMAConfig
from model import (Branch, BranchTokens, Pretraining, VideoEncoder, mbca_loss, open_chat, prompt_ids,
                   tube_mask, vtc_loss)
from plumbing import cli, quant, training

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def random_pixels(device, *shape):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)


# -------------------------------------------------------------------------------- errors
@torch.inference_mode()
def answers(kind, device):
    """What the tiny weights make of fixed inputs, in a precision or scheme -> {what: tensor}, fp32."""
    chat, rounded = open_chat(TINY).load(), kind in ("int8", "int4")
    if rounded:
        quant.quantize(chat.clip.vision_model, kind)
        quant.quantize(chat.llm, kind)
    chat.to(device, HALVES.get("fp16" if rounded and device.type == "cuda" else kind, torch.float32))
    rows = chat.embed_video(random_pixels(device, 2, 8, 3, 64, 64))
    ids, _ = prompt_ids(chat.tokenizer, [("What does the shape do last?", None)])
    logits = chat.llm(embeds=torch.stack([chat.splice(ids, tokens) for tokens in rows]))
    return {"video tokens": rows.float().cpu(), "logits": logits.float().cpu()}


def errors(device):
    reference, rows = answers("fp32", torch.device("cpu")), []
    for kind in ("fp32", "fp16", "bf16", "int8", "int4"):
        found = answers(kind, device)
        apart = [((found[what] - true).norm() / true.norm()).item() for what, true in reference.items()]
        same = found["logits"].argmax(-1) == reference["logits"].argmax(-1)
        rows.append([kind, *apart, same.float().mean().item()])
    table(["error to fp32 on the CPU", *reference, "likeliest words alike"], rows)


# -------------------------------------------------------------------------------- training
def pretraining(device, dtype):
    """-> (model, loss of a step): pretrain.py's, with the frozen towers in `dtype`."""
    clip = load_clip(os.path.join(TINY, "clip"))[0].to(dtype)
    clip.vision_model.post_layernorm.float()   # through these two goes the branch's gradient
    clip.visual_projection.float()
    model = Pretraining(VideoEncoder(clip, Branch.beside(clip, drop_path=0.1))).to(device)
    video, ids = random_pixels(device, 8, 8, 3, 64, 64), torch.arange(8 * 32, device=device).view(8, 32)

    def loss():
        kept = tube_mask(8, clip.config.patch_tokens, 0.7).to(device)
        states, text = model.see(video, ids, kept)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            feature, patches, mbta = model(states, kept)
        return vtc_loss(feature, text) + 0.1 * mbca_loss(patches, text) + 0.8 * mbta
    return model, loss


def chat_tuning(device, dtype):
    """-> (model, loss of a step): the video tokens of two conversations, beside a frozen LLaMA."""
    chat = open_chat(TINY).load().to(device)
    chat.video_tokens.requires_grad_(True)
    turns = [[("What does the shape do?", f"It moves {way}.")] for way in ("left", "up")]
    prompts, video = [prompt_ids(chat.tokenizer, t) for t in turns], random_pixels(device, 2, 8, 3, 64, 64)

    def loss():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            total, learned = chat(video, prompts)
            return total / learned
    return chat, loss


def train(make, device, dtype, count):
    """Some steps; then the second half of them again, from what was kept in the middle -> the losses of both
    ways, s a step."""
    torch.manual_seed(0)
    model, loss_of = make(device, dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    parts, losses = (model, optimizer, scaler), []
    for step in [*range(count), *range(count // 2, count)]:
        if len(losses) == count // 2:
            middle = copy.deepcopy([part.state_dict() for part in parts])
        elif len(losses) == count:
            for part, state in zip(parts, middle):
                part.load_state_dict(state)
            began = time.perf_counter()   # now, since the first steps warm up
        training.seed_step(0, step)
        loss = loss_of()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trained, 5.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses[:count], losses[count:], (time.perf_counter() - began) / (count - count // 2)


def steps(device, count=20):
    rows = []
    for make in (pretraining, chat_tuning):
        for name, dtype in {"fp32": torch.float32, **HALVES}.items():
            once, again, seconds = train(make, device, dtype, count)
            apart = max(abs(a - b) for a, b in zip(once[count // 2:], again))
            rows.append([make.__name__, name, once[0], once[-1], apart, 1000 * seconds])
    table([f"{count} steps", "autocast", "first loss", "last loss", "resumed, apart", "ms a step"], rows)


# -------------------------------------------------------------------------------- speed
@torch.inference_mode()
def speed(device, c, config, frames=100, prompt=300):
    """CLIP with the branch and a LLaMA of random numbers, beside what the machine can."""
    dtype = torch.bfloat16
    with torch.device("meta"):
        clip, branch, llama = CLIP(c), Branch(c.vision_width, c.vision_heads, c.vision_mlp), LLaMA(config)
    tokens, cache = BranchTokens(nn.Identity(), branch), KVCache(config, 1, prompt + 1, device, dtype)
    clip, tokens, llama = (filled(module, device, dtype) for module in (clip, tokens, llama))
    pixels = random_pixels(device, 1, frames, 3, c.image_size, c.image_size)
    ids = torch.ones(1, prompt, dtype=torch.long, device=device)

    def read(start, n):
        cache.truncate(start)
        llama(ids[:, :n], kv_cache=cache, last_only=True)
    seeing = best(lambda: tokens.see(clip, pixels), device)
    prefill, decode = best(lambda: read(0, prompt), device), best(lambda: read(prompt, 1), device, 20)
    matrices = quant.nbytes(llama, None, dtype) - llama.model.embed_tokens.weight.nbytes   # 2 bytes a number
    work = matrices * prompt / prefill   # a multiplication and an addition for each number
    product, bandwidth = multiplying(8192, config.width, config.mlp, dtype, device), reading(device)
    table(["in bf16", "measured", "the machine", "share"], [
        [f"CLIP and branch, {frames} frames", f"{frames / seeing:.1f} frames/s", "", ""],
        [f"a prompt of {prompt} tokens, LLaMA of {config.layers} layers",
         f"{prefill:.3f} s, {work / 1e12:.1f} TFLOP/s", f"{product / 1e12:.1f} TFLOP/s", work / product],
        ["a token", f"{1 / decode:.1f} tokens/s, {matrices / decode / 1e9:.0f} GB/s",
         f"{bandwidth / 1e9:.0f} GB/s", matrices / decode / bandwidth]])


def gpu(cfg):
    if not torch.cuda.is_available():
        raise cli.UserError("gpu: this machine, or this build of torch, has none")
    device = torch.device("cuda")
    print(f"torch {torch.__version__}; {torch.cuda.get_device_name()}\n")
    errors(device)
    steps(device)
    speed(device, CLIPConfig(), LLaMAConfig(layers=cfg.layers))
