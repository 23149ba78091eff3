"""A LLaMA in one file: decoder, KV cache, sampling, tokenizers, and the folders, Hugging Face's or Meta's, that it is read from.

  LLaMA      Touvron et al. 2023, arXiv 2302.13971: pre-norm decoder with RMSNorm, rotary positions and SwiGLU
  LLaMA 2/3  Touvron et al. 2023, arXiv 2307.09288, and Grattafiori et al. 2024, arXiv 2407.21783: grouped-query attention,
             from 3 on tiktoken, from 3.1 on stretched rotary positions
Nothing here knows about video. Video reaches the model as `embeds`, rows that stand where word embeddings would.

Shapes: B batch, S new tokens, P tokens already in the KV cache, D width, H heads, h KV heads, d head width, V vocabulary.
"""
import base64
import contextlib
import json
import math
import os
import re
from dataclasses import dataclass

import sentencepiece
import tiktoken
import torch
import torch.nn.functional as F
from torch import nn

from plumbing import quant
from plumbing.cli import UserError, make_folder, write_atomic
from plumbing.store import state_of
from plumbing.weightfile import (likely_reason, load_into, map_file, read_file, read_json, read_tensors,
                                 shapes_only, shown, write_safetensors)

ROPE_SCALING = {"default": (), "linear": ("factor",),   # kinds, and what each needs to know
                "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
MAX_LAYERS, MAX_SIZE = 1024, 1 << 24   # beyond any model: a file that claims more is damaged, and would fill a memory with modules


@dataclass
class LLaMAConfig:
    """Sizes of a decoder; the defaults are LLaMA-7B. Raises UserError for sizes that cannot be."""
    vocab_size: int = 32000            # V, rows of embed_tokens and lm_head
    width: int = 4096                  # D
    layers: int = 32
    heads: int = 32                    # H
    kv_heads: int | None = None        # h, each shared by H / h query heads; None: h = H
    mlp: int = 11008                   # hidden width of SwiGLU
    head_dim: int | None = None        # d; None: D / H
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None   # Hugging Face's: {"rope_type": "linear" or "llama3", "factor": ...}
    norm_eps: float = 1e-5
    context_length: int = 2048         # most tokens that it was trained to read at once, P + S
    tied: bool = False                 # lm_head is embed_tokens

    def __post_init__(self):
        sizes = (self.vocab_size, self.width, self.layers, self.heads, self.mlp, self.context_length)
        if min(sizes) < 1:
            raise UserError(f"a LLaMA of vocabulary, width, layers, heads, mlp, context {shown(sizes)}: every size is at least 1")
        self.kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        self.head_dim = self.width // self.heads if self.head_dim is None else self.head_dim
        if self.layers > MAX_LAYERS or max(sizes) > MAX_SIZE or self.heads * self.head_dim > MAX_SIZE:
            raise UserError(f"a LLaMA of vocabulary, width, layers, heads, mlp, context {shown(sizes)}: no such model is that large")
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise UserError(f"{self.heads} heads cannot share {self.kv_heads} KV heads evenly")
        if not 2 <= self.head_dim <= self.width or self.head_dim % 2:
            raise UserError(f"a head is {self.head_dim} wide; rotary positions turn pairs, so it must be even, and no wider than the model")
        if self.rope_scaling is not None:
            needed = ROPE_SCALING.get(self.rope_kind)
            if needed is None or not all(is_positive(self.rope_scaling.get(key)) for key in needed) or self.rope_kind == "llama3" and \
                    self.rope_scaling["low_freq_factor"] >= self.rope_scaling["high_freq_factor"]:
                raise UserError(f"rope_scaling {shown(self.rope_scaling)}: known kinds and what each states are {ROPE_SCALING}")
        if not is_positive(self.rope_theta) or not is_positive(self.norm_eps):
            raise UserError(f"rope_theta {self.rope_theta}, norm_eps {self.norm_eps}: both are numbers above 0")

    @property
    def rope_kind(self):
        return "default" if self.rope_scaling is None else self.rope_scaling.get("rope_type", self.rope_scaling.get("type"))


def is_positive(number):
    return isinstance(number, (int, float)) and math.isfinite(number) and number > 0


# ---------------------------------------------------------------------------------------------------- rotary positions
def rope_frequencies(config, device):
    """How far a position turns each of the d/2 pairs of a head, in radians -> (d/2,) fp32.

    Su et al. 2021, arXiv 2104.09864: f_i = theta^(-2i/d). "linear" (Chen et al. 2023, arXiv 2306.15595) slows all pairs by
    `factor`. "llama3" slows only pairs that turn less than low_freq_factor times within the original context, leaves those
    that turn more than high_freq_factor times, and blends by the number of turns in between."""
    d, scaling = config.head_dim, config.rope_scaling
    freq = 1 / config.rope_theta ** (torch.arange(0, d, 2, device=device, dtype=torch.float32) / d)   # (d/2,)
    if config.rope_kind == "linear":
        return freq / scaling["factor"]
    if config.rope_kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * freq / (2 * torch.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * freq + (1 - keep) * freq / scaling["factor"]
    return freq


def rope_tables(config, start, S, device):
    """cos and sin of the angles of positions start .. start+S-1 -> two (S, d/2) fp32.

    Always computed in fp32: bf16 cannot tell position 1000 from 1001."""
    positions = torch.arange(start, start + S, device=device, dtype=torch.float32)
    angles = positions[:, None] * rope_frequencies(config, device)   # (S, d/2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turns pair i = (x_i, x_{i+d/2}), Hugging Face's pairing, by its angle. x: (B, H, S, d); cos, sin: (S, d/2)."""
    a, b = x.chunk(2, dim=-1)   # (B, H, S, d/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# ---------------------------------------------------------------------------------------------------- decoder
class KVCache:
    """Keys and values of the first `length` tokens, so that a new token costs one step. For inference: no gradient.

    k[layer], v[layer]: (B, h, max_len, d), allocated once; on a CPU, memory is taken only as tokens come."""
    def __init__(self, config, batch, max_len, device, dtype):
        shape = (batch, config.kv_heads, max_len, config.head_dim)
        self.k = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.layers)]
        self.v = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.layers)]
        self.length, self.max_len = 0, max_len

    def append(self, layer, k, v):
        """k, v of S new tokens, (B, h, S, d) -> those of all tokens, (B, h, P+S, d). `length` moves once all layers have."""
        end = self.length + k.shape[2]
        self.k[layer][:, :, self.length:end] = k
        self.v[layer][:, :, self.length:end] = v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]

    def truncate(self, length):
        """Forgets all but the first `length` tokens: the prefix that a next prompt shares with this one."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot keep {length} tokens of {self.length}")
        self.length = length


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich 2019, arXiv 1910.07467). The mean square is taken in fp32: fp16 overflows."""
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Causal self-attention; H/h query heads share a key-value head (Ainslie et al. 2023, arXiv 2305.13245)."""
    def __init__(self, config, layer):
        super().__init__()
        D, d = config.width, config.head_dim
        self.layer, self.head_dim, self.grouped = layer, d, config.kv_heads < config.heads
        self.q_proj = nn.Linear(D, config.heads * d, bias=False)
        self.k_proj = nn.Linear(D, config.kv_heads * d, bias=False)
        self.v_proj = nn.Linear(D, config.kv_heads * d, bias=False)
        self.o_proj = nn.Linear(config.heads * d, D, bias=False)

    def forward(self, x, cos, sin, mask, kv_cache):
        B, S, _ = x.shape
        q, k, v = (proj(x).view(B, S, -1, self.head_dim).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))   # (B, H, S, d), (B, h, S, d) twice
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if kv_cache is not None:
            k, v = kv_cache.append(self.layer, k, v)   # (B, h, P+S, d)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and S > 1, enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).reshape(B, S, -1))   # (B, H, S, d) -> (B, S, D)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202): down(silu(gate(x)) * up(x))."""
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp, bias=False)
        self.down_proj = nn.Linear(config.mlp, config.width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: attention, then MLP, each normalised before and added to the stream."""
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, mask, kv_cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, kv_cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LLaMA(nn.Module):
    """The decoder, weights in fp32, bf16 or fp16. Its state dict is that of a Hugging Face LlamaForCausalLM."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.width), freeze=False),
            "layers": nn.ModuleList(Block(config, layer) for layer in range(config.layers)),
            "norm": RMSNorm(config.width, config.norm_eps)})
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        for module in self.modules():   # not on the meta device: there a first normal_ costs a second of imports
            if isinstance(module, (nn.Linear, nn.Embedding)) and not module.weight.is_meta:
                nn.init.normal_(module.weight, std=0.02)
        self.tie()

    def tie(self):
        """Where the config says so, makes lm_head and embed_tokens one parameter; needed again after either is replaced."""
        if self.config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids=None, embeds=None, kv_cache=None, last_only=False):
        """ids: (B, S) int64, or embeds: (B, S, D) in their place -> logits (B, S, V) fp32, (B, 1, V) if last_only.

        Positions go on from kv_cache.length, and the cache takes in the S tokens. A batch padded on the right needs no mask:
        attention is causal, so only padding sees padding. Raises UserError if P + S is more than the context holds."""
        if (ids is None) == (embeds is None):
            raise ValueError("give exactly one of ids and embeds")
        weight, P = self.model.embed_tokens.weight, 0 if kv_cache is None else kv_cache.length
        x = self.model.embed_tokens(ids) if embeds is None else embeds.to(weight.dtype)   # (B, S, D)
        S = x.shape[1]
        if P + S > self.config.context_length:
            raise UserError(f"{P + S} tokens, but this language model reads at most {self.config.context_length} at once")
        if kv_cache is not None and P + S > kv_cache.max_len:
            raise ValueError(f"{P + S} tokens, but the KV cache holds {kv_cache.max_len}")
        cos, sin = (table.to(x.dtype) for table in rope_tables(self.config, P, S, x.device))
        mask = None   # no prefix: plain causal attention; one new token: it sees everything
        if P > 0 and S > 1:   # new token s sees the P cached ones and the new ones up to itself
            mask = torch.ones(S, P + S, dtype=torch.bool, device=x.device).tril(diagonal=P)
        for block in self.model.layers:
            x = block(x, cos, sin, mask, kv_cache)
        if kv_cache is not None:
            kv_cache.length += S
        if last_only:
            x = x[:, -1:]   # (B, 1, D): one row of V logits where a prompt would make thousands
        return self.lm_head(self.model.norm(x)).float()

    def resize_vocab(self, n):
        """Grows embed_tokens and lm_head to n rows, for tokens that LLaVA adds; a new row is the mean of the old ones."""
        old = self.config.vocab_size
        if n < old:
            raise ValueError(f"cannot shrink a vocabulary of {old} to {n}")
        for module in (self.model.embed_tokens, self.lm_head):
            rows = module.weight.detach()
            new = rows.float().mean(0, keepdim=True).to(rows.dtype).expand(n - old, -1)
            module.weight = nn.Parameter(torch.cat((rows, new)), requires_grad=module.weight.requires_grad)   # (n, D)
        self.model.embed_tokens.num_embeddings = self.lm_head.out_features = self.config.vocab_size = n
        self.tie()


# ---------------------------------------------------------------------------------------------------- generation
def sample(logits, temperature, top_p, generator):
    """One token from logits (V,) -> int. Temperature 0 takes the likeliest.

    top_p (Holtzman et al. 2019, arXiv 1904.09751): draws from the fewest likeliest tokens that together have at least that
    probability. The draw is made on the CPU with a CPU generator, so that a seed means the same on every device."""
    if temperature < 0 or not 0 < top_p <= 1:
        raise UserError(f"temperature {temperature}, top_p {top_p}: needed are temperature >= 0 and 0 < top_p <= 1")
    if temperature == 0:
        return int(logits.argmax())
    logits = logits.double().cpu()   # in which every temperature and top_p that can be asked for is more than 0
    probs = ((logits - logits.max()) / temperature).softmax(-1)   # the largest is 0 at any temperature: no overflow
    probs, tokens = probs.sort(descending=True)
    kept = probs.cumsum(-1) - probs < top_p   # what comes before a token does not reach top_p yet
    return int(tokens[torch.multinomial(probs * kept, 1, generator=generator)])


@torch.inference_mode()
def generate(model, ids=None, embeds=None, *, max_new_tokens, temperature=0.0, top_p=1.0, seed=0, stop_ids=(),
             kv_cache=None):
    """Continues one prompt, ids (1, S) int64 or embeds (1, S, D), and yields token ids (int) as they come.

    Ends at a token of stop_ids, which is not yielded, after max_new_tokens, or when the context (or the given kv_cache) is
    full. With a kv_cache that holds the start of the prompt, `ids` or `embeds` is only its rest; afterwards the cache holds
    all of the prompt and of what was yielded, except the last token where no stop id followed it. Raises UserError where the
    prompt leaves no room for an answer."""
    B, S = (ids if embeds is None else embeds).shape[:2]
    if B != 1:
        raise ValueError(f"generate continues one prompt, not {B}")
    weight, limit = model.model.embed_tokens.weight, model.config.context_length
    if kv_cache is None:
        kv_cache = KVCache(model.config, 1, min(limit, S + max_new_tokens), weight.device, weight.dtype)
    else:
        limit = min(limit, kv_cache.max_len)
    used = kv_cache.length + S
    if used >= limit:
        raise UserError(f"the prompt has {used} tokens, which leaves no room for an answer in a context of {limit}")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(min(max_new_tokens, limit - used)):
        logits = model(ids, embeds, kv_cache, last_only=True)   # (1, 1, V): first the prompt (prefill), then token by token
        token = sample(logits[0, 0], temperature, top_p, generator)
        if token in stop_ids:
            return
        yield token
        ids, embeds = torch.tensor([[token]], device=weight.device), None


def stream_text(tokenizer, ids):
    """Token ids as they come -> pieces of text (str, never empty) as early as they are certain.

    Joined, the pieces are tokenizer.decode(all ids). A character may be spread over several tokens: until its last byte is
    there it decodes to U+FFFD, so these are held back at the end of the text, and given out as they are once the ids end."""
    seen, text, sent = [], "", 0
    for token in ids:
        seen.append(token)
        text = tokenizer.decode(seen)   # from the start each time: what a token decodes to depends on those before it
        whole = len(text.rstrip("\ufffd"))
        if whole > sent:
            yield text[sent:whole]
            sent = whole
    if text[sent:]:
        yield text[sent:]


# ---------------------------------------------------------------------------------------------------- tokenizers
class SentencePieceTokenizer:
    """The tokenizer of LLaMA 1 and 2 (Kudo and Richardson 2018, arXiv 1808.06226): a sentencepiece model file.

    bos_id, eos_id: int; stop_ids: set of int, the ids that end an answer; vocab_size: int; between: what a part of a prompt has to
    begin with for a space before it."""
    between = ""

    def __init__(self, path):
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=bytes(map_file(path)))
        except (RuntimeError, UnicodeDecodeError):   # the latter from sentencepiece's own message about a damaged piece
            raise UserError(f"{path}: not a whole sentencepiece model; download it again")
        self.bos_id, self.eos_id, self.vocab_size = self.model.bos_id(), self.model.eos_id(), self.model.vocab_size()
        if min(self.bos_id, self.eos_id) < 0:
            raise UserError(f"{path}: this sentencepiece model has no tokens that begin and end a text; it is not a LLaMA's")
        self.stop_ids = {self.eos_id}

    def encode(self, text):
        """str -> list of int, without BOS and EOS; control tokens written out in the text are only text.

        Every call begins a text, before which LLaMA's models put a space (in a piece, U+2581). Parts of a prompt that are
        encoded one by one and joined as ids each get one, so a part should not begin with a space of its own."""
        return self.model.encode(text)

    def decode(self, ids):
        """ids -> str, without the space that encode put first. Control tokens and ids beyond the vocabulary (the tokens that
        LLaVA adds) have no text; bytes that are not UTF-8 become U+FFFD."""
        return self.model.decode([int(i) for i in ids if i < self.vocab_size])


# How LLaMA 3 cuts text before byte-pair merging, with regex's classes of letters and numbers; the first rule that fits wins
LLAMA3_SPLIT = "|".join((
    r"'(?i:[sdmt]|ll|ve|re)",             # the end of a contraction: 's, 'LL
    r"[^\r\n\p{L}\p{N}]?\p{L}+",          # a word, with the one space or sign before it
    r"\p{N}{1,3}",                        # digits by threes, from the left
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",         # signs, with a space before and line ends after
    r"\s*[\r\n]+",                        # space up to the last line end
    r"\s+(?!\S)",                         # space, but for the one that belongs to the next word
    r"\s+"))
LLAMA3_NAMED = {   # of the 256; the rest is reserved
    0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}


class TiktokenTokenizer:
    """The tokenizer of LLaMA 3: a text file of byte-pair ranks, `base64 rank` a line, and 256 special tokens after the last.

    bos_id, eos_id, stop_ids, vocab_size, between: as above; special: {"<|eot_id|>": id, ...}, all 256."""
    between = " "

    def __init__(self, path):
        try:
            lines = (line.split() for line in bytes(map_file(path)).splitlines())
            ranks = {base64.b64decode(word, validate=True): int(rank) for word, rank in lines}
        except ValueError as e:
            raise UserError(f"{path}: damaged list of byte-pair ranks ({e}); download it again")
        self.words = n = len(ranks)
        if set(ranks.values()) != set(range(n)) or not all(bytes([b]) in ranks for b in range(256)):
            raise UserError(f"{path}: its {n} byte-pair ranks are not 0..{n - 1} with all 256 bytes; download it again")
        reserved = iter(range(256))
        names = [LLAMA3_NAMED[i] if i in LLAMA3_NAMED else f"reserved_special_token_{next(reserved)}" for i in range(256)]
        self.special = {f"<|{name}|>": n + i for i, name in enumerate(names)}
        self.model = tiktoken.Encoding("llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=self.special)
        self.bos_id, self.eos_id = self.special["<|begin_of_text|>"], self.special["<|end_of_text|>"]
        self.vocab_size = n + 256
        self.stop_ids = {self.eos_id, self.special["<|eot_id|>"]}

    def encode(self, text):
        """str -> list of int, without BOS and EOS; special tokens written out in the text are only text. Adds no space."""
        return self.model.encode_ordinary(text)

    def decode(self, ids):
        """ids -> str. Special tokens and ids beyond the vocabulary have no text; bytes that are not UTF-8 become U+FFFD."""
        return self.model.decode([int(i) for i in ids if i < self.words])


def load_tokenizer(folder, rows=None):
    """The tokenizer.model of a folder, of either kind, told apart by content. rows: how many the word embeddings beside it
    have; LLaVA's have more than its tokenizer has tokens. Raises UserError, also where they are fewer."""
    path = tokenizer_path(folder)
    if not os.path.exists(path) and os.path.exists(os.path.join(folder, "tokenizer.json")):
        raise UserError(f"{path}: missing; put the release's original tokenizer.model there (tokenizer.json is not read)")
    tokenizer = open_tokenizer(path)
    if rows is not None and tokenizer.vocab_size > rows:
        raise UserError(f"{folder}: {tokenizer.vocab_size} tokens in tokenizer.model, but {rows} in the weights; "
                        "they do not belong together")
    return tokenizer


def tokenizer_path(folder):
    """Where a folder's tokenizer.model is: beside the weights, or, as Meta released LLaMA 1 and 2, one folder up."""
    own, above = (os.path.join(folder, *up, "tokenizer.model") for up in ((), (os.pardir,)))
    return above if not os.path.exists(own) and is_meta(folder) and os.path.exists(above) else own


MAX_TOKENIZER = 32 << 20   # bytes; that of LLaMA 3 has 2 MB


def open_tokenizer(path):
    """A tokenizer.model of either kind. Raises UserError."""
    buffer = map_file(path)
    start = buffer[:4096]
    if len(buffer) > MAX_TOKENIZER:
        raise UserError(f"{path}: {len(buffer):,} bytes; no tokenizer is that large")
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", start):
        return TiktokenTokenizer(path)
    if start[:1] == b"\n":   # a protobuf whose field 1, the pieces, comes first
        return SentencePieceTokenizer(path)
    raise UserError(f"{path}: neither a sentencepiece model nor a list of byte-pair ranks (is the download complete?)")


# ---------------------------------------------------------------------------------------------------- weights
EXTRA = ("model.mm_projector.", "mm_projector.", "model.vision_tower.")   # what LLaVA stores beside its LLaMA
NOT_LLAMA = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling", "no_rope_layers",   # models that
             "partial_rotary_factor")   # name their tensors as a LLaMA does, and compute otherwise
RECOMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")   # a table that older files also store


def load_llama(folder, quantize=None, base=None):
    """The folder of a LLaMA, Vicuna or LLaVA, in Hugging Face's layout or Meta's -> (LLaMA, tokenizer, extra).

    As read_llama, build_llama and load_tokenizer. Raises UserError.
    base: the folder of the LLaMA that delta weights add to; with it `folder` must hold such, and without it must not."""
    sources = [state_of(source) for source in (folder, base) if source is not None] if quantize else None
    config, tensors, extra = read_llama(folder)
    if base is not None:
        tensors = add_base(folder, tensors, base, read_llama(base)[1])
    elif is_delta(tensors):
        raise UserError(f"{folder}: a delta: trained weights less those of the LLaMA that they began from; name the folder of "
                        "that LLaMA: --base FOLDER")
    tokenizer = load_tokenizer(folder, config.vocab_size)
    return build_llama(folder, config, tensors, quantize, sources), tokenizer, extra


def build_llama(folder, config, tensors, quantize=None, sources=None):
    """What read_llama found in `folder` -> LLaMA. Tensors are adopted, in the dtype of the file, whose memory they map.

    quantize: a key of quant.SCHEMES, for inference only. sources: what state_of said of the folder before it
    was read (None: it is asked now). A missing, additional or ill-sized tensor raises UserError."""
    if config.tied:
        tensors = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    with shapes_only():
        model = LLaMA(config)
    load_into(model, tensors, folder)
    model.tie()
    return model if quantize is None else quant.quantized(model, quantize, folder, sources or state_of(folder))


def read_llama(folder):
    """The weights of a folder in Hugging Face's layout or Meta's, mapped -> (LLaMAConfig, tensors, extra). Raises UserError.

    tensors: {Hugging Face name: tensor}; of Meta's, queries and keys are copies, and so are all of several shards. extra:
    {name: tensor} of what is LLaVA's and not LLaMA's (EXTRA), named as in the file. Sizes come from config.json or
    params.json, but that of the vocabulary from embed_tokens, which grows when tokens are added."""
    if is_meta(folder):
        config, tensors, extra = *read_meta(folder), {}
    else:
        tensors = read_tensors(folder)
        extra = {name: t for name, t in tensors.items() if name.startswith(EXTRA)}
        tensors = {name: t for name, t in tensors.items() if name not in extra and not RECOMPUTED.fullmatch(name)}
        embed = check_embedding(folder, tensors, "model.embed_tokens.weight")
        config = read_config(os.path.join(folder, "config.json"), len(embed), has_head="lm_head.weight" in tensors)
    dtypes = {t.dtype for t in tensors.values()}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        raise UserError(f"{folder}: tensors of {', '.join(sorted(map(str, dtypes)))}; needed is one of fp32, bf16, fp16")
    layers = len({name.split(".")[2] for name in tensors if name.startswith("model.layers.")})
    if layers != config.layers:   # before anything is built: a description can claim a billion
        raise UserError(f"{folder}: described as {config.layers:,} layers, but its weights have {layers:,}; is a file of it missing?")
    return config, tensors, extra


def read_llama_config(folder):
    """The sizes of what load_llama would read, as LLaMAConfig: nothing is joined, moved or read but headers. Raises UserError."""
    if not is_meta(folder):
        return read_llama(folder)[0]
    path = os.path.join(folder, "params.json")
    params = read_json(path)
    parts = read_consolidated(folder, params)
    sliced = (("tok_embeddings.weight", "model.embed_tokens.weight", 1), ("layers.0.feed_forward.w1.weight", "model.layers.0.mlp.gate_proj.weight", 0))
    with stated_in(path):
        return meta_config(path, params, {new: join(folder, name, [part[name].to("meta") for part in parts], dim, params["dim"])
                                          for name, new, dim in sliced})


def check_embedding(source, tensors, name):
    """The word embeddings among {name: tensor}: what every LLaMA has. Raises UserError, with a guess of what this is instead."""
    if name not in tensors or tensors[name].ndim != 2:
        raise UserError(f"{source}: not a LLaMA (no {name} of two dimensions); {likely_reason([], tensors, [])}")
    return tensors[name]


@contextlib.contextmanager
def stated_in(path):
    """Turns what goes wrong while a description of a model is read into one line that names its file."""
    try:
        yield
    except KeyError as e:
        raise UserError(f"{path}: states no {e}; is this the folder of a LLaMA?")
    except (TypeError, ValueError, AttributeError, OverflowError, UserError) as e:
        raise UserError(f"{path}: {shown(e, longest=300)}")


def read_config(path, vocab_size, has_head):
    """Hugging Face's config.json -> LLaMAConfig. Raises UserError for what is missing or changes the arithmetic."""
    c = read_json(path)
    with stated_in(path):
        if c.get("hidden_act", "silu") != "silu":
            raise UserError(f"its activation is {shown(c['hidden_act'])}, a LLaMA's is silu")
        for key in NOT_LLAMA:
            if c.get(key) not in (None, 1, []):
                raise UserError(f"its {key} is {shown(c[key])}; a LLaMA has no such thing")
        if c.get("sliding_window") and c.get("use_sliding_window", True):
            raise UserError(f"its attention sees {shown(c['sliding_window'])} tokens back, as a Mistral's; a LLaMA's sees all")
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}   # transformers 5 and before
        kv_heads, head_dim = c.get("num_key_value_heads"), c.get("head_dim")
        return LLaMAConfig(
            vocab_size=vocab_size, width=int(c["hidden_size"]), layers=int(c["num_hidden_layers"]),
            heads=int(c["num_attention_heads"]), kv_heads=None if kv_heads is None else int(kv_heads),
            mlp=int(c["intermediate_size"]), head_dim=None if head_dim is None else int(head_dim),
            rope_theta=float(rope.get("rope_theta", c.get("rope_theta", LLaMAConfig.rope_theta))),
            rope_scaling={key: value for key, value in rope.items() if key != "rope_theta"} or None,
            norm_eps=float(c["rms_norm_eps"]),
            context_length=int(c.get("max_position_embeddings", LLaMAConfig.context_length)),
            tied=bool(c.get("tie_word_embeddings", False)) and not has_head)


# Meta's folder: params.json and consolidated.00.pth, .01, ...: every file holds a slice of every matrix
META = {   # name within Meta's files: Hugging Face's, and the dimension that is sliced (None: each file has the whole)
    "tok_embeddings": ("model.embed_tokens", 1), "norm": ("model.norm", None), "output": ("lm_head", 0),
    "attention.wq": ("self_attn.q_proj", 0), "attention.wk": ("self_attn.k_proj", 0), "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1), "feed_forward.w1": ("mlp.gate_proj", 0), "feed_forward.w3": ("mlp.up_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1), "attention_norm": ("input_layernorm", None), "ffn_norm": ("post_attention_layernorm", None)}


def is_meta(folder):
    return os.path.exists(os.path.join(folder, "params.json")) and not os.path.exists(os.path.join(folder, "config.json"))


def is_joined(folder, base=None):
    """Whether load_llama puts the LLaMA in this folder together in memory: it is a delta on a base, or has several of Meta's shards."""
    return base is not None or is_meta(folder) and os.path.exists(os.path.join(folder, "consolidated.01.pth"))


def read_meta(folder):
    """Meta's folder of a LLaMA 1, 2 or 3 -> (LLaMAConfig, {Hugging Face name: tensor}). Raises UserError.

    A single shard stays a memory map but for the queries and keys, whose rows change places: 2 GB of a 7B. Several shards are
    joined, a copy of all; save_llama writes what can be mapped."""
    path = os.path.join(folder, "params.json")
    params, tensors = read_json(path), {}
    parts = read_consolidated(folder, params)
    for name in parts[0]:
        layer, part = re.fullmatch(r"(?:layers\.(\d+)\.)?(.*?)(?:\.weight)?", name, re.S).groups()
        if name != "rope.freqs":   # a table that is recomputed
            new, dim = META.get(part, (None, 0))
            new = name if new is None else f"{'model.layers.' + layer + '.' if layer else ''}{new}.weight"   # load_into names a stranger
            tensors[new] = join(folder, name, [p[name] for p in parts], dim, params["dim"])
    if tensors.get("model.layers.0.mlp.gate_proj.weight", torch.empty(0)).ndim != 2:   # how wide an MLP is stands nowhere else
        raise UserError(f"{folder}: no matrix layers.0.feed_forward.w1.weight in its consolidated.*.pth; is it the whole of a LLaMA?")
    config = meta_config(path, params, tensors)
    for name, t in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")) and t.shape[1:] == (config.width,) and len(t) % config.head_dim == 0:
            tensors[name] = halves_from_pairs(t, config.head_dim)
    return config, tensors


def read_consolidated(folder, params):
    """-> the tensors of each consolidated.NN.pth, all there and with the same names. Raises UserError."""
    numbers = sorted(int(match[1]) for match in map(re.compile(r"consolidated\.(\d\d)\.pth").fullmatch, os.listdir(folder)) if match)
    paths = [os.path.join(folder, f"consolidated.{i:02}.pth") for i in range(max(1, len(numbers)))]
    parts = [read_file(path) for path in paths]
    check_embedding(paths[0], parts[0], "tok_embeddings.weight")
    for path, part in zip(paths, parts):
        if part.keys() != parts[0].keys():
            raise UserError(f"{path}: its tensors are not those of {paths[0]}; do these files belong together?")
    rows, = parts[0].get("layers.0.attention.wq.weight", torch.empty(0)).shape[:1] or (0,)
    if not rows or not isinstance(params.get("dim"), int) or params["dim"] != rows * len(parts):
        raise UserError(f"{folder}: {len(parts)} of its consolidated.*.pth with {rows} rows of queries each, but params.json says that "
                        f"dim is {shown(params.get('dim'))}; is one missing?")
    return parts


def join(folder, name, parts, dim, width):
    """A matrix from its slices. Word embeddings are sliced by width in LLaMA 1 and 2, by words in LLaMA 3: their shape says which."""
    if len(parts) == 1:
        return parts[0]
    try:
        if name == "tok_embeddings.weight" and parts[0].shape[1] == width:
            dim = 0
        if dim is not None:
            return torch.cat(parts, dim)
        if all(torch.equal(part, parts[0]) for part in parts):
            return parts[0]
    except (RuntimeError, IndexError):   # shapes that cannot be joined
        pass
    raise UserError(f"{folder}: {shown(name)} does not fit together from its {len(parts)} files; do these belong together?")


def halves_from_pairs(weight, d):
    """Rows of queries or keys (heads * d, D) in Meta's order -> in ours. Meta turns the pairs (x_2i, x_2i+1) of a head, `rotate`
    the pairs (x_i, x_{i+d/2}): the same arithmetic once the rows of each head are sorted, even ones first."""
    return weight.view(-1, d // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def meta_config(path, params, tensors):
    """params.json, and the sizes that only the tensors know, -> LLaMAConfig. Raises UserError.

    The length of the context stands nowhere; it is told from what does. LLaMA 1 reads 2048 tokens, 2 reads 4096, 3 (larger
    rope_theta) 8192 and 3.1 (use_scaled_rope) 131072; CodeLlama (rope_theta 1e6) 16384. Between 1 and 2 nothing differs but
    norm_eps, 1e-6 and 1e-5; only the 65B of LLaMA 1 has 1e-5 as well, and is known by its width without shared KV heads.
    The stretch of rotary positions is 8 in 3.1 and, as unstated, 32 in the 1B and 3B of 3.2."""
    with stated_in(path):
        width, heads, kv_heads = int(params["dim"]), int(params["n_heads"]), params.get("n_kv_heads")
        theta, eps, scaled = float(params.get("rope_theta", 1e4)), float(params["norm_eps"]), bool(params.get("use_scaled_rope"))
        scaling = {"rope_type": "llama3", "factor": 32.0 if width in (2048, 3072) else 8.0, "low_freq_factor": 1.0,
                   "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        first = eps < 5e-6 or (width == 8192 and kv_heads is None)
        context_length = 131072 if scaled else 16384 if theta == 1e6 else 8192 if theta > 1e4 else 2048 if first else 4096
        return LLaMAConfig(vocab_size=len(tensors["model.embed_tokens.weight"]), width=width, layers=int(params["n_layers"]), heads=heads,
                           kv_heads=None if kv_heads is None else int(kv_heads), mlp=len(tensors["model.layers.0.mlp.gate_proj.weight"]), rope_theta=theta,
                           rope_scaling=scaling if scaled else None, norm_eps=eps, context_length=context_length)


# Delta weights: what training changed, without the LLaMA that could not be given away. Weights = base + delta
GROWN = ("model.embed_tokens.weight", "lm_head.weight")   # where added tokens have rows that the base lacks


def is_delta(tensors):
    """Whether {name: tensor} is a difference of two models: then no RMSNorm's weights, which are of the order of 1 in a model,
    are far from 0. Looks at these alone, a few numbers of each gigabyte."""
    sizes = [t.float().abs().mean() for name, t in tensors.items() if name.endswith("norm.weight") and t.numel() <= MAX_SIZE]
    return bool(sizes) and bool(max(sizes) < 0.1)


def add_base(folder, delta, base_folder, base):
    """{name: tensor} of a delta and of its base -> their sum in the delta's dtype, a copy. Rows that only the delta has, those
    of added tokens, are its own. `base` is used up: it may have been joined in memory, and goes as the sum comes. Raises UserError."""
    for source, tensors, expected in ((folder, delta, True), (base_folder, base, False)):
        if is_delta(tensors) != expected:
            raise UserError(f"{source}: whole weights, not a delta; leave out --base" if expected else
                            f"{source}: a delta itself; --base is the folder of the LLaMA that the weights began from")
    total = {}
    for name, t in delta.items():
        there, b = name in base, base.pop(name, torch.empty(0))
        grown = name in GROWN and b.ndim == t.ndim == 2 and b.shape[1] == t.shape[1] and 0 < len(b) < len(t)
        if b.shape != t.shape and not grown:
            raise UserError(f"{folder}: {shown(name)} is {tuple(t.shape)}, in the base {base_folder} it is "
                            f"{tuple(b.shape) if there else 'missing'}; is this the LLaMA that it was trained from?")
        b = b.to(t.dtype)
        total[name] = torch.cat((t[:len(b)] + b, t[len(b):])) if grown else t + b
    return total


def save_llama(folder, model, tokenizer_model_path, extra={}, dtype=torch.float16, config_extra={}):
    """Writes what load_llama reads: config.json, model.safetensors, tokenizer.model, each atomically.

    extra: {name: tensor}, names as in EXTRA; with an mm_projector among them the folder says that it is a LLaVA.
    config_extra: more entries of config.json (mm_hidden_size, ...). Raises UserError."""
    stale = os.path.join(folder, "model.safetensors.index.json")
    if os.path.exists(stale):
        raise UserError(f"{stale}: this folder holds a model in shards, which would be read instead; choose another folder")
    c, tokenizer = model.config, open_tokenizer(tokenizer_model_path)
    tokenizer_bytes = bytes(map_file(tokenizer_model_path))
    is_llava = any("mm_projector." in name for name in extra)
    settings = {
        "architectures": ["LlavaLlamaForCausalLM" if is_llava else "LlamaForCausalLM"],
        "model_type": "llava" if is_llava else "llama", "hidden_act": "silu", "torch_dtype": str(dtype).split(".")[1],
        "vocab_size": c.vocab_size, "hidden_size": c.width, "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads, "intermediate_size": c.mlp, "head_dim": c.head_dim, "rope_theta": c.rope_theta,
        "rope_scaling": c.rope_scaling, "rms_norm_eps": c.norm_eps, "max_position_embeddings": c.context_length,
        "tie_word_embeddings": c.tied, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, **config_extra}
    tensors = {name: t for name, t in model.state_dict().items() if not (c.tied and name == "lm_head.weight")}
    make_folder(folder)
    write_safetensors(os.path.join(folder, "model.safetensors"),
                      {name: t.to(dtype) for name, t in (tensors | extra).items()}, metadata={"format": "pt"})
    write_atomic(os.path.join(folder, "tokenizer.model"), lambda f: f.write(tokenizer_bytes))
    write_atomic(os.path.join(folder, "config.json"), lambda f: f.write(json.dumps(settings, indent=2).encode() + b"\n"))
