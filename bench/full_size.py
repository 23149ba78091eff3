"""Weights of the full size with random numbers, in the released layouts, made when they are first wanted."""
import math
import os
import re
import struct

import numpy as np
import torch

import clip
import llm
from bench.measure import HERE, say
from model import Branch
from plumbing import cli, weightfile


def random_tensors(shapes, dtype):
    """{name: shape} -> {name: tensor}: parts of one block of random numbers, so that 13 GB are made in the time of writing them."""
    room = 1 << 20   # each begins somewhere else: gate and up must not be the same matrix
    block = torch.randn(max(shape.numel() for shape in shapes.values()) + room, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    starts = {name: i * 7_919 % room for i, name in enumerate(shapes)}
    parts = {name: block[starts[name]:starts[name] + shape.numel()].view(shape) for name, shape in shapes.items()}
    return {name: t + 1 if "norm" in name or "ln_" in name else t for name, t in parts.items()}


def make_llama(cfg, config):
    """A Hugging Face folder of a LLaMA in bf16, with the tokenizer of the tiny one -> its path."""
    folder = os.path.abspath(os.path.join(cfg.data, f"llama_{config.layers}_layers_of_{config.width}"))
    if not os.path.exists(os.path.join(folder, "config.json")):   # the last file that save_llama writes
        say(f"making {folder}")
        with torch.device("meta"):
            model = llm.LLaMA(config)
        model.load_state_dict(random_tensors({name: t.shape for name, t in model.state_dict().items()}, torch.bfloat16), assign=True)
        llm.save_llama(folder, model, os.path.join(HERE, "weights", "tiny", "llava", "tokenizer.model"), dtype=torch.bfloat16)
    return folder


def make_openai_clip(cfg, config):
    """A CLIP in fp16 as OpenAI released it, nested modules in a TorchScript archive -> its path."""
    path = os.path.abspath(os.path.join(cfg.data, f"clip_{config.vision_layers}_layers_of_{config.vision_width}.pt"))
    if not os.path.exists(path):
        say(f"making {path}")
        theirs = {ours: name for name, ours in clip.OPENAI.items()}

        def renamed(name):
            if layer := re.fullmatch(r"(.*\.layers)\.(\d+)\.(.*)", name):
                return f"{theirs[layer[1]]}.{layer[2]}.{renamed(layer[3])}"
            part, _, kind = name.rpartition(".")
            return theirs[name] if name in theirs else f"attn.in_proj_{kind}" if part.endswith("q_proj") else f"{theirs[part]}.{kind}"
        with torch.device("meta"):
            towers = clip.CLIP(config)
        shapes = {}
        for name, t in towers.state_dict().items():
            if not re.search(r"\.[kv]_proj\.", name):   # they are in one tensor with q
                rows = 3 if ".q_proj." in name else 1
                if name.endswith("_projection.weight"):
                    t = t.T
                shapes[renamed(name)] = torch.Size([rows * t.shape[0], *t.shape[1:]]) if t.ndim else t.shape
        root = torch.nn.Module()
        for name, t in random_tensors(shapes, torch.float16).items():
            module, (*parents, leaf) = root, name.split(".")
            for parent in parents:
                if parent not in module._modules:
                    module.add_module(parent, torch.nn.Module())
                module = module._modules[parent]
            module.register_parameter(leaf, torch.nn.Parameter(t.clone(), requires_grad=False))   # else all would be one storage in the file
        cli.make_folder(cfg.data)
        cli.write_atomic(path, lambda f: torch.jit.save(torch.jit.script(root), f))
    return path


def make_chat(cfg, config, clip_config):
    """A folder for chat.py: these two, and a branch and a projector that are random numbers as well -> its path."""
    folder, D = os.path.abspath(os.path.join(cfg.data, f"chat_{config.layers}_layers_of_{config.width}")), clip_config.vision_width
    cli.make_folder(folder)
    for name, path in (("clip", make_openai_clip(cfg, clip_config)), ("llava", make_llama(cfg, config))):
        if not os.path.lexists(os.path.join(folder, name)):
            os.symlink(os.path.relpath(path, folder), os.path.join(folder, name))
    with torch.device("meta"):
        branch = Branch(D, clip_config.vision_heads, clip_config.vision_mlp)
    parts = {"branch.pth": {f"backbone.{name}": t.shape for name, t in branch.state_dict().items()},
             "mm_projector.bin": {"model.mm_projector.weight": torch.Size([config.width, D]), "model.mm_projector.bias": torch.Size([config.width])}}
    for name, shapes in parts.items():
        if not os.path.exists(os.path.join(folder, name)):
            weightfile.write_safetensors(os.path.join(folder, name), random_tensors(shapes, torch.float16))
    return folder


def make_gguf(cfg, config):
    """The same shapes for llama.cpp, all matrices in Q4_0: 32 weights share an fp16 scale, 18 bytes. -> its path.

    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: magic, version, counts; settings; names, shapes and places; then the tensors."""
    path, D = os.path.abspath(os.path.join(cfg.data, f"llama_{config.layers}_layers_of_{config.width}.gguf")), config.width
    if os.path.exists(path):
        return path
    say(f"making {path}")

    def text(string):
        return struct.pack("<Q", len(string.encode())) + string.encode()

    def number(name, value, kind="I"):
        return text(name) + struct.pack("<I" + kind, {"I": 4, "f": 6}[kind], value)

    def array(name, kind, items):
        return text(name) + struct.pack("<IIQ", 9, kind, len(items)) + b"".join(items)
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *(f"w{i}" for i in range(config.vocab_size - 259))][:config.vocab_size]
    kinds = [2, 3, 3] + 256 * [6] + (len(words) - 259) * [1]   # unknown, control, bytes, words
    settings = [text("general.architecture") + struct.pack("<I", 8) + text("llama"), number("general.file_type", 2),
                number("llama.context_length", config.context_length), number("llama.embedding_length", D), number("llama.block_count", config.layers),
                number("llama.feed_forward_length", config.mlp), number("llama.attention.head_count", config.heads),
                number("llama.attention.head_count_kv", config.kv_heads), number("llama.rope.dimension_count", config.head_dim),
                number("llama.attention.layer_norm_rms_epsilon", config.norm_eps, "f"), number("llama.vocab_size", config.vocab_size),
                text("tokenizer.ggml.model") + struct.pack("<I", 8) + text("llama"), array("tokenizer.ggml.tokens", 8, [text(w) for w in words]),
                array("tokenizer.ggml.scores", 6, [struct.pack("<f", -i) for i in range(len(words))]),
                array("tokenizer.ggml.token_type", 5, [struct.pack("<i", kind) for kind in kinds[:len(words)]]),
                number("tokenizer.ggml.bos_token_id", 1), number("tokenizer.ggml.eos_token_id", 2)]
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes = {"token_embd": (config.vocab_size, D)}
    for i in range(config.layers):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in {
            "attn_norm": (D,), "attn_q": (q, D), "attn_k": (kv, D), "attn_v": (kv, D), "attn_output": (D, q), "ffn_norm": (D,),
            "ffn_gate": (config.mlp, D), "ffn_up": (config.mlp, D), "ffn_down": (D, config.mlp)}.items()}
    shapes |= {"output_norm": (D,), "output": (config.vocab_size, D)}
    header, sizes = b"", []
    for name, shape in shapes.items():
        matrix = len(shape) == 2
        header += text(name + ".weight") + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        header += struct.pack("<IQ", 2 if matrix else 0, sum(sizes))   # Q4_0, fp32
        sizes.append(-(-(math.prod(shape) // 32 * 18 if matrix else 4 * D) // 32) * 32)   # each tensor begins at a multiple of 32 bytes
    header = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(settings)) + b"".join(settings) + header
    blocks = np.random.default_rng(0).integers(0, 256, (max(sizes) // 18 + 1, 18), np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(0.004).tobytes(), np.uint8)   # 0.004 * (-8 .. 7): numbers of about 0.02

    def write(f):
        f.write(header + b"\0" * (-len(header) % 32))
        for shape, size in zip(shapes.values(), sizes):
            f.write((blocks.ravel() if len(shape) == 2 else np.ones(size // 4, np.float32).view(np.uint8))[:size].data)
    cli.make_folder(cfg.data)
    cli.write_atomic(path, write)
    return path
