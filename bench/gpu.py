"""What a GPU computes, and how fast: parity, training in half precision, and speed, in under 7 minutes.

Nothing is decoded, so it runs where PyAV is not installed. On a CPU the same runs with small sizes, which
tests this file and nothing else.
"""
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from unittest import mock

import torch
import torch.nn as nn

if importlib.util.find_spec("av") is None:   # data.py needs it for videos only
    sys.modules |= dict.fromkeys(("av", "av.stream", "av.video", "av.video.reformatter"), mock.MagicMock())

from bench.measure import TINY, filled, table
from clip import CLIP, CLIPConfig, load_clip
from llm import KVCache, LLaMA, LLaMAConfig
from model import (Branch, BranchTokens, Pretraining, VideoEncoder, load_branch, mbca_loss, open_chat,
                   prompt_ids, tube_mask, vtc_loss)
from plumbing import quant, training

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def random_pixels(*shape):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


# -------------------------------------------------------------------------------- parity
@torch.inference_mode()
def answers(kind, device):
    """What the tiny weights say about fixed inputs, in a precision or scheme -> {what: tensor}, fp32."""
    rounded = kind in ("int8", "int4")
    dtype = HALVES.get(kind, torch.float16 if rounded and device.type == "cuda" else torch.float32)
    chat, clip = open_chat(TINY).load(), load_clip(os.path.join(TINY, "clip"))[0].float()
    encoder = VideoEncoder(clip, load_branch(os.path.join(TINY, "branch.pth"), clip)).eval()
    if rounded:
        quant.quantize(clip.vision_model, kind)
        quant.quantize(chat.llm, kind)
    encoder.to(device, dtype)
    chat.llm.to(device, dtype)
    branch, mean = encoder(random_pixels(2, 8, 3, 64, 64).to(device))
    ids = chat.tokenizer.encode("USER: A small red circle moves left, then up. What does it do last?")
    logits = chat.llm(torch.tensor([ids], device=device))
    said = {"CLIP, mean over frames": mean, "branch": branch, "LLaMA's logits": logits}
    return {what: t.float().cpu() for what, t in said.items()}


def parity(device):
    reference, rows = answers("fp32", torch.device("cpu")), []
    for kind in ("fp32", "fp16", "bf16", "int8", "int4"):
        found = answers(kind, device)
        errors = [((found[what] - true).norm() / true.norm()).item() for what, true in reference.items()]
        likeliest = [said["LLaMA's logits"].argmax(-1) for said in (found, reference)]
        rows.append([kind, *errors, (likeliest[0] == likeliest[1]).float().mean().item()])
    table(["error to fp32 on the CPU", *reference, "likeliest words alike"], rows)


# -------------------------------------------------------------------------------- training
def pretraining(device, dtype):
    """-> (model, loss of a step): pretrain.py's, with the frozen towers in `dtype`."""
    clip = load_clip(os.path.join(TINY, "clip"))[0].to(dtype)
    clip.vision_model.post_layernorm.float()   # through these two goes the branch's gradient
    clip.visual_projection.float()
    model = Pretraining(VideoEncoder(clip, Branch.beside(clip, drop_path=0.1))).to(device)
    video, ids = random_pixels(8, 8, 3, 64, 64).to(device), torch.arange(8 * 32).view(8, 32).to(device)

    def loss():
        kept = tube_mask(8, clip.config.patch_tokens, 0.7).to(device)
        states, text = model.see(video, ids, kept)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            feature, patches, mbta = model(states, kept)
        return vtc_loss(feature, text) + 0.1 * mbca_loss(patches, text) + 0.8 * mbta
    return model, loss


def chat_tuning(device, dtype):
    """-> (model, loss of a step): chat_tune.py's stage video, the LLaMA frozen."""
    chat = open_chat(TINY, "branch", tuned=False).load(device=device)
    chat.video_tokens.requires_grad_(True)
    video = random_pixels(2, 8, 3, 64, 64).to(device)
    prompts = [prompt_ids(chat.tokenizer, [("What does the shape do?", f"It moves {way}.")])
               for way in ("left", "up")]

    def loss():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return chat(video, prompts)
    return chat, loss


def train(make, device, dtype, start, end, path):
    """Steps `start` to `end`, from the checkpoint at `path` and to it -> losses, s a step."""
    torch.manual_seed(0)
    model, loss_of = make(device, dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses, seconds = torch.optim.AdamW(trained, lr=1e-4), [], []
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if start:
        saved = training.load_checkpoint(path)
        training.put_back(dict(enumerate(trained)), saved["model"], path)
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
    for step in range(start, end):
        began = time.perf_counter()
        training.seed_step(0, step)
        loss = loss_of()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trained, 5.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
    training.save_checkpoint(path, {"model": dict(enumerate(p.detach() for p in trained)),
                                    "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()})
    return losses, statistics.median(seconds)


def resume(device, steps=20):
    """These steps in one go, and the same with a checkpoint in the middle."""
    rows, middle = [], steps // 2
    for make in (pretraining, chat_tuning):
        for name, dtype in {"fp32": torch.float32, **HALVES}.items():
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "last.pth")
                whole, seconds = train(make, device, dtype, 0, steps, path)
                train(make, device, dtype, 0, middle, path)
                second, _ = train(make, device, dtype, middle, steps, path)
            apart = max(abs(a - b) for a, b in zip(whole[middle:], second))
            rows.append([make.__name__, name, whole[0], whole[-1], apart, 1000 * seconds])
    table([f"{steps} steps", "autocast", "first loss", "last loss", "after resuming, at most apart",
           "ms a step"], rows)


# -------------------------------------------------------------------------------- speed
def seconds(device, work, count=5):
    """The best of a few runs, after one that is not counted."""
    times = []
    for _ in range(count + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


@torch.inference_mode()
def speed(cfg, device):
    """CLIP with the branch and a LLaMA-7B of random numbers, beside what the machine can."""
    dtype, frames, c, config = torch.bfloat16, 100, CLIPConfig(), LLaMAConfig(layers=cfg.layers)
    numbers, rows = 1 << 30, 8192   # of the limits
    if device.type == "cpu":
        c = CLIPConfig(image_size=64, vision_width=64, vision_layers=5, vision_heads=1, vision_mlp=128)
        frames, config = 8, LLaMAConfig(width=256, layers=2, heads=4, mlp=512)
        numbers, rows = 1 << 22, 256
    with torch.device("meta"):
        clip, branch, llama = CLIP(c), Branch(c.vision_width, c.vision_heads, c.vision_mlp), LLaMA(config)
    clip, tokens = filled(clip, device, dtype), BranchTokens(nn.Identity(), filled(branch, device, dtype))
    pixels = random_pixels(1, frames, 3, c.image_size, c.image_size).to(device)
    seeing = seconds(device, lambda: tokens.see(clip, pixels))
    llama = filled(llama, device, dtype)
    cache = KVCache(config, 1, cfg.prompt + 1, device, dtype)
    ids = torch.ones(1, cfg.prompt, dtype=torch.long, device=device)

    def read(start, n):
        cache.truncate(start)
        llama(ids[:, :n], kv_cache=cache, last_only=True)
    prefill = seconds(device, lambda: read(0, cfg.prompt))
    decode = seconds(device, lambda: read(cfg.prompt, 1), 20)
    matrices = quant.nbytes(llama, None, dtype) - llama.model.embed_tokens.weight.nbytes
    memory, x = torch.ones(numbers, device=device), torch.ones(rows, config.width, device=device, dtype=dtype)
    w = torch.ones(config.mlp, config.width, device=device, dtype=dtype)
    bandwidth = memory.nbytes / seconds(device, memory.sum)
    product = 2 * x.numel() * len(w) / seconds(device, lambda: x @ w.T)
    table(["in bf16", "measured", "the machine", "share"], [
        [f"CLIP and branch, {frames} frames", f"{frames / seeing:.1f} frames/s", "", ""],
        [f"a prompt of {cfg.prompt} tokens, LLaMA of {config.layers} layers",
         f"{prefill:.3f} s, {matrices * cfg.prompt / prefill / 1e12:.1f} TFLOP/s",
         f"{product / 1e12:.1f} TFLOP/s", matrices * cfg.prompt / prefill / product],
        ["a token", f"{1 / decode:.1f} tokens/s, {matrices / decode / 1e9:.0f} GB/s",
         f"{bandwidth / 1e9:.0f} GB/s", matrices / decode / bandwidth]])


def gpu(cfg):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = "no GPU: small sizes on the CPU, which say nothing about speed"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    print(f"torch {torch.__version__}; {name}\n")
    parity(device)
    resume(device)
    speed(cfg, device)
