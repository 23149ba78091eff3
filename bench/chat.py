"""A LLaMA-7B of random numbers: how fast it reads and writes, and a chat about longer and longer videos.

The limits: how fast so many threads read memory, and how fast they multiply the rows of the prompt by a layer
of the 7B. `line` asks chat.py two questions about each video; nothing is taken from its cache. Time to the
first token is what chat.py -v names after its imports: weights, video (decoding, CLIP, branch), prompt.
"""
import dataclasses
import importlib.util
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time

import torch
from torch import nn

from bench.frames import SHORT_GOP, make
from bench.measure import HERE, TINY, best, call, heading, medians, multiplying, of_numbers, reading
from clip import CLIP, CLIPConfig, load_clip, read_clip, save_clip
from linvt import LinVT, save_linvt
from llm import LLaMA, LLaMAConfig, add_lora, load_llama, save_adapter, save_llama
from model import ADAPTERS, Branch, LinVTTokens, backbone_states, branch_tensors, frames_at_once
from plumbing import cli, pictures, quant, store, training
from plumbing.memory import prepare_cpu

PROMPT, TOKENS = 300, 16   # tokens of a prompt and of an answer


# -------------------------------------------------------------------------------- weights of the full size
def make_weights(cfg, config=LLaMAConfig(), clip_config=CLIPConfig()):
    """-> a folder for chat.py in the released layouts, made when it is first wanted."""
    config = dataclasses.replace(config, layers=cfg.layers)
    folder = os.path.abspath(os.path.join(cfg.data, f"chat_{config.layers}_layers_of_{config.width}"))
    if not os.path.exists(os.path.join(folder, "branch.pth")):   # the last of the files
        cli.say(f"making {folder}")
        clip, D = of_numbers(CLIP, clip_config), clip_config.vision_width
        save_clip(os.path.join(folder, "clip"), clip, load_clip(os.path.join(TINY, "clip"))[1])
        projector = {"model.mm_projector.weight": torch.randn(config.width, D) * 0.02,
                     "model.mm_projector.bias": torch.zeros(config.width)}
        words = os.path.join(TINY, "llava", "tokenizer.model")
        save_llama(os.path.join(folder, "llava"), of_numbers(LLaMA, config), words, projector, torch.bfloat16)
        branch = branch_tensors(Branch.beside(clip), "backbone.", torch.float16)
        training.save_checkpoint(os.path.join(folder, "branch.pth"), {"state_dict": branch})
    if not os.path.exists(file := os.path.join(folder, "linvt.bin")):
        save_linvt(file, full_linvt(config, clip_config))
    return folder


def full_linvt(config, clip_config):
    """-> a new LinVT, as wide and as deep as a 7B and a ViT-L/14 may want."""
    return LinVT(config.width, clip_config.patch_tokens, width=512, heads=8, layers=2)


def with_adapters(folder):
    """A folder of make_weights -> another beside it, for `frame_cls`: links, a projector, two adapters."""
    timed, llava = f"{folder}_frame_cls", os.path.join(folder, "llava")
    if not os.path.exists(os.path.join(timed, "mm_projector.bin")):   # the last of the files
        llama = add_lora(load_llama(llava)[0])
        for stage in ADAPTERS:
            for name, p in llama.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(p, std=0.02)
            save_adapter(os.path.join(timed, stage), llama)
        for name in ("clip", "llava"):
            if not os.path.lexists(link := os.path.join(timed, name)):
                os.symlink(os.path.join(folder, name), link)
        visual = read_clip(os.path.join(folder, "clip")).config.projection_dim
        projector = nn.Linear(visual, llama.config.width).state_dict()
        training.save_checkpoint(os.path.join(timed, "mm_projector.bin"),
                                 {f"model.mm_projector.{name}": t for name, t in projector.items()})
    return timed


# -------------------------------------------------------------------------------- a 7B beside others
@torch.inference_mode()
def rounds(begin):
    """begin() -> feed(ids (1, n)), which takes in more of a text. -> s for a prompt, s for a token."""
    ids, seconds = torch.randint(3, 500, (1, PROMPT)), []
    begin()(ids[:, :1])   # touches all weights once: what is measured is a chat that is under way
    feed = begin()
    for n in [PROMPT] + [1] * TOKENS:
        began = time.perf_counter()
        feed(ids[:, :n])
        seconds.append(time.perf_counter() - began)
    return seconds[0], statistics.median(seconds[1:])


def ours(path, scheme):
    model = quant.quantized(load_llama(path)[0], scheme, path, store.state_of(path)).eval()
    prepare_cpu(model)

    def begin():
        cache = model.new_cache(1, PROMPT + TOKENS)
        return lambda ids: model(ids, kv_cache=cache, last_only=True)
    return rounds(begin)


def with_transformers(path, scheme):
    import transformers
    model = transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()

    def begin():
        cache = transformers.DynamicCache()
        return lambda ids: model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return rounds(begin)


THEIRS = "transformers, bf16"
WHO = {THEIRS: (with_transformers, "bf16")} if importlib.util.find_spec("transformers") else {}
WHO |= {f"ours, {scheme}": (ours, scheme) for scheme in quant.SCHEMES}


def limits(K, N):
    """Bytes/s read from memory; operations/s of a prompt by a matrix (N, K), in floats and in int8."""
    fp32, bf16, int8 = (multiplying(PROMPT, K, N, t) for t in (torch.float32, torch.bfloat16, torch.int8))
    return reading(), max(fp32, bf16), int8


def chat(cfg, config=LLaMAConfig(), clip_config=CLIPConfig()):
    """A prompt and an answer, ours and transformers', with as many threads as torch takes by itself."""
    heading(cfg)
    llava = os.path.join(make_weights(cfg, config, clip_config), "llava")
    with torch.device("meta"):
        llama = LLaMA(dataclasses.replace(config, layers=cfg.layers))
    words, found, bounds = llama.model.embed_tokens.weight.numel(), {name: [] for name in WHO}, []
    for run in range(cfg.runs + 1):   # the first is not counted: it writes the quantised files
        for name, (function, scheme) in WHO.items():
            times, _, memory = call(function, llava, scheme)
            cli.say(f"{name}, round {run} of {cfg.runs}: prompt {times[0]:.2f} s")
            found[name] += [[*times, memory]] * (run > 0)
        bounds.append(call(limits, config.width, config.mlp)[0])
    read, floats, whole = medians(bounds)
    costs = {name: medians(measured) for name, measured in found.items()}
    theirs, rows = costs.get(THEIRS, [math.nan] * 2), []
    work = 2 * PROMPT * (sum(p.numel() for p in llama.parameters()) - 2 * words)   # one row of words is read
    for name, (prompt, token, memory) in costs.items():
        scheme = WHO[name][1]
        matrices = quant.nbytes(llama, scheme, torch.bfloat16) - 2 * words
        product = whole if scheme in ("int8", "int4") else floats
        rows.append([name, prompt, prompt / theirs[0], work / prompt / product, 1 / token, theirs[1] / token,
                     matrices / token / read, memory])
    cli.table(["who", "s for the prompt", "to transformers", "share of the machine's product", "tokens/s",
               "to transformers", "share of reading memory", "MB without imports"], rows)


# -------------------------------------------------------------------------------- CLIP
@torch.inference_mode()
def looking(config, scheme):
    """-> s in which CLIP sees a frame, of as many as go together on a CPU; operations/s of its largest
    product with as many rows."""
    clip = of_numbers(CLIP, config).float()
    if scheme:
        quant.quantize(clip.vision_model, scheme)
    prepare_cpu(clip)
    frames, size, D = frames_at_once(config, torch.device("cpu")), config.image_size, config.vision_width
    video = torch.randint(256, (1, frames, 3, size, size), dtype=torch.uint8)
    whole = torch.int8 if scheme == "int8" else torch.float32
    return (best(lambda: backbone_states(clip, video, 1)) / frames,
            multiplying(frames * (1 + config.patch_tokens), D, config.vision_mlp, whole))


def clip(cfg, config=CLIPConfig()):
    """A frame in CLIP, in floats and in int8, beside the products of matrices that it is made of."""
    heading(cfg)
    D, rows = config.vision_width, []
    work = 2 * (1 + config.patch_tokens) * config.vision_layers * D * (4 * D + 2 * config.vision_mlp)
    found = {scheme: [call(looking, config, scheme)[0] for _ in range(cfg.runs)] for scheme in (None, "int8")}
    for scheme, runs in found.items():
        seconds, product = medians(runs)
        rows.append([scheme or "fp32", seconds, 100 * seconds, work / seconds / product])
    cli.table(["CLIP in", "s a frame", "s for 100", "share of the machine's product"], rows)


# -------------------------------------------------------------------------------- LinVT beside all tokens
@torch.inference_mode()
def condensing(config, clip_config, frames):
    """-> s in which LinVT makes a picture's worth of rows, for a question, of what CLIP saw of frames."""
    N, D = clip_config.patch_tokens, clip_config.vision_width
    kind = of_numbers(lambda: LinVTTokens(nn.Linear(D, config.width), None, full_linvt(config, clip_config)))
    mask = torch.ones(1, 20, dtype=torch.bool)
    seen, words = torch.randn(1, frames, N, D).bfloat16(), torch.randn(1, 20, config.width).bfloat16()
    return best(lambda: kind(seen, words, mask), count=1)


@torch.inference_mode()
def prefill(config, rows):
    """-> s in which a LLaMA reads so many rows: those of one layer, times the layers."""
    layer = of_numbers(LLaMA, dataclasses.replace(config, layers=1, context_length=rows))
    embeds = torch.randn(1, rows, config.width, dtype=torch.bfloat16)
    return config.layers * best(lambda: layer(embeds=embeds, last_only=True), count=1)


def linvt(cfg, config=LLaMAConfig(), clip_config=CLIPConfig(), counts=(8, 30, 120)):
    """What a question of 50 tokens costs beside all tokens of a video, or beside LinVT's rows of it."""
    heading(cfg)
    config, N, rows = dataclasses.replace(config, layers=cfg.layers), clip_config.patch_tokens, []
    for frames in counts:
        made = [call(condensing, config, clip_config, frames) for _ in range(cfg.runs)]
        for name, tokens, runs in (("all tokens", N * frames, [(0, 0, 0)]), ("LinVT", N, made)):
            making, _, memory = medians(runs)
            read = statistics.median(call(prefill, config, tokens + 50)[0] for _ in range(cfg.runs))
            cache = 4 * config.layers * config.width * (tokens + 50)   # bytes: keys and values in bf16
            rows.append([name, str(frames), str(tokens), making, memory, read, making / read, cache / 1e9])
    cli.table(["rows", "frames", "tokens", "s to make them", "MB for it", "s for the prompt", "share of it",
               "GB of KV cache"], rows)


# -------------------------------------------------------------------------------- a chat about an hour
LINE = [dataclasses.replace(SHORT_GOP, **length) for length in (
    {"seconds": 5}, {"copies": 1}, {"copies": 10}, {"copies": 60})]


# by middles not 100 frames: from 10 minutes those are at whole seconds, where the keyframes are, for free
FRAMES = {"branch": 101, "frame_cls": 100, "linvt": 101}


def two_questions(weights, path, tokens, num_frames):
    """-> video tokens, s to the first token, s of it for the video, s to the first token of a second
    question, GB of memory, all as chat.py says."""
    command = [sys.executable, "chat.py", path, "--weights", os.path.abspath(weights), "--tokens", tokens,
               "--num_frames", str(num_frames), "--max_new_tokens", "1", "--no-cache", "--verbose", "--json"]
    done = subprocess.run(command, input="What happens?\nWhere?\n", capture_output=True, text=True, cwd=HERE)
    if done.returncode:
        raise cli.UserError(f"chat.py failed: {done.stderr.strip().splitlines()[-1]}")
    first, second = (json.loads(line)["seconds_to_first_token"] for line in done.stdout.splitlines())
    tokens, weights, video, memory = (float(re.search(pattern, done.stderr)[1]) for pattern in (
        r"(\d+) video tokens", r"weights ([\d.]+) s", r"for the video ([\d.]+) s", r"memory: ([\d.]+) GB"))
    return tokens, weights + video + first, video, second, memory


def line(cfg, clips=LINE):
    """The same questions about longer and longer videos: what does the length cost?"""
    heading(cfg)
    weights, rows = make_weights(cfg), []
    weights = with_adapters(weights) if cfg.tokens == "frame_cls" else weights
    for video in clips:
        path = make(cfg.data, video)
        runs = [two_questions(weights, path, cfg.tokens, FRAMES[cfg.tokens]) for _ in range(cfg.runs + 1)]
        rows.append(medians(runs[1:]))   # the first is cold
        cli.say(f"{video.title}: {rows[-1][1]:.2f} s to the first token")
    what = ["video tokens", "s to the first token", "of it s for the video", "s for a second question", "GB"]
    cli.table(["video", *what, "s to the shortest"],
              [[video.title, *row, row[1] / rows[0][1]] for video, row in zip(clips, rows)])
    cli.make_folder(cfg.pictures)
    panels = [(f"{what[i]}, by the length of the video in minutes",
               {"chat.py": [(video.seconds * video.copies / 60, row[i]) for video, row in zip(clips, rows)]})
              for i in (0, 1, 4)]
    name = "chat_flat.png" if cfg.tokens == "branch" else f"chat_flat_{cfg.tokens}.png"
    pictures.plot(os.path.join(cfg.pictures, name), panels, height=220)
