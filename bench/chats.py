"""A LLaMA-7B of random numbers: how soon it is ready, how fast it reads and writes, and what rounding costs it.

The limits: how fast so many threads read memory, and how fast they multiply the rows of the prompt by a layer of the 7B.
"""
import glob
import os
import statistics
import sys

import torch

import clip
import llm
from bench.full_size import make_gguf, make_llama, make_openai_clip
from bench.measure import HERE, Contestant, call, present, say
from plumbing import cli, quant
from plumbing.store import state_of


# ---------------------------------------------------------------------------------------------------- loading
def load_quantized(path, scheme):
    """The LLaMA of a folder, with layers of `scheme` (None: as they are), which are kept beside it."""
    sources = state_of(path)
    model, _, _ = llm.load_llama(path)
    return model if scheme is None else quant.quantized(model, scheme, path, sources)


def loading(kind, path, scheme):   # sent to a process of its own, too
    import time

    import torch

    import clip
    from bench.chats import load_quantized

    def memory():   # MB that are this process's alone, and MB of them that are no file's
        with open("/proc/self/smaps_rollup") as f:
            rows = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in f if line.endswith("kB\n")}
        return rows["Private_Clean"] + rows["Private_Dirty"], rows["Anonymous"]
    before, began = memory(), time.perf_counter()
    model = clip.build_clip(*clip.read_clip(path), path) if kind == "clip" else load_quantized(path, scheme)
    ready, after = time.perf_counter() - began, memory()
    with torch.inference_mode():
        if kind == "llama":
            model(torch.ones(1, 1, dtype=torch.long))
    return [ready, after[0] - before[0], after[1] - before[1], time.perf_counter() - began]


def load(cfg, config=None, clip_config=None):
    """Time and memory from a file to a model that could begin, after one round that is not counted: it writes the quantised files."""
    if sys.platform != "linux":
        raise cli.UserError("load: reads a process's memory from /proc, which only Linux has")
    present(cfg, [])
    config, clip_config = config or llm.LLaMAConfig(layers=cfg.layers), clip_config or clip.CLIPConfig()
    archive, folder = make_openai_clip(cfg, clip_config), make_llama(cfg, config)
    cases = {"CLIP, OpenAI's archive": ("clip", archive, None), **{f"LLaMA, {scheme or 'as in the file'}": ("llama", folder, scheme)
                                                                  for scheme in (None, *quant.SCHEMES)}}
    rows = {name: [] for name in cases}
    for run in range(cfg.runs + 1):
        for name, arguments in cases.items():
            measured, _ = call(sys.executable, f"loading {name}", loading, arguments=arguments)
            say(f"{name}: ready in {measured[0]:.3f} s" + (", not counted" if run == 0 else f", {run} of {cfg.runs}"))
            rows[name] += [measured] if run else []
    print("| what | MB of the file | s until ready | private MB | of it no file's | s until first logits |\n" + "|---" * 6 + "|")
    for name, (kind, path, scheme) in cases.items():
        kept = f"quantised_{scheme}_*.safetensors" if scheme in ("int8", "int4") else "model.safetensors"
        file = path if kind == "clip" else glob.glob(os.path.join(glob.escape(path), kept))[0]
        ready, private, own, first = (statistics.median(column) for column in zip(*rows[name]))
        print(f"| {name} | {os.path.getsize(file) / 2 ** 20:.0f} | {ready:.3f} | {private:.1f} | {own:.1f} | {f'{first:.2f}' if kind == 'llama' else ''} |")


# ---------------------------------------------------------------------------------------------------- chat
# Each contestant gives `rounds` a function step(start, n): forget all but `start` tokens, take in n more, be ready to choose the next.
def rounds(step, prompt, tokens):
    import statistics
    import time

    def timed(start, n):
        began = time.perf_counter()
        step(start, n)
        return time.perf_counter() - began
    timed(0, 1), timed(1, 1)   # touches all weights once: what is measured is a chat that is under way
    result = {"prefill": timed(0, prompt), "token": statistics.median(timed(prompt + i, 1) for i in range(tokens))}
    second, alone = (statistics.median(timed(start, 20) for _ in range(3)) for start in (prompt + tokens, 0))
    result["turn"] = second / alone   # a second question of 20 tokens, to the same without what came before
    with open("/proc/self/status") as f:
        result["resident"] = next(int(line.split()[1]) / 1024 for line in f if line.startswith("VmRSS"))   # MB
    return result


def ours_chat(path, scheme, threads, prompt, tokens):
    import torch

    import llm
    from bench.chats import load_quantized
    torch.set_num_threads(threads)
    model = load_quantized(path, scheme).eval()
    weight, ids = model.model.embed_tokens.weight, torch.randint(3, 500, (1, prompt))
    cache = llm.KVCache(model.config, 1, prompt + tokens + 32, weight.device, weight.dtype)

    @torch.inference_mode()
    def step(start, n):
        cache.truncate(start)
        model(ids[:, :n], kv_cache=cache, last_only=True)
    return rounds(step, prompt, tokens)


def transformers_chat(path, scheme, threads, prompt, tokens):
    import torch
    import transformers
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
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


def llama_cpp_chat(path, scheme, threads, prompt, tokens):
    import random

    import llama_cpp
    model = llama_cpp.Llama(path, n_ctx=prompt + tokens + 32, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    ids = [random.randrange(3, 500) for _ in range(prompt)]

    def step(start, n):
        model.n_tokens = start   # eval forgets what comes after
        model.eval(ids[:n])
    return rounds(step, prompt, tokens)


def limits(threads, rows, K, N):
    """Bytes/s that so many threads read from memory; multiplications and additions/s of `rows` rows by a matrix (N, K), fp32, bf16, int8."""
    import time

    import torch
    torch.set_num_threads(threads)

    def best(work, count):
        times = []
        for _ in range(count):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        return min(times)
    memory = torch.ones(128 << 20)
    result = {"read": memory.nbytes / best(memory.sum, 8)}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("int8", torch.int8)):
        x, w = torch.ones(rows, K).to(dtype), torch.ones(N, K).to(dtype)
        multiply = torch._int_mm if dtype == torch.int8 else torch.mm
        result[name] = 2 * rows * K * N / best(lambda: multiply(x, w.T), 3)
    return result


SCHEME_CHATS = {f"ours, {scheme}": scheme for scheme in quant.SCHEMES}
PEER_CHATS = [Contestant("transformers, bf16", "transformers", transformers_chat, "transformers"),
              Contestant("llama.cpp, Q4_0", "llama_cpp", llama_cpp_chat, "llama-cpp-python")]


def chat(cfg, config=None, threads=(1, 2)):
    """A prompt and an answer, ours and the peers, with one thread and with two."""
    if sys.platform != "linux":
        raise cli.UserError("chat: reads a process's memory from /proc, which only Linux has")
    cli.at_least(cfg, layers=1, prompt=20, tokens=1)
    config = config or llm.LLaMAConfig(layers=cfg.layers)
    names, folder = present(cfg, PEER_CHATS), make_llama(cfg, config)
    files = {**{name: folder for name in SCHEME_CHATS}, "transformers, bf16": folder}
    if "llama.cpp, Q4_0" in names:
        files["llama.cpp, Q4_0"] = make_gguf(cfg, config)
    bytes_read = {name: read_per_token(config, scheme) for name, scheme in SCHEME_CHATS.items()}
    bytes_read |= {"transformers, bf16": bytes_read["ours, bf16"], "llama.cpp, Q4_0": bytes_read["ours, bf16"] * 4.5 / 16}
    D, kv = config.width, config.kv_heads * config.head_dim
    work = 2 * cfg.prompt * config.layers * (2 * D * config.heads * config.head_dim + 2 * D * kv + 3 * D * config.mlp)   # of the projections
    columns = ["who", "threads", "s for the prompt", "to transformers", "to llama.cpp", "tokens/s", "to transformers", "to llama.cpp",
               "share of reading memory", "prompt, GFLOP/s", "share of the machine's product", "second turn to its words alone", "resident MB"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for n in threads:
        medians, bound = chat_round(cfg, config, names, files, n)
        peers = [medians.get(c.name) for c in PEER_CHATS]
        for name, m in medians.items():
            whole = SCHEME_CHATS.get(name) in ("int8", "int4") or name.startswith("llama.cpp")
            product = bound["int8"] if whole else max(bound["fp32"], bound["bf16"])
            cells = [f"{m['prefill']:.2f}", *(f"{m['prefill'] / p['prefill']:.2f}" if p else "" for p in peers),
                     f"{1 / m['token']:.2f}", *(f"{p['token'] / m['token']:.2f}" if p else "" for p in peers),
                     f"{bytes_read[name] / m['token'] / bound['read']:.2f}", f"{work / m['prefill'] / 1e9:.0f}",
                     f"{work / m['prefill'] / product:.2f}", f"{m['turn']:.2f}", f"{m['resident']:.0f}"]
            print(f"| {name} | {n} | " + " | ".join(cells) + " |")
        speeds = ", ".join(f"{key} {bound[key] / 1e9:.0f}" for key in ("fp32", "bf16", "int8"))
        print(f"| limits | {n} | " + " | " * 6 + f"{bound['read'] / 1e9:.1f} GB/s | {speeds} | | | |", flush=True)
    print("\n" + on_gpu(cfg, config))


def chat_round(cfg, config, names, files, threads):
    """-> {contestant: medians of what `rounds` measures}, medians of `limits`."""
    contestants = [Contestant(name, "", ours_chat) for name in SCHEME_CHATS] + [c for c in PEER_CHATS if c.name in names]
    rows, bounds = {c.name: [] for c in contestants}, []
    for run in range(cfg.runs + 1):   # the first is not counted: it writes the quantised files, and a few tokens do
        if run:
            bounds.append(call(sys.executable, "measuring the limits", limits, arguments=[threads, cfg.prompt, config.width, config.mlp])[0])
        for c in contestants:
            m, _ = call(cfg.peer_python if c.package else sys.executable, c.name, rounds, c.function,
                        arguments=[files[c.name], SCHEME_CHATS.get(c.name), threads, *((cfg.prompt, cfg.tokens) if run else (20, 1))])
            say(f"{c.name}, {threads} threads: prompt {m['prefill']:.2f} s, token {m['token']:.3f} s, {f'{run} of {cfg.runs}' if run else 'not counted'}")
            rows[c.name] += [m] if run else []
    medians = {name: {key: statistics.median(row[key] for row in measured) for key in measured[0]} for name, measured in rows.items()}
    return medians, {key: statistics.median(row[key] for row in bounds) for key in bounds[0]}


def read_per_token(config, scheme):
    """Bytes of a LLaMA of these sizes, but for its word embeddings: a token reads one row of them."""
    with torch.device("meta"):
        model = llm.LLaMA(config)
    return quant.nbytes(model, scheme, torch.bfloat16) - model.model.embed_tokens.weight.numel() * 2


def on_gpu(cfg, config):
    """The same on a GPU, in bf16, as a sentence; or that there is none."""
    if not torch.cuda.is_available():
        return "On a GPU: not measured, this machine has none."
    m, _ = call(sys.executable, "the GPU", rounds, gpu_chat, arguments=[make_llama(cfg, config), cfg.prompt, cfg.tokens])
    read = read_per_token(config, None) / m["token"]
    return (f"On {torch.cuda.get_device_name()}, bf16: {1 / m['token']:.1f} tokens/s, {read / m['read']:.2f} of the {m['read'] / 1e9:.0f} GB/s at which "
            f"it reads its memory; a prompt of {cfg.prompt} tokens {m['prefill']:.3f} s; ViT-L/14 with the branch {100 / m['frames']:.0f} frames/s; "
            f"100 frames to the first token {m['frames'] + m['prefill']:.2f} s.")


def gpu_chat(path, prompt, tokens):
    import time

    import torch

    import clip
    import llm
    import model as video
    llama = llm.load_llama(path)[0].cuda().eval()
    ids = torch.randint(3, 500, (1, prompt), device="cuda")
    cache = llm.KVCache(llama.config, 1, prompt + tokens + 32, "cuda", torch.bfloat16)

    @torch.inference_mode()
    def step(start, n):
        cache.truncate(start)
        llama(ids[:, :n], kv_cache=cache, last_only=True)
        torch.cuda.synchronize()
    step(0, prompt)
    result = rounds(step, prompt, tokens)

    def best(work):
        times = []
        for _ in range(5):
            began = time.perf_counter()
            work()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return min(times)
    memory = torch.ones(1 << 30, device="cuda")
    towers = clip.CLIP(clip.CLIPConfig()).bfloat16().cuda().eval()
    encoder = video.VideoEncoder(towers, video.Branch.beside(towers).bfloat16().cuda().eval(), skip_last=1)
    frames = torch.randint(256, (1, 100, 3, 224, 224), dtype=torch.uint8, device="cuda")
    with torch.inference_mode():
        return result | {"read": memory.nbytes / best(memory.sum), "frames": best(lambda: video.branch_tokens(encoder, frames))}


# ---------------------------------------------------------------------------------------------------- quality
def relative(y, reference):
    """|y - reference| / |reference|."""
    return ((y.double() - reference.double()).norm() / reference.double().norm()).item()


@torch.no_grad()
def quality(cfg, config=None):
    """What rounding costs: logits of the trained tiny LLaVA, features of the tiny CLIP, and layers of a 7B one by one."""
    tiny = os.path.join(HERE, "weights", "tiny")
    questions = ["What colour is the shape?", "What does the shape do?", "Which way does the shape move?", "Where is the shape at the end?"]
    print("| what | error | " + " | ".join(quant.SCHEMES) + " |\n" + "|---" * (2 + len(quant.SCHEMES)) + "|")
    logits, answers, features = {}, {}, {}
    for scheme in (None, *quant.SCHEMES):
        model, tokenizer, _ = llm.load_llama(os.path.join(tiny, "llava"))
        towers = clip.load_clip(os.path.join(tiny, "clip"))[0].float()
        model = model.float().eval() if scheme is None else quant.quantize(model.to(torch.bfloat16 if scheme == "bf16" else torch.float32).eval(), scheme)
        if scheme:
            quant.quantize(towers.vision_model.to(torch.bfloat16) if scheme == "bf16" else towers.vision_model, scheme)
        prompts = [torch.tensor([[tokenizer.bos_id] + tokenizer.encode(f"USER: A small red circle moves left, then up. {q} ASSISTANT:")]) for q in questions]
        rows = [model(ids)[0] for ids in prompts]
        logits[scheme] = torch.cat([row - row.mean(-1, keepdim=True) for row in rows])   # a constant makes no difference to softmax
        answers[scheme] = [list(llm.generate(model, ids, max_new_tokens=12, stop_ids=tokenizer.stop_ids)) for ids in prompts]
        pixels = torch.randint(256, (8, 3, towers.config.image_size, towers.config.image_size), dtype=torch.uint8,
                               generator=torch.Generator().manual_seed(0))
        features[scheme] = towers.float().encode_image(pixels)

    def row(what, error, numbers):
        print(f"| {what} | {error} | " + " | ".join(numbers) + " |", flush=True)
    row("tiny LLaVA", "logits", [f"{relative(logits[s], logits[None]):.4f}" for s in quant.SCHEMES])
    row("tiny LLaVA", "tokens likeliest in both", [f"{(logits[s].argmax(-1) == logits[None].argmax(-1)).double().mean():.3f}" for s in quant.SCHEMES])
    row("tiny LLaVA", "same answers", [f"{sum(map(lambda a, b: a == b, answers[s], answers[None]))} of {len(questions)}" for s in quant.SCHEMES])
    row("tiny CLIP", "image features", [f"{relative(features[s], features[None]):.4f}" for s in quant.SCHEMES])
    c = config or llm.LLaMAConfig()
    for N, K in ((c.mlp, c.width), (c.width, c.mlp)):
        torch.manual_seed(0)
        linear = torch.nn.Linear(K, N, bias=False)
        linear.weight.normal_(0, 0.02)
        linear.weight.data = linear.weight.bfloat16()
        layers = [kind(kind.convert(linear.weight)) for kind in quant.SCHEMES.values()]
        x = torch.randn(64, K)
        wild = x.index_fill(1, torch.tensor([1, 7, 77]), 100.0)
        for name, rows in (("normal rows", x), ("3 channels of 100", wild)):
            true = rows @ linear.weight.float().T
            for count in (1, 64):
                row(f"layer of a 7B, {K} to {N}", f"{name}, {count} at a time",
                    [f"{relative(torch.cat([layer(part) for part in rows[:max(8, count)].split(count)]), true[:max(8, count)]):.4f}" for layer in layers])
