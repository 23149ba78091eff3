"""CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020): an image, a text, each a vector of one space.

  pixels -> patches -> layers -> CLS token at the last layer -> projection  \\
                                                                             cosine * exp(logit_scale)
  text   -> BPE ids -> causal layers -> state at the end token -> projection /

Modules and parameters are named as in a Hugging Face CLIPModel, so its weight files load without renaming.
OpenAI's own archives come in through the name table at the bottom. The default sizes are those of ViT-L/14.
"""
import gzip
import html
import json
import math
import os
import zlib
from dataclasses import dataclass

import regex
import torch
import torch.nn.functional as F
from torch import nn

from plumbing import weightfile
from plumbing.cli import UserError, make_folder, write_atomic

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)   # of RGB in 0..1
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
ASSETS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets")
VOCABULARY = os.path.join(ASSETS, "bpe_simple_vocab_16e6.txt.gz")


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


# --------------------------------------------------------------------------------------------------- a layer
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
    """Two linear layers around quick-GELU, x * sigmoid(1.702 x): so the released weights were trained."""
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x * (1.702 * x).sigmoid_())   # in place: new memory costs a CPU more than the sum


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


# ------------------------------------------------------------------------------------------------ two towers
def normalise(pixels):
    """(..., 3, H, W) uint8 -> fp32 with CLIP's mean and spread. Bytes up to here: a quarter of the memory."""
    return (pixels / 255 - MEAN.to(pixels.device)) / STD.to(pixels.device)


def table(rows, width):
    """An embedding whose rows are about of length 1."""
    module = nn.Embedding(rows, width)
    nn.init.normal_(module.weight, std=width ** -0.5)
    return module


class ImageEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, patch = config.vision_width, config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(width))
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
        width = config.vision_width
        self.pre_layrnorm = nn.LayerNorm(width, eps=1e-5)   # sic: the name in every released file
        self.encoder = Encoder(width, config.vision_heads, config.vision_mlp, config.vision_layers)
        self.post_layernorm = nn.LayerNorm(width, eps=1e-5)

    def states(self, pixels):
        """pixels: (B, 3, H, W), normalised floats. Yields the states that CLIP.image_states describes."""
        x = self.embeddings(pixels.to(self.embeddings.patch_embedding.weight.dtype))
        yield from self.encoder.states(self.pre_layrnorm(x))


class TextTower(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.text_width
        self.embeddings = nn.ModuleDict({"token_embedding": table(config.vocab_size, width),
                                         "position_embedding": table(config.context_length, width)})
        self.encoder = Encoder(width, config.text_heads, config.text_mlp, config.text_layers)
        self.final_layer_norm = nn.LayerNorm(width, eps=1e-5)

    def states(self, ids):
        words, places = self.embeddings.values()
        return self.encoder.states(words(ids) + places.weight[:ids.shape[1]], causal=True)   # (B, S, D) each


class CLIP(nn.Module):
    """Both towers, their projections, and logit_scale: the logarithm of the loss's inverse temperature."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision_model = ImageTower(config)
        self.text_model = TextTower(config)
        self.visual_projection = nn.Linear(config.vision_width, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text_width, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def image_only(self):
        """Lets go of the text tower, which chat has no use for: in fp32 it would take 0.5 GB. -> itself"""
        self.text_model = self.text_projection = None
        return self

    def image_states(self, pixels):
        """pixels: (B, 3, H, W) uint8, of the size in config. Yields vision_layers + 1 states (B, 1 + N, D).

        CLS stands first. State 0 enters the first layer, state i leaves the i-th. A caller may stop early."""
        assert pixels.dtype == torch.uint8, f"{pixels.dtype} pixels, but CLIP normalises bytes itself"
        yield from self.vision_model.states(normalise(pixels))

    def project_image(self, tokens):
        """Tokens of the last image state (..., D) -> the shared space (..., P), not normalised.

        The layers before may be in half precision while this step is not: gradients pass here, not there."""
        tokens = tokens.to(self.visual_projection.weight.dtype)
        return self.visual_projection(self.vision_model.post_layernorm(tokens))

    def encode_image(self, pixels):
        """pixels: (B, 3, H, W) uint8 -> (B, P): the CLS token, not normalised."""
        *_, x = self.image_states(pixels)
        return self.project_image(x[:, 0])

    def encode_text(self, ids):
        """ids: (B, S) int64 -> (B, P), not normalised: the state at the end token, a row's highest id."""
        *_, x = self.text_model.states(ids)
        x = x[torch.arange(len(ids), device=ids.device), ids.argmax(dim=-1)]   # (B, D)
        return self.text_projection(self.text_model.final_layer_norm(x))


# --------------------------------------------------------------------------------------------- the tokenizer
WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
MAX_MERGES = 48_894   # OpenAI's file goes on after those that CLIP was trained with


class Tokenizer:
    """Byte pair encoding within words (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909), as in CLIP.

    Ids: 256 bytes; 256 bytes that end a word, `</w>`; one id per merge; start token, end token. Text is
    lower-cased, HTML entities are resolved, white space is collapsed. Unlike CLIP's own code, nothing repairs
    mojibake: curly quotes, ligatures and full-width letters stay. No text becomes a start or end token."""
    def __init__(self, merges):
        """merges: pairs of symbols, best first, each of a byte or an earlier merge, else a KeyError."""
        printable = [*range(ord("!"), 127), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
        others = [byte for byte in range(256) if byte not in printable]
        # as in GPT-2: printable characters stand for themselves, those from 256 on for the other 68 bytes
        letters = [*map(chr, printable), *(chr(256 + i) for i in range(len(others)))]
        self.symbols = [*letters, *(letter + "</w>" for letter in letters)]
        self.byte_ids = {byte: i for i, byte in enumerate(printable + others)}
        ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.merges = {}   # (left id, right id): id of the two
        for left, right in merges:
            self.merges[ids[left], ids[right]] = ids[left + right] = len(self.symbols)
            self.symbols.append(left + right)
        self.symbols += ["<|startoftext|>", "<|endoftext|>"]
        self.vocab_size = len(self.symbols)
        self.sot, self.eot = self.vocab_size - 2, self.vocab_size - 1
        self.cache = {}   # word: ids

    @classmethod
    def from_file(cls, path):
        """path: merges.txt of Hugging Face, or OpenAI's bpe_simple_vocab_16e6.txt.gz. Raises UserError."""
        text = weightfile.map_file(path)[:]
        try:
            text = gzip.decompress(text) if text[:2] == b"\x1f\x8b" else text
            lines = text.decode("utf-8").split("\n")[1:1 + MAX_MERGES]   # behind `#version: 0.2`
            return cls([line.split() for line in lines if line.strip()])
        except (OSError, zlib.error, *weightfile.DAMAGE) as e:
            raise UserError(f"{path}: is this CLIP's vocabulary? ({type(e).__name__}: {weightfile.shown(e)})")

    def encode(self, text):
        """A text -> its ids, without start and end token."""
        text = " ".join(html.unescape(html.unescape(text)).split()).lower()
        return [i for word in WORD.findall(text) for i in self.encode_word(word)]

    def encode_word(self, word):
        if word not in self.cache:
            ids = [self.byte_ids[byte] for byte in word.encode("utf-8", errors="replace")]   # half a pair: ?
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

    def __call__(self, texts, context_length=77):
        """A text or a list of them -> (B, context_length) int64: start token, text, end token, zeros.

        A text that is too long keeps its end token. Without it, encode_text would read the start token, whose
        state is the same for every text."""
        texts = [texts] if isinstance(texts, str) else texts
        rows = torch.zeros(len(texts), context_length, dtype=torch.int64)
        for row, text in zip(rows, texts):
            ids = [self.sot, *self.encode(text)][:context_length - 1] + [self.eot]
            row[:len(ids)] = torch.tensor(ids)
        return rows


# --------------------------------------------------------------------------------------------------- weights
def load_clip(path):
    """A Hugging Face CLIP folder, or OpenAI's archive, ViT-L-14.pt -> (CLIP, Tokenizer). Raises UserError.

    The vocabulary is merges.txt of the folder, or else OpenAI's own, which ships with this program."""
    clip, merges = read_clip(path), os.path.join(path, "merges.txt")
    vocabulary = merges if os.path.exists(merges) else VOCABULARY
    tokenizer = Tokenizer.from_file(vocabulary)
    if tokenizer.vocab_size != clip.config.vocab_size:
        raise UserError(f"{path}: this CLIP knows {clip.config.vocab_size} ids, but {vocabulary} makes "
                        f"{tokenizer.vocab_size}")
    return clip, tokenizer


def read_clip(path):
    """The same -> CLIP in eval mode, without gradients; its tensors map the file. Raises UserError."""
    folder, tensors = os.path.isdir(path), weightfile.read_tensors(path)
    stated = weightfile.read_json(os.path.join(path, "config.json")) if folder else {}
    try:
        if not folder:
            tensors = from_openai(tensors)
        tensors = {name: t for name, t in tensors.items() if not name.endswith(".embeddings.position_ids")}
        with weightfile.shapes_only():
            clip = CLIP(config_of(tensors, stated)).requires_grad_(False)
    except weightfile.DAMAGE as e:
        reason = f"{type(e).__name__}: {weightfile.shown(e)}; {weightfile.likely_reason(tensors)}"
        raise UserError(f"{path}: not a CLIP that is read here ({reason}); needed is OpenAI's ViT-L-14.pt "
                        "or the folder of Hugging Face")
    return weightfile.load_into(clip, tensors, path).eval()


def config_of(tensors, stated):
    """{Hugging Face name: tensor}, and what config.json states -> CLIPConfig. Raises one of DAMAGE.

    Only the heads are not to be seen in the tensors. OpenAI's are 64 wide; config.json names what differs
    from ViT-B/32, with its 12 and 8 heads. Files of 2022 have each section twice, and `_dict` counts."""
    def rows(name):
        return len(tensors[f"{name}.weight"])
    patch_size = tensors["vision_model.embeddings.patch_embedding.weight"].shape[2]
    patches = rows("vision_model.embeddings.position_embedding") - 1
    sizes = {"image_size": patch_size * math.isqrt(patches), "patch_size": patch_size,
             "vocab_size": rows("text_model.embeddings.token_embedding"),
             "context_length": rows("text_model.embeddings.position_embedding"),
             "projection_dim": rows("text_projection")}
    for tower, heads in (("vision", 12), ("text", 8)):
        layers = f"{tower}_model.encoder.layers."
        width = rows(layers + "0.layer_norm1")
        section = {**(stated.get(f"{tower}_config") or {}), **(stated.get(f"{tower}_config_dict") or {})}
        activation = section.get("hidden_act") or "quick_gelu"
        heads = int(section.get("num_attention_heads") or (heads if stated else width // 64))
        names = {name.split(".")[3] for name in tensors if name.startswith(layers)}
        sizes |= {f"{tower}_width": width, f"{tower}_layers": len(names), f"{tower}_heads": heads,
                  f"{tower}_mlp": rows(layers + "0.mlp.fc1")}
        if width % heads:
            raise ValueError(f"no model has {heads} heads in a width of {width}")
        if activation != "quick_gelu":
            raise ValueError(f"its hidden_act is {activation!r}, not 'quick_gelu'")
    return CLIPConfig(**sizes)


def save_clip(folder, clip, tokenizer, dtype=torch.float16):
    """Writes a Hugging Face CLIP folder: config.json, model.safetensors, merges.txt, vocab.json."""
    c = vars(clip.config)
    vision, text = ({"projection_dim": c["projection_dim"], "hidden_size": c[f"{tower}_width"],
                     "num_hidden_layers": c[f"{tower}_layers"], "num_attention_heads": c[f"{tower}_heads"],
                     "intermediate_size": c[f"{tower}_mlp"]} for tower in ("vision", "text"))
    vision |= {"image_size": c["image_size"], "patch_size": c["patch_size"]}
    text |= {"vocab_size": c["vocab_size"], "max_position_embeddings": c["context_length"],
             "bos_token_id": tokenizer.sot, "eos_token_id": tokenizer.eot}
    config = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": c["projection_dim"],
              "torch_dtype": str(dtype).removeprefix("torch."), "vision_config": vision, "text_config": text}
    merges = [f"{tokenizer.symbols[a]} {tokenizer.symbols[b]}" for a, b in tokenizer.merges]
    texts = {"config.json": json.dumps(config, indent=2) + "\n",
             "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
             "vocab.json": json.dumps({x: i for i, x in enumerate(tokenizer.symbols)}, ensure_ascii=False)}
    make_folder(folder)
    for name, content in texts.items():
        write_atomic(os.path.join(folder, name), lambda f: f.write(content.encode("utf-8")))
    tensors = {name: tensor.to(dtype) for name, tensor in clip.state_dict().items()}
    weightfile.write_safetensors(os.path.join(folder, "model.safetensors"), tensors, {"format": "pt"})
OPENAI = {   # parts of OpenAI's names -> Hugging Face's, replaced in this order
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "transformer.resblocks": "text_model.encoder.layers",
    ".attn.": ".self_attn.", ".ln_1.": ".layer_norm1.", ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.", ".mlp.c_proj.": ".mlp.fc2.",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm",
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}   # transposed


def from_openai(tensors):
    """{OpenAI's name: tensor} -> {Hugging Face's name: tensor}; a name that we do not know stays as it is."""
    renamed = {}
    for name, tensor in tensors.items():
        if name in ("visual.proj", "text_projection"):
            tensor = tensor.t().contiguous()
        for old, new in OPENAI.items():
            name = name.replace(old, new)
        if ".in_proj_" in name:   # q, k and v in one
            renamed |= {name.replace(".in_proj_", f".{x}_proj."): t for x, t in zip("qkv", tensor.chunk(3))}
        elif name not in ("input_resolution", "context_length", "vocab_size"):   # as the shapes say
            renamed[name] = tensor
    return renamed
