"""A LLaMA-7B of random numbers: how fast it reads and writes, and a chat about longer and longer videos.

The limits: how fast so many threads read memory, and how fast they multiply the rows of the prompt by a layer
of the 7B. `line` asks chat.py one question about each video, and nothing is taken from its cache. Time to the
first token is what chat.py -v names after its imports: weights, video (decoding, CLIP, branch), prompt.
"""
import dataclasses
import math
import os
import re
import statistics
import sys

import torch

from bench.frames import FLAT, SHORT_GOP
from bench.measure import TINY, call, filled, launch, present, say, table
from bench.videos import make
from clip import CLIP, CLIPConfig, load_clip, save_clip
from llm import LLaMA, LLaMAConfig, save_llama
from model import Branch, branch_tensors
from plumbing import cli, pictures, quant, training


# -------------------------------------------------------------------------------- weights of the full size
def make_weights(cfg, config=LLaMAConfig(), clip_config=CLIPConfig()):
    """-> a folder for chat.py in the released layouts, made when it is first wanted."""
    config = dataclasses.replace(config, layers=cfg.layers)
    folder = os.path.abspath(os.path.join(cfg.data, f"chat_{config.layers}_layers_of_{config.width}"))
    if not os.path.exists(os.path.join(folder, "branch.pth")):   # the last of the files
        say(f"making {folder}")
        with torch.device("meta"):
            clip, llama = CLIP(clip_config), LLaMA(config)
        clip, D = filled(clip), clip_config.vision_width
        save_clip(os.path.join(folder, "clip"), clip, load_clip(os.path.join(TINY, "clip"))[1])
        projector = {"weight": torch.randn(config.width, D) * 0.02, "bias": torch.zeros(config.width)}
        save_llama(os.path.join(folder, "llava"), filled(llama),
                   os.path.join(TINY, "llava", "tokenizer.model"),
                   {f"model.mm_projector.{name}": t for name, t in projector.items()}, torch.bfloat16)
        branch = branch_tensors(Branch.beside(clip), "backbone.", torch.float16)
        training.save_checkpoint(os.path.join(folder, "branch.pth"), {"state_dict": branch})
    return folder


# -------------------------------------------------------------------------------- a 7B beside others
def rounds(step, prompt, tokens):
    """Seconds of a prompt and of a token, and a second question of 20 tokens to the same without what came
    before it.

    step(start, n): forget all but `start` tokens, take in n more, be ready to choose the next."""
    import statistics
    import time

    def timed(start, n):
        began = time.perf_counter()
        step(start, n)
        return time.perf_counter() - began
    timed(0, 1), timed(1, 1)   # touches all weights once: what is measured is a chat that is under way
    prefill, token = timed(0, prompt), statistics.median(timed(prompt + i, 1) for i in range(tokens))
    second, alone = (statistics.median(timed(start, 20) for _ in range(3)) for start in (prompt + tokens, 0))
    return prefill, token, second / alone


def ours(path, scheme, threads, prompt, tokens):
    import torch

    import llm
    from plumbing import quant, store
    torch.set_num_threads(threads)
    model = quant.quantized(llm.load_llama(path)[0], scheme, path, store.state_of(path)).eval()
    weight, ids = model.model.embed_tokens.weight, torch.randint(3, 500, (1, prompt))
    cache = llm.KVCache(model.config, 1, prompt + tokens + 32, weight.device, weight.dtype)

    @torch.inference_mode()
    def step(start, n):
        cache.truncate(start)
        model(ids[:, :n], kv_cache=cache, last_only=True)
    return rounds(step, prompt, tokens)


def with_transformers(path, scheme, threads, prompt, tokens):
    import torch
    import transformers
    torch.set_num_threads(threads)
    model = transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    ids, cache = torch.randint(3, 500, (1, prompt)), transformers.DynamicCache()

    @torch.inference_mode()
    def step(start, n):
        nonlocal cache
        if start == 0:
            cache = transformers.DynamicCache()
        elif start < cache.get_seq_length():
            cache.crop(start - cache.get_seq_length())
        model(ids[:, :n], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return rounds(step, prompt, tokens)


def limits(threads, rows, K, N):
    """Bytes/s read from memory; operations/s of `rows` rows by a matrix (N, K): in floats, in int8."""
    import time

    import torch
    torch.set_num_threads(threads)

    def best(work):
        times = []
        for _ in range(5):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        return min(times)
    memory, found = torch.ones(128 << 20), []
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        x, w = torch.ones(rows, K).to(dtype), torch.ones(N, K).to(dtype)
        multiply = torch._int_mm if dtype == torch.int8 else torch.mm
        found.append(2 * rows * K * N / best(lambda: multiply(x, w.T)))
    return memory.nbytes / best(memory.sum), max(found[:2]), found[2]


def chat(cfg, config=LLaMAConfig(), clip_config=CLIPConfig(), threads=(1, 2)):
    """A prompt and an answer, ours and transformers', with one thread and with two."""
    who = {"transformers, bf16": (with_transformers, "bf16")} if present(cfg, *["transformers"] * 2) else {}
    who |= {f"ours, {scheme}": (ours, scheme) for scheme in quant.SCHEMES}
    folder, config = make_weights(cfg, config, clip_config), dataclasses.replace(config, layers=cfg.layers)
    with torch.device("meta"):
        llama = LLaMA(config)
    words, rows = config.vocab_size * config.width, []   # words: numbers of embed_tokens; one row is read
    work = 2 * cfg.prompt * (sum(p.numel() for p in llama.parameters()) - 2 * words)
    for n in threads:
        found, bounds = {name: [] for name in who}, []
        for run in range(cfg.runs + 1):   # the first is not counted: it writes the quantised files
            for name, (function, scheme) in who.items():
                given = [os.path.join(folder, "llava"), scheme, n, cfg.prompt, cfg.tokens if run else 1]
                times, _, peak = call(name, rounds, function, arguments=given)
                say(f"{name}, {n} threads, round {run} of {cfg.runs}: prompt {times[0]:.2f} s")
                found[name] += [[*times, peak]] if run else []
            bounds += [call("the limits", limits, arguments=[n, cfg.prompt, config.width, config.mlp])[0]]
        read, floats, whole = map(statistics.median, zip(*bounds))
        medians = {name: [*map(statistics.median, zip(*measured))] for name, measured in found.items()}
        for name, (prefill, token, turn, peak) in medians.items():
            matrices = quant.nbytes(llama, who[name][1], torch.bfloat16) - 2 * words
            product = whole if who[name][1] in ("int8", "int4") else floats
            theirs = medians.get("transformers, bf16", [math.nan] * 2)
            rows.append([name, str(n), prefill, prefill / theirs[0], work / prefill / product, 1 / token,
                         theirs[1] / token, matrices / token / read, turn, peak])
    table(["who", "threads", "s for the prompt", "to transformers", "share of the machine's product",
           "tokens/s", "to transformers", "share of reading memory", "second turn to its words alone",
           "peak MB"], rows)


# -------------------------------------------------------------------------------- a chat about an hour
LINE = [dataclasses.replace(SHORT_GOP, seconds=5), *(clip for clip, _ in FLAT)]


PARTS = "import", "video", "in all"   # of what chat.py -v says


def one_question(cfg, path):
    """-> video tokens, s to the first token, s of it for the video, peak MB of a chat."""
    command = [sys.executable, "chat.py", path, "--weights", os.path.abspath(cfg.weights), "--num_frames",
               str(cfg.num_frames), "-q", "What happens?", "--max_new_tokens", "1", "--no-cache", "--verbose"]
    _, _, peak, said = launch(command, "chat.py")
    last, tokens = said.strip().splitlines()[-1], int(re.search(r"(\d+) video tokens", said)[1])
    imports, video, all_ = (float(re.search(rf"{part} ([\d.]+) s\b", last)[1]) for part in PARTS)
    return tokens, all_ - imports, video, peak


def line(cfg, clips=LINE):
    """The same question about longer and longer videos: what does the length cost?"""
    present(cfg)
    cfg, rows = dataclasses.replace(cfg, weights=cfg.weights or make_weights(cfg)), []
    print(f"{cfg.weights}; {cfg.num_frames} frames of each video\n")
    for video in clips:
        path = make(cfg.data, video)
        runs = [one_question(cfg, path) for _ in range(cfg.runs + 1)][1:]   # the first is cold
        rows.append([*map(statistics.median, zip(*runs))])
        say(f"{video.title}: {rows[-1][1]:.2f} s to the first token")
    what = ["video tokens", "s to the first token", "of it s for the video", "peak MB"]
    table(["video", *what, "s to the shortest"],
          [[video.title, *row, row[1] / rows[0][1]] for video, row in zip(clips, rows)])
    cli.make_folder(cfg.pictures)
    panels = [(f"{what[i]}, by the length of the video in minutes",
               {"chat.py": [(video.seconds * video.copies / 60, row[i]) for video, row in zip(clips, rows)]})
              for i in (0, 1, 3)]
    pictures.plot(os.path.join(cfg.pictures, "chat_flat.png"), panels, height=220)
