"""What a GPU computes, and how fast: errors of precisions and schemes, training in half precision, a chat and
training at full size, beside what the machine can, and beside transformers where it is installed.

Seven minutes at most. Nothing is decoded.
"""
import copy
import functools
import importlib.util
import itertools
import os
import sys
import time
from statistics import median
from unittest import mock

import torch
import torch.nn as nn

if importlib.util.find_spec("av") is None:   # nothing here decodes, and a machine with a GPU may lack PyAV
    parts = "av", "av.error", "av.stream", "av.video", "av.video.frame", "av.video.reformatter"
    sys.modules |= dict.fromkeys(parts, mock.MagicMock())

from bench.measure import TINY, best, filled, multiplying, of_numbers, reading
from clip import CLIP, CLIPConfig, load_clip
from llm import KVCache, LLaMA, LLaMAConfig, add_lora, generate
from model import (VIDEO_INDEX, Branch, BranchTokens, FrameCLS, Pretraining, STPool, VideoChat, VideoEncoder,
                   mbca_loss, open_chat, prompt_ids, tube_mask, vtc_loss)
from plumbing import cli, quant, training
from plumbing.training import PRECISIONS


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
    chat.to(device, PRECISIONS.get("fp16" if rounded and device.type == "cuda" else kind, torch.float32))
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
    cli.table(["error to fp32 on the CPU", *reference, "likeliest words alike"], rows)


# -------------------------------------------------------------------------------- training
def pretraining(clip, device, dtype, checkpointed=False):
    """-> model, loss(video, ids, hidden): of pretrain.py, with the frozen towers in `dtype`."""
    clip = clip.to(dtype)
    clip.vision_model.post_layernorm.float()   # through these two goes the branch's gradient
    clip.visual_projection.float()
    branch = Branch.beside(clip, drop_path=0.1, checkpointed=checkpointed)
    model = Pretraining(VideoEncoder(clip, branch)).to(device)

    def loss(video, ids, hidden):
        kept = tube_mask(len(video), clip.config.patch_tokens, hidden).to(device)
        states, text = model.see(video, ids, kept)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            feature, patches, mbta = model(states, kept)
        return vtc_loss(feature, text) + 0.1 * mbca_loss(patches, text) + 0.8 * mbta
    return model, loss


def chat_tuning(chat, device, dtype):
    """-> chat, loss(video, prompts): of chat_tune.py."""
    chat.to(device)

    def loss(video, prompts):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            total, learned = chat(video, prompts)
            return total / learned
    return chat, loss


def tiny_pretraining(device, dtype):
    model, loss = pretraining(load_clip(os.path.join(TINY, "clip"))[0], device, dtype)
    video, ids = random_pixels(device, 8, 8, 3, 64, 64), torch.arange(8 * 32, device=device).view(8, 32)
    return model, functools.partial(loss, video, ids, 0.7)


def tiny_chat_tuning(device, dtype):
    """Two conversations. What is learned are the video tokens, beside a frozen LLaMA."""
    chat, loss = chat_tuning(open_chat(TINY).load(), device, dtype)
    chat.video_tokens.requires_grad_(True)
    turns = [[("What does the shape do?", f"It moves {way}.")] for way in ("left", "up")]
    prompts = [prompt_ids(chat.tokenizer, t) for t in turns]
    return chat, functools.partial(loss, random_pixels(device, 2, 8, 3, 64, 64), prompts)


def stepping(model, loss_of, dtype):
    """-> step(*batch): a step of training as the scripts do it. It returns loss_of(*batch)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    scaler = torch.amp.GradScaler(trained[0].device.type, enabled=dtype == torch.float16)

    def step(*batch):
        loss = loss_of(*batch)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trained, 5.0)
        scaler.step(optimizer)
        scaler.update()
        return loss.item()
    return step, (model, optimizer, scaler)


def train(make, device, dtype, count):
    """Some steps; then the second half of them again, from what was kept in the middle -> the losses of both
    ways, s a step."""
    torch.manual_seed(0)
    step, parts = stepping(*make(device, dtype), dtype)

    def losses(numbers):
        for number in numbers:
            training.seed_step(0, number)
            yield step()
    once = list(losses(range(count // 2)))
    middle = copy.deepcopy([part.state_dict() for part in parts])
    once += losses(range(count // 2, count))
    for part, state in zip(parts, middle):
        part.load_state_dict(state)
    began = time.perf_counter()   # now, since the first steps warm up
    again = list(losses(range(count // 2, count)))
    return once, again, (time.perf_counter() - began) / len(again)


def steps(device, count=20):
    rows = []
    for what, make in (("pretraining", tiny_pretraining), ("chat_tuning", tiny_chat_tuning)):
        for name, dtype in PRECISIONS.items():
            once, again, seconds = train(make, device, dtype, count)
            apart = max(abs(a - b) for a, b in zip(once[count // 2:], again))
            rows.append([what, name, once[0], once[-1], apart, 1000 * seconds])
    cli.table([f"{count} steps", "autocast", "first loss", "last loss", "resumed, apart", "ms a step"], rows)


# -------------------------------------------------------------------------------- a chat
def llama_of_numbers(config, device, scheme=None):
    """A LLaMA of random numbers in bf16; of a scheme, random bytes, since no error is measured here."""
    with torch.device("meta"):
        llama = LLaMA(config)
    for name, linear, kind in quant.linears(llama, scheme) if scheme else ():
        tensors = {part: torch.randint(127, t.shape, dtype=t.dtype, device=device).cpu() if part == "weight"
                   else torch.full(t.shape, 1e-4, dtype=t.dtype)
                   for part, t in kind.empty(*linear.weight.shape).items()}
        llama.set_submodule(name, kind(tensors).to(device))
    return filled(llama, device)


@torch.inference_mode()
def seeing(device, c, frames):
    """Who looks at so many frames -> {who: s}."""
    clip = of_numbers(CLIP, c, device=device)
    pixels = random_pixels(device, 1, frames, 3, c.image_size, c.image_size)
    branch = of_numbers(Branch, c.vision_width, c.vision_heads, c.vision_mlp, device=device)
    tokens = BranchTokens(nn.Identity(), branch)
    found = {"CLIP and branch": best(lambda: tokens.see(clip, pixels), device),
             "CLIP alone": best(lambda: STPool(nn.Identity()).frozen(clip, pixels), device)}
    if importlib.util.find_spec("transformers"):
        from transformers import CLIPVisionConfig, CLIPVisionModel
        theirs = CLIPVisionModel(CLIPVisionConfig(
            hidden_size=c.vision_width, intermediate_size=c.vision_mlp, num_hidden_layers=c.vision_layers - 1,
            num_attention_heads=c.vision_heads, image_size=c.image_size, patch_size=c.patch_size))
        theirs, floats = theirs.to(device, torch.bfloat16).eval(), pixels[0].to(torch.bfloat16)
        found["CLIP alone, transformers"] = best(lambda: theirs(pixel_values=floats), device)
    return found


@torch.inference_mode()
def ours(device, config, prompt, answer, scheme=None):
    """-> a LLaMA, s for a prompt, when each token of an answer was there."""
    llama = llama_of_numbers(config, device, scheme)
    ids, times = torch.ones(1, prompt, dtype=torch.long, device=device), []
    cache = KVCache(config, 1, 2 * prompt + answer, device, torch.bfloat16)

    def read():
        cache.truncate(0)
        llama(ids, kv_cache=cache, last_only=True)
    prefill = best(read, device)
    cache.truncate(0)
    for _ in generate(llama, ids, kv_cache=cache, max_new_tokens=answer):
        times.append(time.perf_counter())
    return llama, prefill, times


@torch.inference_mode()
def theirs(device, config, prompt, answer):
    """The same of transformers, in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM
    llama = of_numbers(LlamaForCausalLM, LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.width, intermediate_size=config.mlp,
        num_hidden_layers=config.layers, num_attention_heads=config.heads), device=device)
    llama.model.rotary_emb = type(llama.model.rotary_emb)(llama.config).to(device)   # no parameters
    ids, times, cache = torch.ones(1, prompt, dtype=torch.long, device=device), [], None
    prefill = best(lambda: llama(ids, use_cache=True, logits_to_keep=1), device)
    for _ in range(answer):
        out = llama(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        ids.tolist()   # as ours waits for each token
        times.append(time.perf_counter())
    return llama, prefill, times


def speed(device, c, config, frames=100, prompt=300, answer=100):
    """What a chat does, with CLIP, branch and a LLaMA of random numbers, beside what the machine can."""
    product, bandwidth = multiplying(8192, config.width, config.mlp, torch.bfloat16, device), reading(device)
    print(f"in bf16 {product / 1e12:.0f} TFLOP/s; from memory {bandwidth / 1e9:.0f} GB/s\n")
    L, D = 1 + c.patch_tokens, c.vision_width   # operations of a frame, up to the last layer but one:
    work = (c.vision_layers - 1) * (4 * L * D * (2 * D + c.vision_mlp) + 4 * L * L * D)
    seen = seeing(device, c, frames)
    cli.table([f"{frames} frames, bf16", "s", "frames/s", "share of the product, CLIP"],
              [[who, s, frames / s, work * frames / s / product] for who, s in seen.items()])
    who = {f"ours, {scheme or 'bf16'}": functools.partial(ours, scheme=scheme)
           for scheme in (None, "int8", "int4")}
    if importlib.util.find_spec("transformers"):
        who["transformers, bf16"] = theirs
    rows = []
    for name, measure in who.items():
        llama, prefill, times = measure(device, config, prompt, answer)
        token = median(b - a for a, b in zip(times[2:], times[3:]))   # behind the start of a CUDA graph
        matrices = sum(t.nbytes for t in (*llama.parameters(), *llama.buffers()))
        matrices -= llama.model.embed_tokens.weight.nbytes   # of which a token reads one row
        first = seen["CLIP and branch"] + prefill
        rows.append([name, prefill, first, 1 / token, matrices / token / bandwidth])
    cli.table([f"LLaMA of {config.layers} layers", f"s for a prompt of {prompt}", f"after {frames} frames",
               "tokens/s", "share of reading memory"], rows)


# -------------------------------------------------------------------------------- training at full size
def peak_of(step, device):
    """A training step -> s, GB at most."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return best(step, device, 3), torch.cuda.max_memory_allocated() / 1e9


def batches(device, c, sizes=(2, 8, 32, 52), frames=8):
    """Steps of pretrain.py in bf16: the share of the frozen trunk, what hiding saves, memory."""
    rows, fits = [], []
    for checkpointed in ("no", "yes"):
        clip = of_numbers(CLIP, c, device=device)
        model, loss = pretraining(clip, device, torch.bfloat16, checkpointed == "yes")
        step, _ = stepping(model, loss, torch.bfloat16)
        for B, hidden in [(sizes[-1], 0.0), *((B, 0.7) for B in sizes)]:
            video = random_pixels(device, B, frames, 3, c.image_size, c.image_size)
            ids = torch.ones(B, 64, dtype=torch.long, device=device)
            kept = tube_mask(B, c.patch_tokens, hidden).to(device)
            seconds, memory = peak_of(lambda: step(video, ids, hidden), device)
            trunk = best(lambda: model.see(video, ids, kept), device, 3)
            rows.append([checkpointed, f"{hidden:.0%}", B, B / seconds, trunk / seconds, memory])
        (few, *_, less), (many, *_, more) = (row[2:] for row in rows[-2:])   # a line through the largest two
        each = (more - less) / (many - few)
        fits.append([checkpointed, 1000 * each,
                     *(int(many + (0.95 * size - more) / each) for size in (24, 40, 80))])
    cli.table(["--checkpointed", "hidden", "clips", "clips/s", "share of the trunk", "GB"], rows)
    cli.table(["--checkpointed", "MB a clip", "clips in 24 GB", "in 40 GB", "in 80 GB"], fits)


def tuning(device, c, config, lora, checkpointed, frames=100, words=300):
    """A step of chat_tune.py in bf16 about one conversation: LoRA learns, or the video tokens -> s, GB."""
    clip, llama = of_numbers(CLIP, c, device=device), llama_of_numbers(config, device)
    if lora:
        llama, projector = add_lora(llama), nn.Linear(c.projection_dim, config.width, dtype=torch.bfloat16)
        kind = FrameCLS(projector)
    else:
        kind = BranchTokens(nn.Linear(c.vision_width, config.width), Branch.beside(clip))
    llama.checkpointed = checkpointed
    chat = VideoChat(clip, kind, llama, open_chat(TINY).chat.tokenizer).train()
    for p in chat.parameters():
        p.requires_grad_(p.dtype == torch.float32)   # what is frozen is in bf16
    step, _ = stepping(*chat_tuning(chat, device, torch.bfloat16), torch.bfloat16)
    pixels = random_pixels(device, 1, frames, 3, c.image_size, c.image_size)
    ids = [1, VIDEO_INDEX, *range(3, 3 + words)]
    return peak_of(lambda: step(pixels, [(ids, ids)]), device)


def gpu(cfg):
    if not torch.cuda.is_available():
        raise cli.UserError("gpu: this machine, or this build of torch, has none")
    device, c, config = torch.device("cuda"), CLIPConfig(), LLaMAConfig(layers=cfg.layers)
    print(f"torch {torch.__version__}; {torch.cuda.get_device_name()}\n")
    errors(device)
    steps(device)
    speed(device, c, config)
    batches(device, c)
    cli.table(["a conversation about 100 frames", "--checkpointed", "s a step", "GB"],
              [["LoRA" if lora else "projector and branch", "yes" if checkpointed else "no",
                *tuning(device, c, config, lora, checkpointed)]
               for lora, checkpointed in itertools.product((False, True), repeat=2)])
