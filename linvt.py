"""LinVT (arXiv 2412.05185): of the tokens of a long video, the few that answer a question.

A language model that reads one picture gets M rows, each a weighted average of image tokens:

    y = W(x, question) vec(x),   W (M, T*N) >= 0, every row of W sums to 1

The network makes W, and nothing else. What W averages is x itself: no matrix, bias or norm stands on
that path. So y stays among the tokens that the language model knows, and averages commute with affine
maps: before a linear projector or behind it, the result is the same.

The principle and the names SVR and TTA are the paper's, the layers are ours: docs/paper-vs-code.md.

Shapes: B videos, T units (frames, or short windows of frames), N tokens a unit, D their width, M queries,
L words, k kept tokens, w the width inside. Token (t, n) has the number t * N + n.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from plumbing import weightfile
from plumbing.cli import UserError


class Attention(nn.Module):
    """Multi-head attention of x to y: softmax(q k^T / sqrt(head width)) v, heads side by side."""
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)   # a softmax does not see a bias of its keys
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, y, mask=None):
        """x (B, L, w), y (B, S, w) -> (B, L, w). mask (B, S) bool: what of y is seen."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2)   # (B, heads, L or S, w / heads)
                   for t in (self.q_proj(x), self.k_proj(y), self.v_proj(y)))
        x = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None])
        return self.out_proj(x.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Pre-norm: x + attention to y, or to x itself, then x + MLP. A new one is the identity."""
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        for last in (self.attn.out_proj, self.mlp[-1]):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x, y=None, mask=None):
        z = self.norm1(x)
        x = x + self.attn(z, z if y is None else y, mask)
        return x + self.mlp(self.norm2(x))


class LinVT(nn.Module):
    """Weights for the tokens of a video, by four terms under one softmax over the tokens:

    a  query times key of the token's unit      b  a learned number for each query and place
    c  query times key of the token itself      d  log sigmoid(the token's score)

    With a and b alone W[m, (t, n)] = unit_m[t] * place_m[n]: it chooses units and keeps their pictures.
    content: adds c, which can choose patches. top_k: a scorer that does not know the question keeps so
    many tokens, and d is its only gradient; None: all are kept, d is 0. queries: M; None: N, a picture's
    worth. max_units: rows of the table of times, which is stretched for longer videos.

    The start decides whether it trains: mean pooling, weighted by how well a unit matches the question."""
    def __init__(self, dim, tokens, queries=None, width=64, heads=4, layers=1, top_k=1024, max_units=64,
                 content=False):
        super().__init__()
        M, self.heads, self.top_k = queries or tokens, heads, top_k

        def table(rows):
            return nn.Parameter(0.02 * torch.randn(rows, width))

        def stack():
            return nn.ModuleList(Layer(width, heads) for _ in range(layers))
        # image tokens and words are read by one matrix: the projector has put them into one space
        self.norm_in, self.proj_in = nn.LayerNorm(dim), nn.Linear(dim, width, bias=False)
        self.time_embed, self.place_embed = table(max_units), table(tokens)
        # SVR: attention within a unit, then along time at each place
        self.space, self.time = stack(), stack()
        self.score = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1)) if top_k else None
        # TTA: queries attend to each other, to the kept tokens, to the words
        self.query, self.null_word = table(M), table(1)
        self.own, self.visual, self.words = stack(), stack(), stack()
        for layer in self.words:   # a query begins as the mean of the words
            for linear in (layer.attn.v_proj, layer.attn.out_proj):
                nn.init.eye_(linear.weight)
                nn.init.zeros_(linear.bias)
        self.norm_query, self.w_query = nn.LayerNorm(width), diagonal(width, 2)
        self.norm_unit, self.w_unit = nn.LayerNorm(width, bias=False), diagonal(width, 1)
        self.norm_token, self.w_token = nn.LayerNorm(width), diagonal(width, 0) if content else None
        # a query has 99.5 % of its weight on a place of its own, so that its row looks like a patch
        own = torch.arange(M)[:, None] * tokens // M == torch.arange(tokens)   # (M, N)
        self.place = nn.Parameter(own * math.log(186 * max(tokens - 1, 1)))    # 8.0 for 17 tokens

    def read(self, x):
        """What does not depend on the question: x (B, T, N, D) -> h (B, T, N, w)."""
        B, T, N, _ = x.shape
        times = self.time_embed
        if T > len(times):   # straight lines between the rows that there are
            times = F.interpolate(times.T[None], T, mode="linear", align_corners=True)[0].T
        h = self.proj_in(self.norm_in(x)) + times[:T, None] + self.place_embed
        for space, time in zip(self.space, self.time):
            h = space(h.flatten(0, 1)).unflatten(0, (B, T))       # sequences (B*T, N, w), then (B*N, T, w)
            h = time(h.transpose(1, 2).flatten(0, 1)).unflatten(0, (B, N)).transpose(1, 2)
        return h

    def select(self, h):
        """h (B, T*N, w) -> kept (B, k) int64: tokens with the highest scores, in rising order; their term d
        (B, k) fp32. In training the scores get Gumbel noise, so that other tokens have a chance."""
        if self.score is None:
            kept = torch.arange(h.shape[1], device=h.device).expand(len(h), -1)
            return kept, torch.zeros_like(kept, dtype=torch.float32)
        score = self.score(h)[..., 0].float()
        noisy = score - torch.empty_like(score).exponential_().log() if self.training else score
        kept = noisy.topk(min(self.top_k, h.shape[1])).indices.sort().values
        return kept, F.logsigmoid(score.gather(1, kept))

    def ask(self, h, text, mask):
        """Kept tokens h (B, k, w), text (B, L, D), mask (B, L) bool -> queries (B, M, w). In training one
        question in ten is hidden: the null word learns what to show without one."""
        t = self.proj_in(self.norm_in(text))
        if self.training:
            mask = mask & (torch.rand(len(mask), 1, device=mask.device) > 0.1)
        t = torch.cat([self.null_word.expand(len(t), 1, -1), t], dim=1)   # always seen: never no word at all
        mask, q = F.pad(mask, (1, 0), value=True), self.query.expand(len(t), -1, -1)
        for own, visual, words in zip(self.own, self.visual, self.words):
            q = words(visual(own(q), h), t, mask)
        return q

    def weigh(self, x, text, mask):
        """x (B, T, N, D); the question's words: text (B, L, D), mask (B, L) bool, False for padding -> kept
        (B, k) int64: the tokens that count, in rising order; weights (B, M, k) fp32, whose rows sum to 1."""
        h, N = self.read(x), x.shape[2]
        units = self.w_unit(self.norm_unit(h.mean(2)))                                 # (B, T, w)
        kept, d = self.select(h.flatten(1, 2))
        h = self.norm_token(h.flatten(1, 2).take_along_dim(kept[..., None], 1))        # (B, k, w)
        q = self.w_query(self.norm_query(self.ask(h, text, mask))) / h.shape[-1] ** 0.5
        a = (q @ units.mT).float().take_along_dim((kept // N)[:, None], 2)             # (B, M, k)
        b = self.place.float()[:, kept % N].transpose(0, 1)
        c = 0 if self.w_token is None else (q @ self.w_token(h).mT).float()
        return kept, (a + b + c + d[:, None]).softmax(-1)

    def forward(self, x, text, mask, values=None):
        """As weigh; values (B, T, N, V): what is averaged, None for x -> (B, M, V), in the dtype of values.
        One unit passes as it is, (B, N, V)."""
        values = x if values is None else values
        if x.shape[1] == 1:
            return values[:, 0]
        kept, weights = self.weigh(x, text, mask)
        return weights.to(values.dtype) @ values.flatten(1, 2).take_along_dim(kept[..., None], 1)


def diagonal(width, scale):
    """A new matrix: the identity, times scale."""
    linear = nn.Linear(width, width, bias=False)
    nn.init.eye_(linear.weight)
    linear.weight.data *= scale
    return linear


# ----------------------------------------------------------------------------- linvt.bin
def load_linvt(path, tokens, dim):
    """A linvt.bin -> LinVT for units of `tokens` rows of `dim` numbers each. Raises UserError.

    Sizes are those of its tensors; metadata tells what no size does: heads, and how many tokens are kept."""
    tensors, about = weightfile.read_file(path), weightfile.read_metadata(path)
    try:
        (M, N), (width, D), (max_units, _) = (
            tensors[name].shape for name in ("place", "proj_in.weight", "time_embed"))
        heads, top_k = int(about["heads"]), int(about["top_k"])
        if heads < 1 or width % heads or top_k < 0:
            raise ValueError(f"{heads} heads for a width of {width}")
    except weightfile.DAMAGE as e:
        reason = f"{type(e).__name__}: {weightfile.shown(e)}; {weightfile.likely_reason(tensors)}"
        raise UserError(f"{path}: holds no LinVT ({reason})")
    if (N, D) != (tokens, dim):
        raise UserError(f"{path}: made for {N} tokens of {D} numbers, and here are {tokens} of {dim}; it "
                        "belongs to another LLaMA or kind of video tokens")
    layers = len({name.split(".")[1] for name in tensors if name.startswith("space.")})
    with weightfile.shapes_only():
        linvt = LinVT(D, N, M, width, heads, layers, top_k or None, max_units,
                      content="w_token.weight" in tensors)
    return weightfile.load_into(linvt, tensors, path)


def save_linvt(path, linvt):
    """Writes a linvt.bin, in fp16."""
    tensors = {name: t.detach().cpu().half() for name, t in linvt.state_dict().items()}
    weightfile.write_safetensors(path, tensors, {"heads": str(linvt.heads), "top_k": str(linvt.top_k or 0)})
