"""A LLaMA in one file: decoder, KV cache, sampling, tokenizers, and released weights in.

  LLaMA      Touvron et al. 2023, arXiv 2302.13971: RMSNorm before each part, rotary positions, SwiGLU
  LLaMA 2/3  Touvron et al. 2023, arXiv 2307.09288, and Grattafiori et al. 2024, arXiv 2407.21783:
             grouped-query attention, from 3 on tiktoken, from 3.1 on stretched rotary positions

Nothing here knows about video. It comes as `embeds`, rows that stand where word embeddings would.
Shapes: B batch, S new tokens, P tokens in the KV cache, D width, H heads, h KV heads, d head width, V words.
"""
import base64
import collections
import copy
import functools
import glob
import heapq
import itertools
import json
import os
import re
import warnings
from dataclasses import dataclass

import sentencepiece
import tiktoken
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from plumbing.cli import UserError, make_folder, write_atomic
from plumbing.weightfile import (DAMAGE, QUANTISED, check_fit, likely_reason, load_into, map_file, read_file,
                                 read_json, read_tensors, shapes_only, shown, write_safetensors)


@dataclass
class LLaMAConfig:
    """Sizes of a decoder; the defaults are LLaMA-7B. Raises ValueError for a kind of rope_scaling that is not
    known."""
    vocab_size: int = 32000            # V, rows of embed_tokens and lm_head
    width: int = 4096                  # D
    layers: int = 32
    heads: int = 32                    # H
    kv_heads: int | None = None        # h, each shared by H / h query heads; None: h = H
    mlp: int = 11008                   # hidden width of SwiGLU
    head_dim: int | None = None        # d; None: D / H
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None   # Hugging Face's {"rope_type": ..., "factor": ...}, see below
    norm_eps: float = 1e-5
    context_length: int = 2048         # most tokens that it was trained to read at once, P + S
    tied: bool = False                 # lm_head is embed_tokens

    def __post_init__(self):
        self.kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        self.head_dim = self.width // self.heads if self.head_dim is None else self.head_dim
        rope_frequencies(self, "cpu")   # raises what it does now, not with the first token


# ---------------------------------------------------------------------------------------- rotary positions
def rope_frequencies(config, device):
    """How far a position turns each of the d/2 pairs of a head, in radians -> (d/2,) fp32.

    Su et al. 2021, arXiv 2104.09864: f_i = theta^(-2i/d). "linear" (Chen et al. 2023, arXiv 2306.15595) slows
    all pairs by `factor`. "llama3" slows only pairs that turn less than low_freq_factor times within the
    original context, leaves those that turn more than high_freq_factor times, and blends in between."""
    d, scaling = config.head_dim, config.rope_scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    freq = 1 / config.rope_theta ** (torch.arange(0, d, 2, device=device, dtype=torch.float32) / d)   # (d/2,)
    if kind == "linear":
        return freq / scaling["factor"]
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * freq / (2 * torch.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * freq + (1 - keep) * freq / scaling["factor"]
    if kind != "default":
        raise ValueError(f"rope_scaling is {shown(kind)}; known are default, linear and llama3")
    return freq


def rope_tables(config, positions):
    """cos and sin of the angles of positions (..., S), for `rotate` -> two (..., S, d) fp32.

    Always computed in fp32: bf16 cannot tell position 1000 from 1001."""
    angles = positions[..., None].float() * rope_frequencies(config, positions.device)   # (..., S, d/2)
    return torch.cat((angles.cos(), angles.cos()), dim=-1), torch.cat((-angles.sin(), angles.sin()), dim=-1)


def rotate(x, cos, sin):
    """Turns each pair (a, b) = (x_i, x_{i+d/2}), Hugging Face's, by its angle: a cos - b sin, b cos + a sin.

    x (B, H, S, d); cos, sin of rope_tables (S, d)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


# ---------------------------------------------------------------------------------------- decoder
class KVCache:
    """Keys and values of the first `length` tokens, so that a new token costs one step. No gradient.

    k[layer], v[layer]: (B, h, max_len, d), allocated once; on a CPU memory is taken only as tokens come."""
    def __init__(self, config, batch, max_len, device, dtype):
        shape = (batch, config.kv_heads, max_len, config.head_dim)
        make = torch.zeros if torch.device(device).type == "cuda" else torch.empty   # GraphedStep reads ahead
        self.k = [make(shape, device=device, dtype=dtype) for _ in range(config.layers)]
        self.v = [make(shape, device=device, dtype=dtype) for _ in range(config.layers)]
        self.length, self.max_len = 0, max_len

    def append(self, layer, k, v):
        """k, v of S new tokens (B, h, S, d) -> of all (B, h, P+S, d). `length` moves after the last layer."""
        end = self.length + k.shape[2]
        self.k[layer][:, :, self.length:end] = k
        self.v[layer][:, :, self.length:end] = v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]

    def truncate(self, length):
        """Forgets all but the first `length` tokens: the prefix that a next prompt shares with this one."""
        assert 0 <= length <= self.length, f"cannot keep {length} tokens of {self.length}"
        self.length = length

    def fork(self, length, max_len):
        """-> another cache, for max_len tokens, that begins with a copy of the first `length` ones."""
        other = copy.copy(self)
        other.k, other.v = ([F.pad(t[:, :, :length], (0, 0, 0, max_len - length)) for t in tensors]
                            for tensors in (self.k, self.v))
        other.length, other.max_len = length, max_len
        return other


class Attention(nn.Module):
    """Causal self-attention; H/h query heads share a KV head (Ainslie et al. 2023, arXiv 2305.13245)."""
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
        causal = mask is None and S > 1
        if S == 1 and q.dtype == torch.bfloat16 and not q.is_cuda:   # twice the row: a third of the time
            q = q.repeat(1, 1, 2, 1)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=self.grouped)[:, :, :S]
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
    """One layer: attention, then MLP, each normalised before (Zhang and Sennrich 2019, arXiv 1910.07467) and
    added to the stream."""
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.width, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, mask, kv_cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, kv_cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LLaMA(nn.Module):
    """The decoder, in fp32, bf16 or fp16. Its state dict is that of a Hugging Face LlamaForCausalLM."""
    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointed = config, False   # True: training keeps a layer's input, and computes
        self.model = nn.ModuleDict({                     # the rest of it again when the gradient needs it
            "embed_tokens": nn.Embedding(config.vocab_size, config.width),
            "layers": nn.ModuleList(Block(config, layer) for layer in range(config.layers)),
            "norm": nn.RMSNorm(config.width, config.norm_eps)})
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        self.tie()

    def tie(self):
        """Makes lm_head and embed_tokens one parameter, if they are; again after either is replaced."""
        if self.config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def new_cache(self, batch, max_len):
        """-> an empty KVCache where the weights are, in their dtype."""
        words = self.model.embed_tokens.weight
        return KVCache(self.config, batch, max_len, words.device, words.dtype)

    def forward(self, ids=None, embeds=None, kv_cache=None, last_only=False, apart=False):
        """ids (B, S) int64, or embeds (B, S, D) -> logits (B, S, V) fp32, or (B, 1, V) if last_only.

        Positions go on from kv_cache.length, and the cache takes in the S tokens. A batch padded on the right
        needs no mask: only padding sees padding. apart: the S tokens do not follow each other, each is a next
        one after the P in the cache. Raises UserError if context or cache hold less than P + S."""
        words, P, longest = self.model.embed_tokens, 0, self.config.context_length
        if kv_cache is not None:
            P, longest = kv_cache.length, min(longest, kv_cache.max_len)
        x = words(ids) if embeds is None else embeds.to(words.weight.dtype)   # (B, S, D)
        S = x.shape[1]
        if P + S > longest:
            raise UserError(f"{P + S} tokens, but this language model reads at most {longest} at once here")
        positions = torch.full((S,), P, device=x.device) if apart else torch.arange(P, P + S, device=x.device)
        mask = None   # no prefix: plain causal attention; one new token: it sees everything
        if P > 0 and S > 1:   # new token s sees the P cached ones and the new ones up to itself
            mask = torch.ones(S, P + S, dtype=torch.bool, device=x.device).tril(diagonal=P)
            if apart:   # up to itself, without the others
                mask[:, P:] = torch.eye(S, dtype=torch.bool)
        x = self.layers(x, positions, mask, kv_cache)
        if kv_cache is not None:
            kv_cache.length += S
        if last_only:
            x = x[:, -1:]   # (B, 1, D): one row of V logits where a prompt would make thousands
        return self.lm_head(self.model.norm(x)).float()

    def layers(self, x, positions, mask, kv_cache):
        """All layers, x (B, S, D) of tokens at positions (S,) -> same shape."""
        cos, sin = (table.to(x.dtype) for table in rope_tables(self.config, positions))
        for block in self.model.layers:
            if self.checkpointed and self.training:
                block = functools.partial(checkpoint, block, use_reentrant=False)
            x = block(x, cos, sin, mask, kv_cache)
        return x

    def resize_vocab(self, n):
        """Grows embed_tokens and lm_head to n rows, for tokens that LLaVA adds; new rows are the mean."""
        for module in (self.model.embed_tokens, self.lm_head):
            rows = module.weight.detach()
            new = rows.float().mean(0).to(rows.dtype).expand(n - len(rows), -1)
            module.weight = nn.Parameter(torch.cat((rows, new)), module.weight.requires_grad)   # (n, D)
        self.model.embed_tokens.num_embeddings = self.lm_head.out_features = self.config.vocab_size = n
        self.tie()


# ---------------------------------------------------------------------------------------- generation
def sample(logits, temperature, top_p, generator):
    """One token from logits (V,) -> int. Temperature 0 takes the likeliest. Raises UserError for NaN.

    top_p (Holtzman et al. 2019, arXiv 1904.09751): draws from the fewest likeliest tokens that together have
    at least that probability. On the CPU, so that a seed means the same on every device."""
    if logits.isnan().any():
        raise UserError("the language model gives no numbers; damaged weights, or does --dtype fp32 help?")
    if temperature == 0:
        return int(logits.argmax())
    logits = logits.double().cpu()   # where fp32 would take a low temperature for 0
    probs = ((logits - logits.max()) / temperature).softmax(-1)   # the largest is 0: no overflow
    probs, tokens = probs.sort(descending=True)
    kept = probs.cumsum(-1) - probs < top_p   # what comes before a token does not reach top_p yet
    return int(tokens[torch.multinomial(probs * kept, 1, generator=generator)])


class GraphedStep:
    """A model's next token on a GPU, as a CUDA graph: to launch its 900 kernels takes longer than they run.

    A graph's shapes are fixed, and a change of shape costs a search for kernels. So a token attends to the
    first `span` places of the cache, a multiple of 512, of which those behind its own are masked."""
    def __init__(self, model, kv_cache):
        self.model, self.kv_cache, device = model, kv_cache, kv_cache.k[0].device
        self.token, self.place = (torch.zeros(n, dtype=torch.long, device=device) for n in ((1, 1), 1))
        self.span = 0

    def append(self, layer, k, v):
        """As KVCache.append: k, v of the one token (1, h, 1, d) -> of the span (1, h, span, d)."""
        keys, values = self.kv_cache.k[layer], self.kv_cache.v[layer]
        keys.index_copy_(2, self.place, k)
        values.index_copy_(2, self.place, v)
        return keys[:, :, :self.span], values[:, :, :self.span]

    def run(self):
        seen = torch.arange(self.span, device=self.place.device) <= self.place   # (span,)
        x = self.model.layers(self.model.model.embed_tokens(self.token), self.place, seen[None], self)
        return self.model.lm_head(self.model.model.norm(x)).float()

    def __call__(self, token):
        """token: int, which the cache takes in -> logits (1, 1, V) of the next one, until the next call."""
        self.token.fill_(token)
        self.place.fill_(self.kv_cache.length)
        self.kv_cache.length += 1
        if self.kv_cache.length > self.span:
            self.span = min(-(-self.kv_cache.length // 512) * 512, self.kv_cache.max_len)
            self.run()   # libraries choose their kernels: not while they are recorded
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self.run()
        self.graph.replay()
        return self.logits


@torch.inference_mode()
def generate(model, ids=None, embeds=None, *, max_new_tokens, temperature=0.0, top_p=1.0, seed=0, stop_ids=(),
             kv_cache=None):
    """Continues one prompt, ids (1, S) int64 or embeds (1, S, D), and yields token ids (int) as they come.

    Ends at a token of stop_ids, which is not yielded, after max_new_tokens, or with context or cache full.
    If kv_cache holds the start of the prompt, `ids` or `embeds` is its rest. Afterwards it holds all but the
    last token, or all if a stop id followed. Raises UserError for a prompt too long."""
    if kv_cache is None:
        S = (ids if embeds is None else embeds).shape[1]
        kv_cache = model.new_cache(1, S + max_new_tokens)
    generator = torch.Generator().manual_seed(seed)
    logits = model(ids, embeds, kv_cache, last_only=True)   # (1, 1, V): prefill, then decode
    step = GraphedStep(model, kv_cache) if logits.is_cuda else None
    room = min(model.config.context_length, kv_cache.max_len) - kv_cache.length
    for left in reversed(range(min(max_new_tokens, room))):
        token = sample(logits[0, 0], temperature, top_p, generator)
        if token in stop_ids:
            return
        yield token
        if left:
            logits = step(token) if step else model(torch.tensor([[token]]), kv_cache=kv_cache)


@torch.inference_mode()
def generate_batch(model, embeds, *, max_new_tokens, stop_ids):
    """Greedy answers to B prompts of one length, embeds (B, S, D) -> [(ids, cut)], B of them: the ids that
    `generate` yields of each alone, and by what an answer was cut: "max_new_tokens", "context" or None.
    Without padding no row can touch another. Raises UserError for prompts too long."""
    B, S, _ = embeds.shape
    limit = min(max_new_tokens, model.config.context_length - S)
    kv_cache = model.new_cache(B, S + limit)
    logits = model(embeds=embeds, kv_cache=kv_cache, last_only=True)   # (B, 1, V)
    answers = [[] for _ in range(B)]
    for left in reversed(range(limit)):
        for ids, row in zip(answers, logits[:, 0]):
            ids.append(sample(row, 0, 1, None))
        if not left or all(map(stop_ids.intersection, answers)):   # what has ended goes on until all have
            break
        logits = model(torch.tensor([ids[-1:] for ids in answers], device=embeds.device), kv_cache=kv_cache)
    cut = "max_new_tokens" if limit == max_new_tokens else "context"
    return [(list(itertools.takewhile(lambda token: token not in stop_ids, ids)),
             None if stop_ids.intersection(ids) else cut) for ids in answers]


def after_prompt(model, embeds, longest):
    """Reads a prompt, embeds (1, S, D) -> after(ids), for at most `longest` ids, maybe none: log P of what
    stands in the place of each and of what comes after them, (1 + ids, V)."""
    S = embeds.shape[1]
    kv_cache = model.new_cache(1, S + longest)
    first = model(embeds=embeds, kv_cache=kv_cache, last_only=True)[0].log_softmax(-1)   # (1, V)

    def after(ids):
        if not ids:
            return first
        kv_cache.truncate(S)
        rest = model(torch.tensor([ids], device=embeds.device), kv_cache=kv_cache)[0]
        return torch.cat([first, rest.log_softmax(-1)])
    return after


@torch.inference_mode()
def log_likelihoods(model, embeds, answers):
    """log P that the model continues a prompt, embeds (1, S, D), with each of some answers, tuples of ids."""
    after = after_prompt(model, embeds, max(map(len, answers)))
    picked = (after(ids[:-1]).gather(1, torch.tensor(ids, device=embeds.device)[:, None]) for ids in answers)
    return [log_probs.double().sum().item() for log_probs in picked]


@torch.inference_mode()
def closed_answer(model, embeds, answers):
    """The likeliest of some answers, tuples of ids with an end token, to a prompt, embeds (1, S, D) -> its
    place, and log P that the model says this and stops."""
    after = after_prompt(model, embeds, max(map(len, answers)))
    return likeliest(answers, lambda ids: after(ids)[-1].tolist())


def likeliest(answers, log_probs):
    """Which of some answers, tuples of ids with an end token, has the largest sum of log P -> its place, of
    equal ones the first; the sum. log_probs(path) -> of the token after these ids, for each by its id.

    A sum only falls. So the likeliest open path is always the next one to follow, and the first answer that
    comes up is the best of all: exact, with a few passes for thousands of answers."""
    tree = {}   # {path: {token after it: the first answer that goes on so}}
    for i, answer in enumerate(answers):
        for n, token in enumerate(answer):
            tree.setdefault(answer[:n], {}).setdefault(token, i)
    heap = [(0.0, 0, ())]   # (-sum, first answer, path)
    while True:
        cost, first, path = heapq.heappop(heap)
        if path not in tree:
            return first, -cost
        after = log_probs(path)
        for token, i in tree[path].items():
            heapq.heappush(heap, (cost - after[token], i, (*path, token)))


@torch.inference_mode()
def number_probabilities(model, kv_cache, before, digits):
    """How likely each of 00 to 99 comes next, as two tokens -> (100,) fp32; their sum is that of any of them.

    kv_cache: all tokens up to `before`, the last one, which it lacks. digits: the ids of 0 to 9. As p(ab) is
    p(a) p(b | a), it takes one pass for the ten p(a), and one for all p(b | a), in which ten continuations
    share the cache. Afterwards it is as long as before."""
    P, device = kv_cache.length, kv_cache.k[0].device
    first, second = torch.tensor([[before]], device=device), torch.tensor([digits], device=device)
    tens = model(first, kv_cache=kv_cache)[0].softmax(-1)[:, digits]                  # (1, 10)
    units = model(second, kv_cache=kv_cache, apart=True)[0].softmax(-1)[:, digits]    # (10, 10): p(b | a)
    kv_cache.truncate(P)
    return (tens.T * units).flatten().cpu()


def stream_text(tokenizer, ids):
    """Token ids as they come -> pieces of text (str, never empty) as early as they are certain.

    Joined, the pieces are tokenizer.decode(all ids). A character decodes to U+FFFD until its last token is
    there. So these are held back at the end of the text, until the ids end."""
    seen, text, sent = [], "", 0
    for token in ids:
        seen.append(token)
        text = tokenizer.decode(seen)   # from the start each time: a token's text depends on those before it
        whole = len(text.rstrip("\ufffd"))
        if whole > sent:
            yield text[sent:whole]
            sent = whole
    if text[sent:]:
        yield text[sent:]


# ---------------------------------------------------------------------------------------- tokenizers
class SentencePieceTokenizer:
    """The tokenizer of LLaMA 1 and 2: a sentencepiece model (Kudo and Richardson 2018, arXiv 1808.06226).

    bos_id, eos_id, vocab_size: int; stop_ids: set of int, the ids that end an answer; between: what a part of
    a prompt has to begin with for a space before it. This kind puts one before every text by itself. added:
    {text: id} of tokens that a folder adds to these."""
    between, added = "", {}

    def __init__(self, path):
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=bytes(map_file(path)))
        except (RuntimeError, UnicodeDecodeError):   # the latter from its message about a damaged piece
            raise UserError(f"{path}: not a whole sentencepiece model; download it again")
        self.bos_id, self.eos_id = self.model.bos_id(), self.model.eos_id()
        self.stop_ids, self.vocab_size = {self.eos_id}, self.model.vocab_size()

    def encode(self, text):
        """str -> list of int, without BOS and EOS; control tokens written out in the text are only text."""
        return self.model.encode(text)

    def decode(self, ids):
        """ids -> str, without that space. Control and added tokens have no text, bad UTF-8 is U+FFFD."""
        return self.model.decode([int(i) for i in ids if i < self.vocab_size])


# How LLaMA 3 cuts text before byte-pair merging, in regex's classes; the first rule that fits wins
LLAMA3_SPLIT = "|".join((
    r"'(?i:[sdmt]|ll|ve|re)",             # the end of a contraction: 's, 'LL
    r"[^\r\n\p{L}\p{N}]?\p{L}+",          # a word, with the one space or sign before it
    r"\p{N}{1,3}",                        # digits by threes, from the left
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",         # signs, with a space before and line ends after
    r"\s*[\r\n]+",                        # space up to the last line end
    r"\s+(?!\S)",                         # space, but for the one that belongs to the next word
    r"\s+"))


class TiktokenTokenizer:
    """The tokenizer of LLaMA 3: byte-pair ranks, `base64 rank` a line, and 256 special tokens after them.

    As SentencePieceTokenizer, but it adds no space."""
    between, added = " ", {}

    def __init__(self, path):
        try:
            lines = (line.split() for line in bytes(map_file(path)).splitlines())
            ranks = {base64.b64decode(word, validate=True): int(rank) for word, rank in lines}
        except ValueError as e:
            raise UserError(f"{path}: damaged list of byte-pair ranks ({e}); download it again")
        self.model = tiktoken.Encoding("", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={})
        self.words = n = len(ranks)
        self.bos_id, self.eos_id, self.vocab_size = n, n + 1, n + 256   # <|begin_of_text|>, <|end_of_text|>
        self.stop_ids = {self.eos_id, n + 9}                            # <|eot_id|>, the end of a turn

    def encode(self, text):
        return self.model.encode_ordinary(text)

    def decode(self, ids):
        return self.model.decode([int(i) for i in ids if i < self.words])


def load_tokenizer(path):
    """A tokenizer.model, or that of a folder, of the kind that its content says. Raises UserError."""
    path = tokenizer_path(path) if os.path.isdir(path) else path
    if not os.path.exists(path) and os.path.exists(os.path.join(os.path.dirname(path), "tokenizer.json")):
        raise UserError(f"{path}: missing; tokenizer.json is not read: add tokenizer.model from the page of "
                        "these weights, or of those they were tuned from (Llama 3: from its folder original)")
    start = map_file(path)[:4096]
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", start):
        return TiktokenTokenizer(path)
    if start[:1] == b"\n":   # a protobuf whose field 1, the pieces, comes first
        return SentencePieceTokenizer(path)
    raise UserError(f"{path}: neither a sentencepiece model nor byte-pair ranks; download it again")


def added_tokens(folder):
    """{text: id} of what a folder adds to the tokens of its tokenizer.model, as its JSON files say."""
    older, newer = (os.path.join(folder, name) for name in ("added_tokens.json", "tokenizer_config.json"))
    added, newest = (read_json(path) if os.path.exists(path) else {} for path in (older, newer))
    by_id = newest.get("added_tokens_decoder") or {}   # it may be null
    return added | {token["content"]: int(i) for i, token in by_id.items()}


def tokenizer_path(folder):
    """Where tokenizer.model is: beside the weights; in original/, as the pages of Llama 3 have it; or one
    folder up, as Meta released LLaMA 1 and 2."""
    places = ["", "original"] + [os.pardir] * is_meta(folder)
    files = [os.path.join(folder, place, "tokenizer.model") for place in places]
    return next(filter(os.path.exists, files), files[0])


# ---------------------------------------------------------------------------------------- weights
EXTRA = "model.mm_projector.", "mm_projector.", "model.vision_tower."   # what LLaVA stores beside its LLaMA
OLD = ".rotary_emb.inv_freq"                                            # in older files; recomputed
NOT_LLAMA = {   # of models that name their tensors alike and compute otherwise: what a LLaMA would say
    "hidden_act": "silu", "sliding_window": None, "no_rope_layers": [], **dict.fromkeys((
        "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling",
        "partial_rotary_factor"), 1)}
HF_CONFIG = {   # field of LLaMAConfig: key of config.json
    "width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "mlp": "intermediate_size", "norm_eps": "rms_norm_eps", "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim", "rope_theta": "rope_theta", "rope_scaling": "rope_scaling",
    "context_length": "max_position_embeddings", "tied": "tie_word_embeddings"}


def load_llama(folder):
    """A LLaMA, Vicuna or LLaVA, in Hugging Face's layout or Meta's -> (LLaMA, tokenizer, extra).

    The LLaMA adopts the tensors of the files as they are, mapped. extra: {name: tensor} of what LLaVA stores
    beside it. Raises UserError for a missing, additional or ill-sized tensor."""
    meta, tensors, extra = is_meta(folder), {}, {}
    description = os.path.join(folder, "params.json" if meta else "config.json")
    try:
        if meta:
            stated = read_json(description)
            tensors = read_meta(folder, stated)
            config = meta_config(stated, tensors)
        else:   # weights first: what they are says more than what a description lacks
            tensors = {name: t for name, t in read_tensors(folder).items() if not name.endswith(OLD)}
            extra = {name: tensors.pop(name) for name in list(tensors) if name.startswith(EXTRA)}
            for name, t in tensors.items():
                if not t.is_floating_point() and t.dtype.itemsize < 8:   # CLIP's position_ids have 8 bytes
                    raise UserError(f"{folder}: {QUANTISED} ({shown(name)} is {str(t.dtype)[6:]})")
            config = hf_config(read_json(description), tensors)
        layers = len({name.split(".")[2] for name in tensors if name.startswith("model.layers.")})
        if layers != config.layers:   # before anything is built: a description can claim a million
            raise UserError(f"{folder}: described as {config.layers:,} layers, but its weights have "
                            f"{layers:,}; is a file of it missing?")
        with shapes_only():
            model = LLaMA(config)
    except DAMAGE as e:
        strange = [name for name in tensors if "lora_" in name or not name.startswith(("model.", "lm_head."))]
        raise UserError(f"{description}: not a LLaMA ({type(e).__name__}: {shown(e)}); "
                        f"{likely_reason(strange)}")
    tokenizer = load_tokenizer(folder)
    tokenizer.added = added_tokens(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{folder}: {tokenizer.vocab_size} tokens in tokenizer.model, but "
                        f"{config.vocab_size} in the weights; they do not belong together")
    if config.tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    load_into(model, tensors, folder)
    model.tie()
    counts = collections.Counter(str(t.dtype)[6:] for t in tensors.values()).most_common()
    if len(counts) > 1:   # as norms in fp32
        parts = " and ".join(f"{count} in {dtype}" for dtype, count in counts)
        warnings.warn(f"{folder}: of its tensors {parts}; all are converted to one precision")
    return model, tokenizer, extra


def hf_config(stated, tensors):
    """config.json -> LLaMAConfig. Raises ValueError for what would change the arithmetic, or one of DAMAGE.

    embed_tokens says how large the vocabulary is: it grows when tokens are added."""
    stated = {key: value for key, value in stated.items() if value is not None}   # null: the default
    for key, usual in NOT_LLAMA.items():
        if stated.get(key, usual) != usual:
            raise ValueError(f"its {key} is {stated[key]!r}, that of a LLaMA is {usual!r}")
    rope = stated.get("rope_parameters") or stated.get("rope_scaling") or {}   # transformers 5 or older
    rope = {key: value for key, value in rope.items() if value is not None}
    theta = rope.pop("rope_theta", stated.get("rope_theta", 1e4))
    stated = {"rms_norm_eps": 1e-6, **stated, "rope_theta": theta, "rope_scaling": rope or None}
    fields = {field: stated[key] for field, key in HF_CONFIG.items() if key in stated}
    fields["tied"] = bool(fields.get("tied")) and "lm_head.weight" not in tensors
    return LLaMAConfig(len(tensors["model.embed_tokens.weight"]), **fields)


# Meta's folder: params.json and consolidated.00.pth, .01, ...: every file holds a slice of every matrix
META = {   # name in Meta's files: Hugging Face's, and the dimension that is sliced (None: each has the whole)
    "tok_embeddings": ("embed_tokens", 1), "norm": ("norm", None), "output": ("lm_head", 0),
    "attention.wq": ("self_attn.q_proj", 0), "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0), "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0), "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0), "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None)}


def is_meta(folder):
    return os.path.exists(os.path.join(folder, "params.json")) and \
        not os.path.exists(os.path.join(folder, "config.json"))   # some of Hugging Face's have both


def read_meta(folder, params):
    """Meta's folder of a LLaMA 1, 2 or 3 -> {Hugging Face name: tensor}. Raises UserError, or one of DAMAGE.

    A single shard stays a memory map but for queries and keys, 2 GB of a 7B. Several are joined, a copy."""
    files = sorted(glob.glob(os.path.join(glob.escape(folder), "consolidated.??.pth")))
    shards = [read_file(file) for file in files or [os.path.join(folder, "consolidated.00.pth")]]
    D, head_dim, tensors = params["dim"], params["dim"] // params["n_heads"], {}
    for name in shards[0]:
        part = re.sub(r"^layers\.\d+\.|\.weight$", "", name)
        new, dim = META.get(part, (part, None))
        slices = [shard[name] for shard in shards]
        if part == "tok_embeddings" and slices[0].shape[1] == D:
            dim = 0   # LLaMA 3 slices its words, not their width
        t = slices[0] if len(slices) == 1 or dim is None else torch.cat(slices, dim)
        if part in ("attention.wq", "attention.wk"):
            t = halves_from_pairs(t, head_dim)
        tensors["model." * (part != "output") + name.replace(part, new)] = t
    tensors.pop("model.rope.freqs", None)   # recomputed
    return tensors


def halves_from_pairs(weight, d):
    """Rows of queries or keys (heads * d, D) in Meta's order -> in ours: of each head the even rows first.

    Meta turns the pairs (x_2i, x_2i+1), `rotate` the pairs (x_i, x_{i+d/2}): the same arithmetic."""
    return weight.view(-1, d // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def meta_config(params, tensors):
    """params.json -> LLaMAConfig. Raises one of DAMAGE. The length of the context stands nowhere.

    LLaMA 1 reads 2048 tokens, 2 reads 4096, 3 (larger rope_theta) 8192, 3.1 (use_scaled_rope) 131072, and
    CodeLlama (rope_theta 1e6) 16384. 1 has a norm_eps of 1e-6; only its 65B is 8192 wide without shared KV
    heads. Positions are stretched by 8 in 3.1 and, as unstated, by 32 in the 1B and 3B of 3.2."""
    D, kv_heads, scaled = params["dim"], params.get("n_kv_heads"), params.get("use_scaled_rope")
    theta, eps = params.get("rope_theta", 1e4), params["norm_eps"]
    stretch = {"rope_type": "llama3", "factor": 32.0 if D in (2048, 3072) else 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    first = eps < 5e-6 or (D == 8192 and kv_heads is None)
    return LLaMAConfig(
        len(tensors["model.embed_tokens.weight"]), D, params["n_layers"], params["n_heads"], kv_heads,
        len(tensors["model.layers.0.mlp.gate_proj.weight"]), rope_theta=theta, norm_eps=eps,
        rope_scaling=stretch if scaled else None,
        context_length=(131072 if scaled else 16384 if theta == 1e6 else 8192 if theta > 1e4 else
                        2048 if first else 4096))


def save_llama(folder, model, tokenizer_model_path, extra={}, dtype=torch.float16, config_extra={}):
    """Writes what load_llama reads: config.json, model.safetensors, tokenizer.model, each atomically.

    extra: {name: tensor}, names as in EXTRA; with an mm_projector in it the folder says that it is a LLaVA.
    config_extra: more entries of config.json (mm_hidden_size, ...). Raises UserError."""
    c, tokenizer = model.config, load_tokenizer(tokenizer_model_path)
    words = bytes(map_file(tokenizer_model_path))   # before the folder is written: it may lie there
    is_llava = any("mm_projector." in name for name in extra)
    settings = {
        "architectures": ["LlavaLlamaForCausalLM" if is_llava else "LlamaForCausalLM"],
        "model_type": "llava" if is_llava else "llama", "hidden_act": "silu", "vocab_size": c.vocab_size,
        "torch_dtype": str(dtype).removeprefix("torch."), "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        **{key: getattr(c, field) for field, key in HF_CONFIG.items()}, **config_extra}
    tensors = {name: t for name, t in model.state_dict().items() if not (c.tied and name == "lm_head.weight")}
    tensors = {name: t.to(dtype) for name, t in (tensors | extra).items()}
    text = json.dumps(settings, indent=2) + "\n"
    make_folder(folder)
    write_safetensors(os.path.join(folder, "model.safetensors"), tensors, {"format": "pt"})
    write_atomic(os.path.join(folder, "tokenizer.model"), lambda f: f.write(words))
    write_atomic(os.path.join(folder, "config.json"), lambda f: f.write(text.encode()))


# ---------------------------------------------------------------------------------------- LoRA
ADAPTED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
           "mlp.up_proj", "mlp.down_proj")   # Linears of a layer that LoRA may change; lm_head is none
PEFT = re.compile(r"\.lora_([AB])(\.default)?\.weight$")   # names in its files; .default. in training
ARITHMETIC = (   # settings of peft with which W + alpha / r * B A is not what was trained
    "bias", "fan_in_fan_out", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save",
    "lora_bias", "layer_replication", "trainable_token_indices", "target_parameters")


class LoRALinear(nn.Module):
    """A Linear that is frozen, and what it learns: base(x) + alpha / r * B A dropout(x) (Hu et al. 2021,
    arXiv 2106.09685). A (r, K) is drawn as for any Linear and B (N, r) is zero: it begins as its base."""
    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__()
        (N, K), device = base.weight.shape, base.weight.device
        self.base, self.alpha, self.dropout = base, alpha, nn.Dropout(dropout)
        self.lora_A = nn.Linear(K, rank, bias=False, device=device)   # fp32, whatever the base is
        self.lora_B = nn.Linear(rank, N, bias=False, device=device)
        nn.init.zeros_(self.lora_B.weight)
        self.train(base.training)

    @property
    def change(self):
        """-> alpha / r, A (r, K), B (N, r), as `merged` takes them."""
        A, B = self.lora_A.weight, self.lora_B.weight
        return self.alpha / len(A), A, B

    def forward(self, x):
        scale, A, _ = self.change
        return self.base(x) + (scale * self.lora_B(self.lora_A(self.dropout(x.to(A.dtype))))).to(x.dtype)


@torch.no_grad()
def merged(weight, changes):
    """weight (N, K), changes [(scale, A (r, K), B (N, r))] -> W + sum of scale * B A, in the dtype of W.

    All is added in fp32 and rounded once. A call for each change rounds in between, as peft does."""
    if not changes:
        return weight
    result = torch.empty_like(weight)
    for at in range(0, len(weight), 256):   # as floats these rows stay in a CPU's cache: three times as fast
        rows = weight[at:at + 256].float()
        for scale, A, B in changes:
            rows += scale * (B[at:at + 256].float() @ A.float())
        result[at:at + 256] = rows
    return result


def layer_linears(model):
    """{name in a LLaMA: its Linear, or the LoRALinear in its place}, without lm_head."""
    return {f"model.layers.{i}.{part}": block.get_submodule(part)
            for i, block in enumerate(model.model.layers) for part in ADAPTED}


def add_lora(model, rank=64, alpha=128, dropout=0.0, adapter=None):
    """Freezes a LLaMA and puts LoRALinears into its layers. -> model

    adapter: an Adapter to go on with, where there is one, at its own rank and alpha."""
    model.requires_grad_(False)
    for name, linear in layer_linears(model).items():
        if adapter is None:
            model.set_submodule(name, LoRALinear(linear, rank, alpha, dropout))
        elif name in adapter.changes:
            scale, A, B = adapter.changes[name]
            model.set_submodule(name, lora := LoRALinear(linear, len(A), scale * len(A), dropout))
            lora.lora_A.weight.data.copy_(A)
            lora.lora_B.weight.data.copy_(B)
    return model


@dataclass
class Adapter:
    """What LoRA has learned for a LLaMA, as it lies in a folder."""
    changes: dict   # {name of a Linear: (alpha / r, A (r, K), B (N, r))}, mapped
    extra: dict     # {name: tensor} of a projector that was trained along


def read_adapter(folder, model, own_name=None):
    """peft's folder: adapter_config.json, adapter_model.safetensors or .bin -> Adapter for this LLaMA. Warns
    where the frozen one had another name than this, `own_name`.

    Raises UserError for what does not fit or is not plain LoRA, with the first offender."""
    description, along, *files = (os.path.join(folder, file) for file in (
        "adapter_config.json", "non_lora_trainables.bin", "adapter_model.safetensors", "adapter_model.bin"))
    stated, file = read_json(description), next(filter(os.path.exists, files), files[-1])
    r, alpha, base = map(stated.get, ("r", "lora_alpha", "base_model_name_or_path"))
    if not isinstance(r, int) or not isinstance(alpha, (int, float)) or r < 1:
        raise UserError(f"{description}: not that of LoRA: r is {shown(r)}, lora_alpha {shown(alpha)}")
    for key in ARITHMETIC:
        if stated.get(key) not in (None, False, {}, [], "none"):
            raise UserError(f"{description}: {key} is {shown(stated[key])}; only plain LoRA is read")
    one, other = (os.path.basename(os.path.normpath(str(path))).lower() for path in (own_name, base))
    if own_name and base and one != other:
        warnings.warn(f"{folder}: trained on {shown(base)}, not on {shown(own_name)}: answers may be wrong")
    tensors = {PEFT.sub(r".lora_\1", name): t for name, t in read_file(file).items()}
    changes, wanted = {}, {}
    for name, linear in layer_linears(model).items():
        A, B = f"{name}.lora_A", f"{name}.lora_B"
        if A in tensors or B in tensors:
            N, K = linear.weight.shape
            wanted |= {A: (r, K), B: (N, r)}
            changes[name] = alpha / r, tensors.get(A), tensors.get(B)
    check_fit(wanted, tensors, file, "is it an adapter for another LLaMA?")
    extra = read_file(along) if os.path.exists(along) else {}
    if strange := [key for key in extra if not key.startswith(EXTRA)]:
        raise UserError(f"{along}: {shown(strange[0])} is neither LoRA nor a projector; not read")
    return Adapter(changes, extra)


def save_adapter(folder, model, base="", dropout=0.0):
    """Writes what the LoRALinears of a model have learned as read_adapter, and peft, read it.

    base: what the frozen LLaMA is called. dropout: of training, only noted down. Raises UserError."""
    loras = {name: m for name, m in layer_linears(model).items() if isinstance(m, LoRALinear)}
    one, tensors = next(iter(loras.values())), {}
    for name, lora in loras.items():
        for half, t in zip("AB", lora.change[1:]):
            tensors[f"base_model.model.{name}.lora_{half}.weight"] = t
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "bias": "none",
        "r": one.lora_A.out_features, "lora_alpha": one.alpha, "lora_dropout": dropout,
        "target_modules": sorted({name.rpartition(".")[2] for name in loras}), "fan_in_fan_out": False,
        "modules_to_save": None, "inference_mode": True}
    text = json.dumps(settings, indent=2) + "\n"
    make_folder(folder)
    write_safetensors(os.path.join(folder, "adapter_model.safetensors"), tensors, {"format": "pt"})
    write_atomic(os.path.join(folder, "adapter_config.json"), lambda f: f.write(text.encode()))
