"""CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020): an image and a text, each as one vector of the same space.

  pixels -> patches -> layers -> CLS token at the last layer -> projection  \\
                                                                             cosine * exp(logit_scale)
  text   -> BPE ids -> causal layers -> state at the end token -> projection /

Modules and parameters are named as in a Hugging Face CLIPModel, so its weight files load without renaming; OpenAI's own
archives come in through the name table at the bottom. Sizes are those of ViT-L/14 unless a file says otherwise.
"""
import html
import itertools
import json
import math
import os
import re
import zlib
from dataclasses import asdict, dataclass

import regex
import torch
import torch.nn.functional as F
from torch import nn

from plumbing import weightfile
from plumbing.cli import UserError, make_folder, write_atomic

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)   # of RGB in 0..1, where CLIP was trained
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
VOCABULARY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "bpe_simple_vocab_16e6.txt.gz")


@dataclass
class CLIPConfig:
    image_size: int = 224       # pixels, height and width
    patch_size: int = 14        # pixels; (224 / 14)^2 = 256 patches
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    vision_mlp: int = 4096
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    text_mlp: int = 3072
    vocab_size: int = 49408
    context_length: int = 77    # ids of the longest text, start and end token included
    projection_dim: int = 768   # the space that images and texts share

    @property
    def patch_tokens(self):
        return (self.image_size // self.patch_size) ** 2


# ---------------------------------------------------------------------------------------------------- a layer
class Attention(nn.Module):
    """Multi-head self-attention: softmax(q k^T / sqrt(head width)) v, heads side by side, then out_proj."""
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, causal=False):
        """x: (B, L, D) -> (B, L, D). causal: a token sees itself and what stands before it."""
        B, L, D = x.shape
        q, k, v = (proj(x).view(B, L, self.heads, -1).transpose(1, 2)   # (B, heads, L, D / heads)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(x.transpose(1, 2).reshape(B, L, D))


class MLP(nn.Module):
    """Two linear layers around quick-GELU, x * sigmoid(1.702 x), with which the released weights were trained."""
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer: x + Attention(LN(x)), then x + MLP(LN(x))."""
    def __init__(self, width, heads, mlp):
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.layer_norm1 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = MLP(width, mlp)
        self.layer_norm2 = nn.LayerNorm(width, eps=1e-5)

    def forward(self, x, causal=False):
        """x: (B, L, D) -> (B, L, D)."""
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """A stack of layers."""
    def __init__(self, width, heads, mlp, layers):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(width, heads, mlp) for _ in range(layers))

    def states(self, x, causal=False):
        """x: (B, L, D). Yields x itself, then the output of each layer: layers + 1 states."""
        yield x
        for layer in self.layers:
            x = layer(x, causal)
            yield x


# ---------------------------------------------------------------------------------------------------- the two towers
def normalise(pixels):
    """(..., 3, H, W) uint8 -> fp32 with CLIP's mean and spread. Pixels stay bytes up to here: a quarter of the memory."""
    return (pixels / 255 - MEAN.to(pixels.device)) / STD.to(pixels.device)


def table(rows, width):
    """An embedding whose numbers are still to be filled in."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class ImageEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, patch = config.vision_width, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.position_embedding = table(1 + config.patch_tokens, width)

    def forward(self, pixels):
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)         # (B, N, D), row by row
        cls = self.class_embedding.expand(len(x), 1, -1)
        return torch.cat((cls, x), dim=1) + self.position_embedding.weight  # (B, 1 + N, D)


class ImageTower(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embeddings = ImageEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.vision_width, eps=1e-5)     # sic: the name in every released file
        self.encoder = Encoder(config.vision_width, config.vision_heads, config.vision_mlp, config.vision_layers)
        self.post_layernorm = nn.LayerNorm(config.vision_width, eps=1e-5)

    def states(self, pixels):
        """pixels: (B, 3, H, W), normalised floats. Yields the states that CLIP.image_states describes."""
        x = self.embeddings(pixels.to(self.embeddings.patch_embedding.weight.dtype))
        yield from self.encoder.states(self.pre_layrnorm(x))


class TextEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.token_embedding = table(config.vocab_size, config.text_width)
        self.position_embedding = table(config.context_length, config.text_width)

    def forward(self, ids):
        return self.token_embedding(ids) + self.position_embedding.weight[:ids.shape[1]]   # (B, S, D)


class TextTower(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config.text_width, config.text_heads, config.text_mlp, config.text_layers)
        self.final_layer_norm = nn.LayerNorm(config.text_width, eps=1e-5)


class CLIP(nn.Module):
    """Both towers, their projections and logit_scale, the logarithm of the inverse temperature of the contrastive loss."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision_model = ImageTower(config)
        self.text_model = TextTower(config)
        self.visual_projection = nn.Linear(config.vision_width, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text_width, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if not self.logit_scale.is_meta:   # there, normal_ would do nothing but import a second's worth of torch
            self.init_weights()

    def init_weights(self):
        """Normal, with the deviations that OpenAI's code gives its text tower, here for both; biases 0."""
        nn.init.normal_(self.vision_model.embeddings.class_embedding, std=self.config.vision_width ** -0.5)
        nn.init.normal_(self.vision_model.embeddings.position_embedding.weight, std=self.config.vision_width ** -0.5)
        nn.init.normal_(self.text_model.embeddings.token_embedding.weight, std=0.02)
        nn.init.normal_(self.text_model.embeddings.position_embedding.weight, std=0.01)
        for tower, projection in ((self.vision_model, self.visual_projection), (self.text_model, self.text_projection)):
            width, depth = projection.in_features, len(tower.encoder.layers)
            nn.init.normal_(projection.weight, std=width ** -0.5)
            for name, parameter in tower.encoder.named_parameters():
                if name.endswith(".bias"):
                    nn.init.zeros_(parameter)
                elif name.endswith(("out_proj.weight", "fc2.weight")):   # what 2 * depth residual branches add up stays at 1
                    nn.init.normal_(parameter, std=width ** -0.5 * (2 * depth) ** -0.5)
                elif name.endswith("_proj.weight"):
                    nn.init.normal_(parameter, std=width ** -0.5)
                elif name.endswith("fc1.weight"):
                    nn.init.normal_(parameter, std=(2 * width) ** -0.5)

    def image_only(self):
        """Lets go of the text tower, which chat has no use for: in fp32 it would take 0.5 GB. -> itself"""
        self.text_model = self.text_projection = None
        return self

    def image_states(self, pixels):
        """pixels: (B, 3, H, W) uint8, of the size in config. Yields vision_layers + 1 states (B, 1 + N, D).

        CLS stands first. State 0 enters the first layer, state i leaves the i-th. A generator: a caller keeps the states
        that it needs and may stop early."""
        size = self.config.image_size
        assert pixels.ndim == 4 and pixels.shape[1:] == (3, size, size) and pixels.dtype == torch.uint8, \
            f"{pixels.dtype} pixels of shape {tuple(pixels.shape)}, but this CLIP sees uint8 (B, 3, {size}, {size})"
        yield from self.vision_model.states(normalise(pixels))

    def text_states(self, ids):
        """ids: (B, S) int64. Yields text_layers + 1 states (B, S, D), none of them through final_layer_norm yet.

        S may be less than config.context_length."""
        assert ids.ndim == 2 and ids.shape[1] <= self.config.context_length, \
            f"ids of shape {tuple(ids.shape)}, but this CLIP reads (B, up to {self.config.context_length})"
        yield from self.text_model.encoder.states(self.text_model.embeddings(ids), causal=True)

    def project_image(self, tokens):
        """Tokens of the last image state (..., D) -> the shared space (..., P), not normalised.

        The layers before may be in half precision while this step is not: gradients pass here, there they do not."""
        return self.visual_projection(self.vision_model.post_layernorm(tokens.to(self.visual_projection.weight.dtype)))

    def encode_image(self, pixels):
        """pixels: (B, 3, H, W) uint8 -> (B, P): the CLS token, not normalised."""
        for x in self.image_states(pixels):
            pass
        return self.project_image(x[:, 0])

    def encode_text(self, ids):
        """ids: (B, S) int64 -> (B, P), not normalised: the state at the end token, the highest id of a row."""
        for x in self.text_states(ids):
            pass
        x = x[torch.arange(len(ids), device=ids.device), ids.argmax(dim=-1)]   # (B, D)
        return self.text_projection(self.text_model.final_layer_norm(x))


# ---------------------------------------------------------------------------------------------------- the tokenizer
WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
MAX_VOCABULARY = 16 << 20   # bytes; OpenAI's file has 3.2 million
MAX_MERGES = 48_894   # OpenAI's file goes on after those that CLIP was trained with
SOT, EOT = "<|startoftext|>", "<|endoftext|>"


def byte_symbols():
    """{byte: the character that stands for it in vocabulary files}, in the order of their ids, as in GPT-2.

    The printable characters of Latin-1 stand for themselves; the 68 other bytes follow as the characters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


class Tokenizer:
    """Byte pair encoding (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909) within words, as CLIP was trained with.

    Ids: 256 bytes; 256 bytes that end a word, `</w>`; one id per merge; start token, end token. Text is lower-cased, HTML
    entities are resolved and white space is collapsed. CLIP's own code also passes text through ftfy, which is left out
    here: mojibake is not repaired, and curly quotes, ligatures and full-width letters stay what they are. Nothing in a text
    becomes a start or end token."""
    def __init__(self, merges, source="merges"):
        """merges: pairs of symbols, best first, each of them a byte or an earlier merge; else UserError, naming `source`."""
        letters = byte_symbols()
        self.symbols = [*letters.values(), *(letter + "</w>" for letter in letters.values())]
        self.pieces = [bytes([byte]) for byte in letters] + [bytes([byte, ord(" ")]) for byte in letters]
        self.byte_ids = {byte: i for i, byte in enumerate(letters)}
        self.merges, ids = {}, {symbol: i for i, symbol in enumerate(self.symbols)}   # (left id, right id) -> id of the two
        for left, right in merges:
            if left not in ids or right not in ids or left + right in ids:
                raise UserError(f"{source}: merge {len(self.merges) + 1}, {left!r} {right!r}, does not follow from those "
                                "before it; is this CLIP's vocabulary?")
            a, b = ids[left], ids[right]
            self.merges[a, b] = ids[left + right] = len(self.symbols)
            self.symbols.append(left + right)
            self.pieces.append(self.pieces[a] + self.pieces[b])
        self.symbols += [SOT, EOT]
        self.pieces += [b"", b""]
        self.vocab_size = len(self.symbols)
        self.sot, self.eot = self.vocab_size - 2, self.vocab_size - 1
        self.cache = {}   # word -> ids

    @classmethod
    def from_file(cls, path):
        """path: merges.txt of a Hugging Face folder, or OpenAI's bpe_simple_vocab_16e6.txt.gz. Raises UserError."""
        data = bytes(weightfile.map_file(path)[:MAX_VOCABULARY])
        try:
            if data[:2] == b"\x1f\x8b":
                unpack = zlib.decompressobj(zlib.MAX_WBITS | 16)   # 16: gzip
                data = unpack.decompress(data, MAX_VOCABULARY)     # a few bytes can stand for gigabytes
                if not unpack.eof:
                    raise ValueError("it is cut, or too long")
            lines = data.decode("utf-8").split("\n")
        except (ValueError, zlib.error) as e:
            raise UserError(f"{path}: cannot read CLIP's vocabulary ({weightfile.shown(e)})")
        if "#version" not in lines[0]:
            raise UserError(f"{path}: a list of merges begins with a line '#version: 0.2'; is this CLIP's vocabulary?")
        merges = [line.split() for line in lines[1:1 + MAX_MERGES] if line.strip()]
        for merge in merges:
            if len(merge) != 2:
                raise UserError(f"{path}: expected two symbols a line, found {' '.join(merge)[:80]!r}")
        return cls(merges, path)

    def encode(self, text):
        """A text -> its ids, without start and end token."""
        text = " ".join(html.unescape(html.unescape(text)).split()).lower()
        return [i for word in WORD.findall(text) for i in self.encode_word(word)]

    def encode_word(self, word):
        if word not in self.cache:
            ids = [self.byte_ids[byte] for byte in word.encode("utf-8", errors="replace")]   # half a surrogate pair: ?
            ids[-1] += 256   # the same byte, at the end of a word
            while len(ids) > 1:
                best = min(zip(ids, ids[1:]), key=lambda pair: self.merges.get(pair, math.inf))
                if best not in self.merges:
                    break
                merged = []
                for i in ids:
                    if merged and (merged[-1], i) == best:
                        merged[-1] = self.merges[best]
                    else:
                        merged.append(i)
                ids = merged
            self.cache[word] = ids
        return self.cache[word]

    def decode(self, ids):
        """Ids -> lower-case text up to the end token, with one space after each word (and between signs and digits)."""
        ids = itertools.takewhile(lambda i: i != self.eot, map(int, ids))
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace").rstrip(" ")

    def __call__(self, texts, context_length=77):
        """A text or a list of them -> (B, context_length) int64: start token, text, end token, zeros.

        A text that is too long is cut, and keeps its end token: without it, encode_text would read the start token, whose
        state is the same for every text."""
        texts = [texts] if isinstance(texts, str) else texts
        rows = torch.zeros(len(texts), context_length, dtype=torch.int64)
        for row, text in zip(rows, texts):
            ids = [self.sot, *self.encode(text)][:context_length - 1] + [self.eot]
            row[:len(ids)] = torch.tensor(ids)
        return rows


# ---------------------------------------------------------------------------------------------------- weights
def load_clip(path):
    """A Hugging Face CLIP folder, or an archive of OpenAI such as ViT-L-14.pt -> (CLIP, Tokenizer). Raises UserError.

    The vocabulary is merges.txt of the folder, or else the one that OpenAI released, which ships with this program."""
    clip, path, vocabulary = load_clip_model(path), os.fspath(path), VOCABULARY
    if os.path.exists(os.path.join(path, "merges.txt")):
        vocabulary = os.path.join(path, "merges.txt")
    tokenizer = Tokenizer.from_file(vocabulary)
    if tokenizer.vocab_size != clip.config.vocab_size:
        raise UserError(f"{path}: this CLIP knows {clip.config.vocab_size} ids, but {vocabulary} makes {tokenizer.vocab_size}")
    return clip, tokenizer


def load_clip_model(path):
    """The model of load_clip without its tokenizer, which takes longer to read than the model to map: chat has no use for it.

    In eval mode, asks for no gradients and keeps the dtypes of the file, whose memory it maps. Raises UserError."""
    path = os.fspath(path)
    if os.path.isdir(path):
        config = hf_config(os.path.join(path, "config.json"))
        tensors = {name: tensor for name, tensor in weightfile.read_tensors(path).items() if name not in HF_BUFFERS}
    else:
        config, tensors = from_openai(weightfile.read_file(path), path)
    check_config(config, path)
    with weightfile.shapes_only():
        clip = CLIP(config).requires_grad_(False)
    return weightfile.load_into(clip, tensors, path).eval()


def read_clip_config(path):
    """The sizes of what load_clip would read, as CLIPConfig. Raises UserError."""
    config = hf_config(os.path.join(path, "config.json")) if os.path.isdir(path) else from_openai(weightfile.read_file(path), path)[0]
    check_config(config, path)
    return config


def save_clip(folder, clip, tokenizer, dtype=torch.float16):
    """Writes a Hugging Face CLIP folder: config.json, model.safetensors, merges.txt, vocab.json. Raises UserError."""
    sections = {"vision_config": {"model_type": "clip_vision_model", **HF_FIXED},
                "text_config": {"model_type": "clip_text_model", **HF_FIXED, "bos_token_id": tokenizer.sot,
                                "eos_token_id": tokenizer.eot}}
    config = {"architectures": ["CLIPModel"], "model_type": "clip", "torch_dtype": str(dtype).removeprefix("torch."),
              **sections}
    for field, value in asdict(clip.config).items():
        section, key, _ = HF_CONFIG[field]
        (sections[section] if section else config)[key] = value
    for section in sections.values():
        section["projection_dim"] = clip.config.projection_dim
    merges = ["#version: 0.2", *(f"{tokenizer.symbols[a]} {tokenizer.symbols[b]}" for a, b in tokenizer.merges)]
    texts = {"config.json": json.dumps(config, indent=2) + "\n", "merges.txt": "\n".join(merges) + "\n",
             "vocab.json": json.dumps({symbol: i for i, symbol in enumerate(tokenizer.symbols)}, ensure_ascii=False)}
    make_folder(folder)
    for name, text in texts.items():
        write_atomic(os.path.join(folder, name), lambda f: f.write(text.encode("utf-8")))
    tensors = {name: tensor.to(dtype) for name, tensor in clip.state_dict().items()}
    weightfile.write_safetensors(os.path.join(folder, "model.safetensors"), tensors, {"format": "pt"})


def check_config(config, source):
    """Raises UserError where the sizes make no model."""
    for field, value in asdict(config).items():
        if type(value) is not int or not 1 <= value <= (1024 if field.endswith("layers") else 1 << 18):
            raise UserError(f"{source}: {field} is {weightfile.shown(repr(value))}, not a whole number of a sensible size; is this a CLIP?")
    for width, heads in ((config.vision_width, config.vision_heads), (config.text_width, config.text_heads)):
        if width % heads:
            raise UserError(f"{source}: {heads} heads do not divide a width of {width}; is this a CLIP?")


# Hugging Face writes only those entries of config.json that differ from its defaults, the sizes of ViT-B/32.
HF_CONFIG = {   # field of CLIPConfig: section and key in config.json, default
    "image_size": ("vision_config", "image_size", 224),
    "patch_size": ("vision_config", "patch_size", 32),
    "vision_width": ("vision_config", "hidden_size", 768),
    "vision_layers": ("vision_config", "num_hidden_layers", 12),
    "vision_heads": ("vision_config", "num_attention_heads", 12),
    "vision_mlp": ("vision_config", "intermediate_size", 3072),
    "text_width": ("text_config", "hidden_size", 512),
    "text_layers": ("text_config", "num_hidden_layers", 12),
    "text_heads": ("text_config", "num_attention_heads", 8),
    "text_mlp": ("text_config", "intermediate_size", 2048),
    "vocab_size": ("text_config", "vocab_size", 49408),
    "context_length": ("text_config", "max_position_embeddings", 77),
    "projection_dim": (None, "projection_dim", 512),
}
HF_FIXED = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}   # also its defaults
HF_BUFFERS = ("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids")   # 0, 1, 2, ... in older files


def hf_config(path):
    """config.json of a Hugging Face CLIP -> CLIPConfig. Raises UserError."""
    config = weightfile.read_json(path)
    if config.get("model_type") != "clip":
        raise UserError(f"{path}: model_type is {weightfile.shown(repr(config.get('model_type')))}, not 'clip'; give the folder of a whole CLIP")
    sections = {None: config}
    for name in ("vision_config", "text_config"):
        try:   # files of 2022 have each section twice, and `_dict` is the one that counts
            section = sections[name] = {**(config.get(name) or {}), **(config.get(name + "_dict") or {})}
        except TypeError:
            raise UserError(f"{path}: {name} is not an object; is the file damaged?")
        for key, value in HF_FIXED.items():
            if section.get(key, value) != value:
                raise UserError(f"{path}: {name} asks for {key} {weightfile.shown(repr(section[key]))}; only {value!r} is supported")
    return CLIPConfig(**{field: sections[section].get(key, default) for field, (section, key, default) in HF_CONFIG.items()})


OPENAI = {      # OpenAI's names -> Hugging Face's; a trailing weight or bias is carried over
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",                           # transposed
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "transformer.resblocks": "text_model.encoder.layers",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",                         # transposed
    "logit_scale": "logit_scale",
    "ln_1": "layer_norm1", "attn.out_proj": "self_attn.out_proj",         # inside a layer, where q, k and v are fused
    "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
}
OPENAI_SCALARS = ("input_resolution", "context_length", "vocab_size")    # which the shapes of the tensors say as well


def from_openai(tensors, source):
    """{OpenAI's name: tensor} of file `source` -> (CLIPConfig, {Hugging Face name: tensor}). Raises UserError."""
    def layers(stack):
        return len({name.removeprefix(stack).split(".")[0] for name in tensors if name.startswith(stack)})
    try:
        vision_width, _, patch_size, _ = tensors["visual.conv1.weight"].shape
        vocab_size, text_width = tensors["token_embedding.weight"].shape
        config = CLIPConfig(
            image_size=patch_size * math.isqrt(len(tensors["visual.positional_embedding"]) - 1), patch_size=patch_size,
            vision_width=vision_width, vision_layers=layers("visual.transformer.resblocks."),
            vision_heads=vision_width // 64, vision_mlp=len(tensors["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
            text_width=text_width, text_layers=layers("transformer.resblocks."),
            text_heads=text_width // 64, text_mlp=len(tensors["transformer.resblocks.0.mlp.c_fc.weight"]),
            vocab_size=vocab_size, context_length=len(tensors["positional_embedding"]),
            projection_dim=tensors["text_projection"].shape[1])
        renamed = {}
        for name, tensor in tensors.items():
            stack, number, part, kind = re.fullmatch(
                r"(?:(.*resblocks)\.(\d+)\.)?(.*?)(?:[._](weight|bias))?", name, re.S).groups()
            prefix = f"{OPENAI.get(stack, stack)}.{number}." if stack else ""
            if part == "attn.in_proj":
                for letter, third in zip("qkv", tensor.chunk(3)):
                    renamed[f"{prefix}self_attn.{letter}_proj.{kind}"] = third
            elif name not in OPENAI_SCALARS:   # a name that we do not know stays as it is, and load_into reports it
                renamed[prefix + OPENAI[part] + (f".{kind}" if kind else "") if part in OPENAI else name] = \
                    tensor.t().contiguous() if name in ("visual.proj", "text_projection") else tensor
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as e:
        raise UserError(f"{source}: not a CLIP of OpenAI with a vision transformer, such as ViT-L-14.pt ({e}); "
                        "a Hugging Face CLIP is given as the folder with its config.json")
    return config, renamed
