"""BT-Adapter (arXiv 2309.15785): a branch with temporal attention beside a frozen CLIP, and the chat on top.

First half: the branch, the video encoder, the three losses of pretraining. Second half: kinds of video
tokens, prompts, the chat model, files of weights. Layers, names and formulas are those of the released code
(github.com/farewellthree/BT-Adapter, commit 393b4b8); docs/paper-vs-code.md lists where the paper differs.

Shapes: B videos, T frames, N patches a frame, n of them visible under a mask, D width, P projection, S text
length. A video is (B, T, 3, H, W) uint8. The branch holds (B, 1 + n*T, D): one CLS token for the whole video,
then the patches, position by position, each position's T frames side by side.
"""
import dataclasses
import functools
import itertools
import math
import os
import re
import warnings

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import llm
from clip import MLP, Attention, load_clip, read_clip
from linvt import LinVT, load_linvt
from plumbing import quant, weightfile
from plumbing.cli import UserError
from plumbing.pictures import THUMBNAIL
from plumbing.store import state_of
from plumbing.training import leave_signals_to_the_parent

LAST_GATE, MIDDLE_GATE = 1e4, 1e2   # the gates' fixed multipliers: a tiny learning rate decides quickly


# ------------------------------------------------------------------------------------------------- the branch
def drop_path(x, p, training):
    """Stochastic depth: zeroes whole rows (dim 0) with probability p and scales the others by 1 / (1 - p)."""
    if p == 0 or not training:
        return x
    kept = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= p
    return x * kept / (1 - p)


class TemporalLayer(nn.Module):
    """Attention along time (Eq. 2): a patch sees those at its own place in all frames. CLS passes by."""
    def __init__(self, width, heads, p):
        super().__init__()
        self.p = p
        self.layer_norm1 = nn.LayerNorm(width)
        self.self_attn = Attention(width, heads)
        self.temporal_fc = nn.Linear(width, width)
        nn.init.zeros_(self.temporal_fc.weight)   # at step 0 the layer is the identity
        nn.init.zeros_(self.temporal_fc.bias)

    def forward(self, x, T):
        """x (B, 1 + n*T, D) -> same shape."""
        cls, patches = x[:, :1], x[:, 1:]
        y = patches.reshape(-1, T, x.shape[-1])   # (B*n, T, D): each patch looks along time
        y = self.temporal_fc(drop_path(self.self_attn(self.layer_norm1(y)), self.p, self.training))
        return torch.cat([cls, patches + y.reshape(patches.shape)], dim=1)


class SpatialLayer(nn.Module):
    """A CLIP layer within each frame. The video's CLS joins all frames, and averages what it gathers."""
    def __init__(self, width, heads, mlp_width, p):
        super().__init__()
        self.p = p
        self.self_attn = Attention(width, heads)
        self.layer_norm1 = nn.LayerNorm(width)
        self.mlp = MLP(width, mlp_width)
        self.layer_norm2 = nn.LayerNorm(width)

    def forward(self, x, T):
        """x (B, 1 + n*T, D) -> same shape."""
        B, L, D = x.shape
        cls = x[:, :1].repeat_interleave(T, dim=0)                                   # (B*T, 1, D)
        patches = x[:, 1:].view(B, -1, T, D).transpose(1, 2).reshape(B * T, -1, D)   # (B*T, n, D): by frame
        y = self.layer_norm1(torch.cat([cls, patches], dim=1))                       # (B*T, 1+n, D)
        y = drop_path(self.self_attn(y), self.p, self.training).view(B, T, -1, D)    # (B, T, 1+n, D)
        patches = y[:, :, 1:].transpose(1, 2).reshape(B, L - 1, D)
        x = x + torch.cat([y[:, :, 0].mean(1, keepdim=True), patches], dim=1)
        return x + self.mlp(self.layer_norm2(x))


def divided_attention(x, temporal, spatial, T):
    """x (B, 1 + n*T, D) -> same shape: first along time, then within frames."""
    return spatial(temporal(x, T), T)


class Branch(nn.Module):
    """K temporal and spatial layers that read the outputs of K consecutive CLIP layers; names as released.

    gated: learnable gates mix the branch with CLIP; without them the two are summed. checkpointed: in
    training, a layer's inner activations are computed again when the gradient needs them."""
    def __init__(self, width=1024, heads=16, mlp_width=4096, depth=4, gated=True, num_positions=64,
                 drop_path=0.0, checkpointed=False):
        super().__init__()
        self.checkpointed = checkpointed
        rates = [drop_path * j / max(1, depth - 1) for j in range(depth)]   # deeper layers more often
        self.btadapter_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        # std 1, as released: rows beyond the frames of pretraining stay random, and are saved
        self.btadapter_time_embed = nn.Embedding(num_positions, width)
        self.btadapter_T_layers = nn.ModuleList(TemporalLayer(width, heads, p) for p in rates)
        self.btadapter_S_layers = nn.ModuleList(SpatialLayer(width, heads, mlp_width, p) for p in rates)
        # zero: both sides count half at first. fp32 under AMP too: their changes are far below half precision
        self.balance1 = nn.Parameter(torch.zeros(width)) if gated else None
        self.balance2 = nn.Parameter(torch.zeros(width)) if gated else None

    @classmethod
    def beside(cls, clip, depth=4, **options):
        """A new branch for this CLIP: a spatial layer starts as a copy of the layer that it reads."""
        c = clip.config
        branch = cls(c.vision_width, c.vision_heads, c.vision_mlp, depth, **options)
        sources = clip.vision_model.encoder.layers[-depth:]
        for layer, source in zip(branch.btadapter_S_layers, sources, strict=True):
            layer.load_state_dict({name: t.float().clone() for name, t in source.state_dict().items()})
        return branch

    @property
    def depth(self):
        return len(self.btadapter_S_layers)

    def forward(self, states, position_embedding, kept=None):
        """states: the outputs of K CLIP layers, each (B, T, 1+n, D). position_embedding: CLIP's own (1+N, D).
        kept: (B, n), which patches these are; None for all N -> the outputs of K layers (B, 1 + n*T, D).

        More frames than time positions are averaged in groups of neighbours first."""
        times, places = self.btadapter_time_embed.weight, position_embedding[1:]   # (64, D), (N, D)
        if kept is not None:
            places = places[kept][:, None]                                          # (B, 1, n, D)
        group = -(-states[0].shape[1] // len(times))
        layer = divided_attention
        if self.checkpointed and self.training:
            layer = functools.partial(checkpoint, divided_attention, use_reentrant=False)
        outputs, layers = [], zip(states, self.btadapter_T_layers, self.btadapter_S_layers, strict=True)
        for j, (state, temporal, spatial) in enumerate(layers):
            state = average_frames(state, group)   # (B, T', 1+n, D)
            T = state.shape[1]
            if j == 0:   # places and times are marked once, at the entrance (Eq. 3)
                start = self.btadapter_cls_token[0] + position_embedding[0]         # (1, D)
                patches = state[:, :, 1:] + places + times[:T, None]                # (B, T', n, D)
                x = to_branch((state[:, :, 0].mean(1) + start) / 2, patches)
            else:
                x = mix(x, to_branch(state[:, :, 0].mean(1), state[:, :, 1:]), self.balance2, MIDDLE_GATE)
            x = layer(x, temporal, spatial, T)      # (B, 1 + n*T, D)
            outputs.append(x)
        return outputs


def average_frames(state, group):
    """(B, T, L, D) -> (B, ceil(T / group), L, D): means of neighbours; the last frame fills up."""
    if group == 1:
        return state
    state = torch.cat([state, state[:, -1:].expand(-1, -state.shape[1] % group, -1, -1)], dim=1)
    return state.unflatten(1, (-1, group)).mean(2)


def to_branch(cls, patches):
    """cls (B, D), patches (B, T, n, D) -> (B, 1 + n*T, D) in the branch's order."""
    return torch.cat([cls[:, None], patches.transpose(1, 2).flatten(1, 2)], dim=1)


def mix(branch, backbone, balance, multiplier):
    """Gated: (1 - w) branch + w backbone, w = sigmoid(multiplier * balance) (D,) (Eq. 4); or the sum."""
    if balance is None:
        return branch + backbone
    w = torch.sigmoid(multiplier * balance.float()).to(branch.dtype)
    return (1 - w) * branch + w * backbone


def tube_mask(B, N, mask_ratio, generator=None):
    """-> kept (B, n) int64, sorted: patches visible in every frame; n = N - int(mask_ratio * N)."""
    order = torch.rand(B, N, generator=generator).argsort(1)
    return order[:, : N - int(mask_ratio * N)].sort(1).values


# ------------------------------------------------------------------------------------------ the video encoder
def pick(state, index):
    """state (B, L, D), index (B, n) -> (B, n, D): each row's own tokens."""
    return state[torch.arange(len(state), device=state.device)[:, None], index]


def frames_at_once(config, device):
    """How many frames CLIP sees together. A GPU wants many. On a CPU a layer's widest activations stay at 20
    MB in fp32, 4 frames for ViT-L/14: more fit into no cache, and from 32 MB on every tensor is new memory
    from the kernel. 16 frames at once take 1.15 times as long a frame, 24 take 1.6 times."""
    if device.type != "cpu":
        return 128
    return max(1, min(128, (5 << 20) // ((1 + config.patch_tokens) * config.vision_mlp)))


@torch.no_grad()
def backbone_states(clip, video, depth, skip_last=0, kept=None):
    """video (B, T, 3, H, W) uint8 -> (B, T, 1+n, D) of each of `depth` layers before the last `skip_last`.

    CLIP sees every patch; of what it says, only CLS and the patches in `kept` (B, n) stay; None: all N.
    Frames go through a few at a time, so that activations never pile up."""
    last, T = clip.config.vision_layers - skip_last, video.shape[1]
    at_once = frames_at_once(clip.config, video.device)
    layers = [[] for _ in range(depth)]
    if kept is not None:   # the same patches in every frame of a clip
        visible = F.pad(kept + 1, (1, 0)).repeat_interleave(T, dim=0).split(at_once)   # (frames, 1+n); 0: CLS
    chunks = tqdm(video.flatten(0, 1).split(at_once), "CLIP", leave=False, disable=None, delay=2)
    for c, frames in enumerate(chunks):                                                # (frames, 3, H, W)
        states = itertools.islice(clip.image_states(frames), last - depth + 1, last + 1)
        for layer, state in zip(layers, states):
            layer.append(state if kept is None else pick(state, visible[c]))
    return [torch.cat(layer).unflatten(0, video.shape[:2]) for layer in layers]


def place_embedding(clip):
    """CLIP's own (1+N, D): the branch marks its places with it."""
    return clip.vision_model.embeddings.position_embedding.weight


class VideoEncoder(nn.Module):
    """Frozen CLIP with a branch beside its last layers: a video as one vector of CLIP's space."""
    def __init__(self, clip, branch):
        super().__init__()
        self.clip, self.branch = clip.requires_grad_(False), branch

    def feature(self, states, kept=None):
        """Of backbone_states -> video_feature (B, P), not normalised; last branch tokens (B, 1 + n*T, D)."""
        tokens = self.branch(states, place_embedding(self.clip), kept)[-1]
        cls = mix(tokens[:, :1], states[-1][:, :, 0], self.branch.balance1, LAST_GATE)   # (B, T, D): Eq. 5
        return self.clip.project_image(cls).mean(1), tokens

    def forward(self, video):
        """video (B, T, 3, H, W) uint8 -> (B, P) of the branch; (B, P) of mean-pooled CLIP, the baseline of
        every table: its image features, averaged over frames. Neither is normalised."""
        states = backbone_states(self.clip, video, self.branch.depth)
        return self.feature(states)[0], self.clip.project_image(states[-1][:, :, 0]).mean(1)

    def encode_video(self, video):
        """video (B, T, 3, H, W) uint8 -> (B, P), not normalised."""
        return self(video)[0]


@torch.no_grad()
def encode_videos(encoder, dataset, device, batch_size=16, workers=0, amp=False):
    """Each video of a data set once -> ({name: its row}; normalised features, on the CPU in fp32, of the
    branch (V, P) and of mean-pooled CLIP (V, P); messages of broken videos, where the data set skips them).

    Under torchrun each process takes a share, all have the whole. Raises UserError if none can be read."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    first = {}   # name: the first item with that video
    for i, video in enumerate(dataset.videos):
        first.setdefault(video, i)
    loader = DataLoader(dataset, batch_size, sampler=list(first.values())[rank::size], num_workers=workers,
                        collate_fn=data.collate_skip, worker_init_fn=leave_signals_to_the_parent)
    rows, broken, was_training = [], [], encoder.training
    encoder.eval()
    with torch.autocast(device.type, torch.float16, enabled=amp and device.type == "cuda"):
        for batch in tqdm(loader, desc="encode", leave=False, disable=rank > 0):
            broken += batch["skipped"]
            if len(batch["index"]):
                branch, mean = encoder(batch["pixels"].to(device))   # (B, P) each
                rows.append((torch.tensor(batch["index"]), branch.float().cpu(), mean.float().cpu()))
    encoder.train(was_training)
    if size > 1:
        shares = [None] * size
        dist.all_gather_object(shares, (rows, broken))
        rows, broken = ([item for share in shares for item in share[k]] for k in (0, 1))
    if not rows:
        raise UserError(f"none of {len(first)} videos can be read; the first: {broken[0]}")
    index, branch, mean = (torch.cat(column) for column in zip(*rows))
    index, order = index.sort()
    branch, mean = F.normalize(branch[order], dim=-1), F.normalize(mean[order], dim=-1)
    return {dataset.videos[i]: row for row, i in enumerate(index)}, branch, mean, broken


@torch.no_grad()
def encode_texts(encoder, tokenizer, texts, length, device, amp=False):
    """-> normalised features (Q, P), on the CPU in fp32; length: tokens of a text that are read, at most."""
    length = min(length, encoder.clip.config.context_length)
    with torch.autocast(device.type, torch.float16, enabled=amp and device.type == "cuda"):
        rows = [encoder.clip.encode_text(tokenizer(texts[i:i + 256], length).to(device)).float().cpu()
                for i in range(0, len(texts), 256)]
    return F.normalize(torch.cat(rows), dim=-1)


def encode_pairs(encoder, tokenizer, dataset, device, batch_size=16, workers=0, amp=False):
    """-> normalised features, a row for each pair of video and caption: of the branch (Q, P), of mean-pooled
    CLIP (Q, P), of the captions (Q, P). See encode_videos."""
    row, branch, mean, _ = encode_videos(encoder, dataset, device, batch_size, workers, amp)
    owner = [row[video] for video in dataset.videos]
    return branch[owner], mean[owner], encode_texts(encoder, tokenizer, dataset.captions, 77, device, amp)


# ------------------------------------------------------------------------------------------- the three losses
class GatherFeatures(torch.autograd.Function):
    """All ranks' rows, in rank order. Every rank computes the same loss from them, so its own rows carry its
    share of the gradient; times the number of ranks, because DDP will average where the global batch needs
    the sum."""
    @staticmethod
    def forward(ctx, x):
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, grad):
        return grad.chunk(dist.get_world_size())[dist.get_rank()] * dist.get_world_size()


def gather(x):
    """(B, P) of this process -> (B * processes, P)."""
    return GatherFeatures.apply(x) if dist.is_initialized() and dist.get_world_size() > 1 else x


def contrastive_loss(video, text, temperature=0.01):
    """video, text (B, P), row i to row i -> InfoNCE over cosines, both directions *summed* as released."""
    with torch.autocast(video.device.type, enabled=False):   # at a scale of 100, half precision is coarse
        video, text = (F.normalize(x.float(), dim=-1, eps=1e-8) for x in (video, text))
        logits = video @ text.T / temperature
    target = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)


def vtc_loss(video_feature, text_feature):
    """Video-text contrast (Eq. 6): the whole video against the caption."""
    return contrastive_loss(gather(video_feature), gather(text_feature))


def mbca_loss(patch_feature, text_feature):
    """Masked branch cross-modal alignment (Eq. 8): visible patches, projected, their mean; the caption."""
    return contrastive_loss(gather(patch_feature), gather(text_feature))


def mbta_loss(student, teacher):
    """Masked branch token alignment (Eq. 7): student, CLIP as teacher (B, n*T, P) -> mean of 2 - 2 cos."""
    return (2 - 2 * F.cosine_similarity(student.float(), teacher.float(), dim=-1, eps=1e-8)).mean()


class Pretraining(nn.Module):
    """The encoder and the head of MBTA. `see` is all that is frozen, `forward` all that learns."""
    def __init__(self, encoder):
        super().__init__()
        P = encoder.clip.config.projection_dim
        self.encoder = encoder
        self.extra_proj = nn.Sequential(nn.Linear(encoder.clip.config.vision_width, P), nn.LayerNorm(P))

    @torch.no_grad()
    def see(self, video, ids, kept):
        """video (B, T, 3, H, W) uint8, ids (B, S), kept (B, n) -> K states (B, T, 1+n, D), texts (B, P)."""
        clip = self.encoder.clip
        return backbone_states(clip, video, self.encoder.branch.depth, kept=kept), clip.encode_text(ids)

    def forward(self, states, kept):
        """-> video feature (B, P) for VTC; mean of projected patches (B, P) for MBCA; MBTA loss ()."""
        clip = self.encoder.clip
        video_feature, tokens = self.encoder.feature(states, kept)
        with torch.no_grad():   # in the branch's order
            teacher = clip.project_image(states[-1][:, :, 1:].transpose(1, 2).flatten(1, 2))   # (B, n*T, P)
        patch_feature = clip.visual_projection(tokens[:, 1:]).mean(1)   # (B, P)
        mbta = mbta_loss(self.extra_proj(tokens[:, 1:]), teacher)
        return video_feature.float(), patch_feature.float(), mbta


# -------------------------------------------------------------------------------------- kinds of video tokens
class VideoTokens(nn.Module):
    """What a LLaMA gets of a video. A kind of video tokens says which frames it wants, how they become
    pixels, in which prompt it stands, and owns what it learns.

    frozen: what no training stage changes. see: what does not depend on the question; a chat keeps it.
    forward: the rows of the prompt. mm_projector is LLaVA's, which reads CLIP's last layer but one."""
    num_frames, rule, pixels = 100, "uniform", staticmethod(data.squash)   # a rule and pixels of data.py
    reads_branch, reads_linvt, template = False, False, "vicuna_v1"
    window = None   # frames that it looks at together; None: all
    has_clock = False   # whether it can say when, in hundredths of the video

    def __init__(self, mm_projector, branch=None, linvt=None):
        super().__init__()
        self.branch, self.mm_projector, self.linvt = branch, mm_projector, linvt

    @property
    def depth(self):
        """How many CLIP layers it reads."""
        return self.branch.depth if self.branch else 1

    @staticmethod
    def width(config):
        """How many numbers of a CLIPConfig's CLIP the projector takes."""
        return config.vision_width

    def frames_of(self, asked, image_size, seconds=math.inf):
        """How many frames to look at: `asked`, or None where a user did not say. seconds: of the video; inf:
        as long as can be. Raises UserError."""
        return asked or (self.num_frames if image_size >= 224 else 8)   # smaller pictures: the toy world's

    def watch(self, path, image_size, asked=None, window=None, duration=None):
        """A video file, or its part within `window` seconds -> pixels (T, 3, H, W) uint8 as this kind takes
        them; seconds of what is shown. asked: see frames_of. duration: of the file, where that is known.
        Raises UserError and VideoError."""
        seconds = data.clip_length(path, window, duration)
        num_frames = self.frames_of(asked, image_size, seconds)
        found = data.sample_frames(path, num_frames, self.rule, window=window)
        return torch.cat([self.pixels(picture[None], image_size) for _, picture in found]), seconds

    def frozen(self, clip, video):
        """video (B, T, 3, H, W) uint8 -> patches of CLIP's last layer but one (B, T, N, D), no gradient."""
        return backbone_states(clip, video, 1, skip_last=1)[0][:, :, 1:]

    def see(self, clip, video):
        """video (B, T, 3, H, W) uint8 -> (B, K, D)."""
        return self.frozen(clip, video)

    def forward(self, seen, question=None, mask=None):
        """seen (B, K, D) -> (B, K, D_llm). question (B, S, D_llm), mask (B, S): if rows depend on it."""
        return self.mm_projector(seen.to(next(self.mm_projector.parameters()).dtype))


def branch_rows(clip, branch, states):
    """Of backbone_states -> (B, N+1, D): means over time of backbone and branch, half each; CLS is last."""
    tokens = branch(states, place_embedding(clip))[-1]                               # (B, 1 + N*T, D)
    backbone, N = states[-1].mean(1), states[-1].shape[2] - 1                        # (B, 1+N, D)
    patches = tokens[:, 1:].unflatten(1, (N, -1)).mean(2)                            # (B, N, D)
    return torch.cat([(backbone[:, 1:] + patches) / 2, (backbone[:, :1] + tokens[:, :1]) / 2], dim=1)


class BranchTokens(VideoTokens):
    """BT-Adapter: means over time of backbone and branch, half each; the N patches, then CLS: K = N + 1."""
    reads_branch = True

    def frozen(self, clip, video):
        return backbone_states(clip, video, self.branch.depth, skip_last=1)      # K of (B, T, 1+N, D)

    def see(self, clip, video):
        return branch_rows(clip, self.branch, self.frozen(clip, video))


class MeanTokens(VideoTokens):
    """Plain LLaVA on the mean frame, blind to order: K = N."""
    def see(self, clip, video):
        return self.frozen(clip, video).mean(1)


class STPool(VideoTokens):
    """Video-ChatGPT: each frame's mean over space, then each patch's mean over time: K = T + N."""
    def see(self, clip, video):
        patches = self.frozen(clip, video)
        return torch.cat([patches.mean(2), patches.mean(1)], dim=1)


class FrameCLS(VideoTokens):
    """VTimeLLM (arXiv 2311.18445): CLIP's feature of each frame, the one that is compared with texts: K = T.

    Where a frame stands in the prompt is all that tells its time, so there are always as many."""
    rule, pixels, template = "linspace", staticmethod(data.bicubic_pixels), "vtimellm"
    has_clock = True

    @staticmethod
    def width(config):
        return config.projection_dim

    def frames_of(self, asked, image_size, seconds=math.inf):
        if asked not in (None, self.num_frames):
            raise UserError(f"--num_frames {asked}: these weights count time in {self.num_frames} frames")
        return self.num_frames

    def frozen(self, clip, video):
        """video (B, T, 3, H, W) uint8 -> (B, T, P), not normalised, without a gradient."""
        no_patch = torch.empty(len(video), 0, dtype=torch.int64, device=video.device)
        return clip.project_image(backbone_states(clip, video, 1, kept=no_patch)[0][:, :, 0])


class LinVTTokens(VideoTokens):
    """LinVT: averages of the patches of all frames, weighted by the question: K = M. A picture is one frame,
    and passes as it is: K = N. linvt: a linvt.LinVT for rows as the LLaMA reads them."""
    num_frames, reads_linvt = 128, True

    def frames_of(self, asked, image_size, seconds=math.inf):
        """One a second; a long video's lie further apart, so that its end is seen, too."""
        return asked or max(8, round(min(seconds, self.num_frames)))

    def forward(self, seen, question=None, mask=None):
        """seen (B, T, N, D), question (B, S, D_llm), mask (B, S) bool -> (B, M, D_llm)."""
        assert question is not None or seen.shape[1] == 1, f"{seen.shape[1]} units, and no question"
        return self.linvt(super().forward(seen), question, mask)

    def weigh(self, seen, question, mask):
        """The same -> W (B, M, T, N) fp32: what share each token of the video has in each of those rows."""
        B, T, N = seen.shape[:3]
        if T == 1:
            return torch.eye(N, device=seen.device).expand(B, N, N)[:, :, None]
        kept, weights = self.linvt.weigh(super().forward(seen), question, mask)
        W = weights.new_zeros(*weights.shape[:2], T * N)
        return W.scatter(2, kept[:, None].expand_as(weights), weights).unflatten(2, (T, N))


class WindowTokens(LinVTTokens):
    """BT-Adapter sees windows of 8 frames, LinVT chooses among them. One window passes as with `branch`."""
    num_frames, reads_branch, window = 512, True, 8

    def frames_of(self, asked, image_size, seconds=math.inf):
        """As many windows as last 8 seconds each, or 2, as the toy world's clips."""
        windows = seconds / (8 if image_size >= 224 else 2)
        return asked or self.window * max(1, round(min(windows, self.num_frames / self.window)))

    @torch.no_grad()
    def frozen(self, clip, video):
        """video (B, T, 3, H, W) uint8 -> (B, ceil(T / 8), N+1, D); the last window has what is left."""
        return torch.stack([branch_rows(clip, self.branch, backbone_states(clip, frames, self.depth, 1))
                            for frames in video.split(self.window, dim=1)], dim=1)


VIDEO_TOKENS = {"branch": BranchTokens, "mean": MeanTokens, "st_pool": STPool, "frame_cls": FrameCLS,
                "linvt": LinVTTokens, "branch+linvt": WindowTokens}


# ---------------------------------------------------------------------------------------------------- prompts
IGNORE_INDEX = -100   # a label that is not learned
VIDEO_INDEX = -200    # stands in a prompt where the video tokens go
VIDEO = "<video>"     # stands there in its text


@dataclasses.dataclass(frozen=True)
class Template:
    """How a prompt is put together, word for word as the weights were trained with it."""
    first: str                            # a first question {}, and where its video goes
    later: str = "USER: {} ASSISTANT:"    # any other, also a first one that says <video> itself
    system: str = ""                      # the sentence before them all
    answer: str = "{}"                    # an answer; what stands before it is not learned
    end: bool = True                      # whether </s> follows, and is learned
    marked: bool = True                   # whether a start and an end row stand around the video


VICUNA = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")
TEMPLATES = {
    "vicuna_v1": Template("USER: {}\n<video>ASSISTANT:", system=VICUNA),
    "vtimellm": Template("USER: <video>\n{} ASSISTANT:", system=VICUNA, marked=False),
    "plain": Template("<video>", answer="\n{}\n", end=False, marked=False)}   # VTimeLLM's first stage

WHEN, ALL_EVENTS = data.ASK_WHEN[0], data.ASK_ALL[0]   # asked of a clock: about an event, about all


def prompt_ids(tokenizer, turns, template="vicuna_v1", learned=None):
    """turns [(question, answer)], the last answer may be None -> (ids, labels), lists of int of one length.
    learned: of how many answers, the last ones; None: of all.

    `<s>SYSTEM USER: question\n<video> ASSISTANT: answer</s>USER: ...`, or as another template has it. Text
    between video and answers is encoded as one piece. Built turn by turn in one pass, so that what is
    learned, an answer and its end, is known exactly and nothing has to be found again in the text."""
    form, ids, answers = TEMPLATES[template], [tokenizer.bos_id], []   # [(start, end)] of what is learned

    def encoded(text):
        space = tokenizer.between * (len(ids) > 1)   # some tokenizers put none before a word
        return tokenizer.encode(space + text) if text else []
    for i, (question, answer) in enumerate(turns):
        text = (form.first if i == 0 and VIDEO not in question else form.later).format(question)
        if i == 0:
            before, text = " ".join(filter(None, (form.system, text))).split(VIDEO, 1)
            ids += [*encoded(before), VIDEO_INDEX]
        ids += encoded(text)
        new = given = encoded(form.answer.split("{}")[0])   # what stands before an answer
        if answer is not None:
            new = [*encoded(form.answer.format(answer)), *[tokenizer.eos_id] * form.end]
        answers.append((len(ids) + len(given), len(ids) + len(new)))
        ids += new
    labels = [IGNORE_INDEX] * len(ids)
    for start, end in answers[-(learned or len(turns)):]:
        labels[start:end] = ids[start:end]
    return ids, labels


# --------------------------------------------------------------------------------------------- the chat model
class VideoChat(nn.Module):
    """Video tokens between a start and an end row, in the place of words in the prompt of a LLaMA.

    start_end (2, D_llm): LLaVA's trained <im_start> and <im_end> rows where the weights have them, else the
    mean of all word embeddings; (0, D_llm) for weights that were trained without, as LLaVA-1.5
    (marked=False), and for kinds of video tokens whose template has none."""
    def __init__(self, clip, video_tokens, language_model, tokenizer, marked=True):
        super().__init__()
        self.clip, self.video_tokens = clip.requires_grad_(False), video_tokens
        self.llm, self.tokenizer = language_model, tokenizer
        words = language_model.model.embed_tokens.weight.detach()
        if (rows := added_rows(words, tokenizer, tokenizer.added)) is None:
            rows = words.float().mean(0, keepdim=True).repeat(2, 1)   # (2, D_llm)
        marked = marked and TEMPLATES[video_tokens.template].marked
        self.start_end = nn.Parameter(rows[:2 * marked].to(words.dtype).clone())

    def embed_questions(self, questions):
        """B texts -> the words of each, 64 at most, as the LLaMA reads them (B, S, D_llm); mask (B, S) bool,
        False for padding."""
        ids = [torch.tensor(self.tokenizer.encode(text)[:64], dtype=torch.long) for text in questions]
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)                               # (B, S)
        mask = torch.arange(padded.shape[1]) < torch.tensor([[len(row)] for row in ids])
        words = self.llm.model.embed_tokens(padded.to(self.start_end.device))
        return words.detach(), mask.to(words.device)   # a stage that trains the words does not train these

    def embed_video(self, video, questions=None):
        """video (B, T, 3, H, W) uint8, or what was seen of it (B, ...), floats -> its rows of the prompt (B,
        K, D_llm). questions: B texts, for kinds of video tokens that depend on them."""
        asked = self.embed_questions(questions) if questions else ()
        seen = self.video_tokens.see(self.clip, video) if video.dtype == torch.uint8 else video
        return self.video_tokens(seen, *asked)

    def splice(self, ids, video_tokens):
        """ids: a list with one VIDEO_INDEX; video_tokens (K, D_llm) -> all rows of a prompt (S, D_llm)."""
        at = ids.index(VIDEO_INDEX)
        words = torch.tensor(ids[:at] + ids[at + 1:], device=video_tokens.device)
        before, after = self.llm.model.embed_tokens(words).tensor_split([at])
        return torch.cat([before, self.start_end[:1], video_tokens, self.start_end[1:], after])

    def prompt(self, seen, turns):
        """What was seen of a video (1, ...), or None for a prompt without one; turns as prompt_ids has them,
        the last without an answer -> rows of a prompt (1, S, D_llm)."""
        ids, _ = prompt_ids(self.tokenizer, turns, self.video_tokens.template)
        if seen is None:
            ids.remove(VIDEO_INDEX)
            return self.llm.model.embed_tokens(torch.tensor([ids], device=self.start_end.device))
        return self.splice(ids, self.embed_video(seen, [turns[-1][0]])[0])[None]

    def prompts(self, talks, template):
        """B conversations, turns as prompt_ids has them -> (B pairs (ids, labels), B questions). Rows that
        depend on the question are those of the last one, so its answer alone is learned."""
        learned = 1 if self.video_tokens.reads_linvt else None
        return ([prompt_ids(self.tokenizer, turns, template, learned) for turns in talks],
                [turns[-1][0] for turns in talks])

    def logits(self, video, prompts, questions=None):
        """video and questions as in embed_video; prompts: B pairs (ids, labels) of prompt_ids -> (logits (B,
        S, V) of the next token at every place; what it should be (B, S), IGNORE_INDEX where that is not
        learned).

        What is longer than the context is cut."""
        rows, targets, longest = [], [], self.llm.config.context_length
        for tokens, (ids, labels) in zip(self.embed_video(video, questions), prompts, strict=True):
            at, given = ids.index(VIDEO_INDEX), [IGNORE_INDEX] * (len(tokens) + len(self.start_end))
            rows.append(self.splice(ids, tokens)[:longest])   # (S, D_llm)
            targets.append(torch.tensor(labels[:at] + given + labels[at + 1:])[1:longest])
        embeds = nn.utils.rnn.pad_sequence(rows, batch_first=True)   # (B, S, D_llm): nothing looks right
        target = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORE_INDEX)
        return self.llm(embeds=embeds)[:, :-1], target.to(embeds.device)

    @torch.no_grad()
    def exact(self, video, talks, template):
        """video as in embed_video; B conversations -> [whether all answers are right]. An answer is right if
        greedy decoding would give it word for word: that is so exactly when, with the right answer fed in,
        every next token has the highest logit. An answer beyond the context is wrong."""
        prompts, asked = self.prompts(talks, template)
        logits, target = self.logits(video, prompts, asked)
        wanted = [sum(label != IGNORE_INDEX for label in labels) for _, labels in prompts]
        right = ((logits.argmax(-1) == target) & (target != IGNORE_INDEX)).sum(1)   # (B,): tokens
        return [a == b for a, b in zip(wanted, right.tolist())]

    def forward(self, video, prompts, questions=None):
        """-> sum of the cross-entropies of all learned tokens; how many these are."""
        logits, target = self.logits(video, prompts, questions)
        total = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORE_INDEX,
                                reduction="sum")
        return total, (target != IGNORE_INDEX).sum()


# ----------------------------------------------------------------------------------------------- branch files
def load_branch(path, clip, skip_last=0, drop_path=0.0):
    """-> Branch in fp32 that fits `clip`. Raises UserError.

    Both released layouts: a pretraining checkpoint (`backbone.btadapter_*`, in older files
    `backbone.timesFPN_*`, beside a whole CLIP), of which chat (skip_last=1) leaves out the last layer:
    nothing would read it; and what chat tuning saves (`model.vision_tower.btadapter_*`, one layer fewer).
    Gates: in the file, the file's; absent from pretraining, none, so sums, as in all released evaluations;
    absent from tuning, which never saved them, zeros."""
    released, c = weightfile.read_file(path), clip.config
    tuned, tensors = any("vision_tower." in name for name in released), {}
    for name, t in released.items():
        name = re.sub(r"^(model\.vision_tower\.|backbone\.|vision_model\.|model\.)", "", name)
        tensors[re.sub("^timesFPN_", "btadapter_", name)] = t
    depth = len({name.split(".")[1] for name in tensors if "btadapter_S_layers." in name})
    if tuned and not skip_last:
        raise UserError(f"{path}: tuned for chat, {depth} layers; retrieval needs a branch from pretraining")
    used = depth if tuned else depth - skip_last
    if not 1 <= used <= c.vision_layers:
        raise UserError(f"{path}: no BT-Adapter branch for this CLIP: {depth} layers, {used} in use")
    gated = tuned or "balance1" in tensors
    positions = max(1, len(tensors.get("btadapter_time_embed.weight", ())))
    # where the last layer is left out, the others keep their rate of stochastic depth
    rate = drop_path * max(0, used - 1) / max(1, used + skip_last - 1)
    with weightfile.shapes_only():
        branch = Branch(c.vision_width, c.vision_heads, c.vision_mlp, used, gated, positions, rate)
    unused = re.compile(rf"btadapter_([ST]_layers\.{used}\.|pos_embed$)")   # the latter: of the predecessor
    wanted = {name: t.float() for name, t in tensors.items()
              if name.startswith(("btadapter_", "balance")) and not unused.match(name)}
    if tuned:
        wanted = {"balance1": torch.zeros(c.vision_width), "balance2": torch.zeros(c.vision_width), **wanted}
    return weightfile.load_into(branch, wanted, path)


def branch_tensors(branch, prefix, dtype=torch.float32):
    """A branch under its released names: prefix `backbone.` of pretraining, `model.vision_tower.` of tuning.
    dtype: of all but the gates, whose small numbers matter."""
    return {prefix + name: t.detach().cpu().to(t.dtype if name.startswith("balance") else dtype)
            for name, t in branch.state_dict().items()}


def require(folder, needed):
    """Raises UserError, which names all that is missing of `needed`: {what `weights get` calls it: path}."""
    missing = [f"{os.path.basename(path)} (python -m weights get {name} --out {folder})"
               for name, path in needed.items() if not os.path.exists(path)]
    if missing:
        raise UserError(f"{folder}: lacks {', '.join(missing)}")


def load_encoder(folder, branch_file=None, device=torch.device("cpu")):
    """-> (VideoEncoder for retrieval in fp32, tokenizer)."""
    clip, tokenizer = load_clip(os.path.join(folder, "clip"))
    branch = load_branch(branch_file or os.path.join(folder, "branch.pth"), clip)
    return VideoEncoder(clip.float(), branch).to(device).eval(), tokenizer


# ----------------------------------------------------------------------------------------- folders of weights
def make_projector(tensors, visual, width, source):
    """The mm_projector among {name: tensor}: {weight, bias} -> Linear; {0.weight, 0.bias, 2.weight, 2.bias},
    of LLaVA-1.5, -> Linear, GELU, Linear. Raises UserError, naming `source`."""
    named = [re.fullmatch(r"(?:model\.)?mm_projector\.(.*)", name) for name in tensors]
    part = {name[1]: tensors[name[0]] for name in named if name}
    if not part:
        reason = weightfile.likely_reason(tensors) if tensors else "this is a LLaMA, not a LLaVA"
        raise UserError(f"{source}: holds no mm_projector; {reason}")
    module = nn.Linear(visual, width)
    if "weight" not in part:
        module = nn.Sequential(module, nn.GELU(), nn.Linear(width, width))
    return weightfile.load_into(module, part, source)


def added_rows(words, tokenizer, named):
    """words (V, D_llm) -> the start and end row among them (2, D_llm), or None.

    named: {text: id} of added tokens, which tell the two. Where they do not, it is the last two: LLaVA
    appends <im_patch>, <im_start>, <im_end> to the tokenizer's words, its v0 a <pad> before them, and
    Video-ChatGPT the same three for videos. Dozens of rows more are a table filled up to a round size."""
    for kind in ("vid", "im"):
        ids = [named.get(f"<{kind}_{place}>") for place in ("start", "end")]
        if all(type(i) is int and 0 <= i < len(words) for i in ids):
            return words[ids]
    return words[-2:] if 2 <= len(words) - tokenizer.vocab_size <= 8 else None


def config_of_llava(folder):
    """What its config.json says, {} for a folder of Meta. `mm_use_im_start_end`: LLaVA-1.5 has no start and
    end row; `_name_or_path`: adapters tell on which LLaMA they were trained."""
    path = os.path.join(folder, "config.json")
    return weightfile.read_json(path) if os.path.exists(path) else {}


ADAPTERS = "stage2", "stage3"   # folders of what VTimeLLM's last two stages taught the LLaMA, in this order
LONGEST = 8192   # tokens of a conversation, also where a LLaMA reads more: its KV cache must fit


@dataclasses.dataclass
class OpenChat:
    """A folder of weights that has been opened: its tensors are mapped, and take no memory yet."""
    chat: VideoChat
    tokens: str         # its kind of video tokens
    description: str    # what it was tuned for
    kept_in: str        # the folder for what is rounded to fewer bits
    adapters: list      # llm.Adapters to be merged into its LLaMA
    states: dict        # {part: store.state_of its files from before they were read}

    def need(self, dtype, scheme, device, num_frames):
        """{part: bytes} of a chat about `num_frames` frames, with the arguments of load: the sizes of its
        tensors, and a video roughly. The KV cache counts as full: no conversation ends in the middle."""
        chat, c, kind, number = self.chat, self.chat.clip.config, self.chat.video_tokens, dtype.itemsize
        frame, together = (1 + c.patch_tokens) * c.vision_width, min(num_frames, kind.window or num_frames)
        # as measured: for each number that a layer says of a frame, in CLIP 36 more, in the branch 70 bytes
        video = frame * (min(num_frames, frames_at_once(c, device)) * 36 * number
                         + together * 2 * kind.depth * number
                         + together / -(-together // 64) * 70 * kind.reads_branch)
        video += 2 * num_frames * 3 * (c.image_size ** 2 + THUMBNAIL ** 2)   # pictures, while they are joined
        # rows as the LLaMA reads them, and two copies at most on their way to LinVT's width
        rows = num_frames / (kind.window or 1) * (1 + c.patch_tokens) * chat.llm.config.width
        video += 3 * rows * number * kind.reads_linvt
        longest = min(chat.llm.config.context_length, LONGEST)
        kv_cache = llm.KVCache(chat.llm.config, 1, longest, "meta", dtype)
        return {"LLaMA": quant.nbytes(chat.llm, scheme, dtype),
                "CLIP": quant.nbytes(chat.clip, "int8" if clip_in_int8(scheme, device) else None, dtype),
                "video tokens": quant.nbytes(chat.video_tokens, None, dtype), "video": int(video),
                "KV cache": sum(t.nbytes for t in (*kv_cache.k, *kv_cache.v))}

    def load(self, dtype=torch.float32, scheme=None, device=torch.device("cpu")):
        """-> the VideoChat in eval mode. scheme: a key of quant.SCHEMES for the LLaMA; dtype: of all else."""
        chat = self.chat
        if scheme:   # adapters are merged one matrix at a time, and what is kept is rounded
            quant.quantized(chat.llm, scheme, self.kept_in, self.states["llama"], self.merged)
        elif self.adapters:
            for name, linear in llm.layer_linears(chat.llm).items():
                linear.weight.data = self.merged(name, linear.weight)
        if clip_in_int8(scheme, device):
            quant.quantized(chat.clip.vision_model, "int8", self.kept_in, self.states["clip"], prefix="clip_")
        for layer in tqdm(chat.llm.model.layers, "weights", leave=False, disable=None, delay=2):
            layer.to(device=device, dtype=dtype)
        return chat.to(device=device, dtype=dtype).eval()

    def merged(self, name, weight):
        """The weight (N, K) of a Linear of its LLaMA -> the same with all adapters in it."""
        return llm.merged(weight, [a.changes[name] for a in self.adapters if name in a.changes])


def clip_in_int8(scheme, device):
    """Whether CLIP becomes int8: beside a rounded LLaMA on a CPU, where 100 frames cost four prompts."""
    return scheme in ("int8", "int4") and device.type == "cpu"


def open_chat(folder, tokens=None, branch_file=None, chat_file=None, new_linvt=None):
    """A folder of weights -> OpenChat. Raises UserError; where parts are missing, it names all of them.

    clip              CLIP: a Hugging Face folder, or OpenAI's ViT-L-14.pt under this name
    llava             LLaVA: a Hugging Face folder; or, with a projector elsewhere, any LLaMA in either layout
    branch.pth        a branch, from pretraining or tuned for chat, for the kind `branch`
    mm_projector.bin  optional: a projector of LLaVA or another; it counts before the one inside llava
    stage2, stage3    optional: VTimeLLM's adapters for llava; its mm_projector.bin is needed then
    chat.bin          optional: what chat tuning learned for one kind of tokens; it counts before all of these
    linvt.bin         a LinVT, for the kind `linvt` or `branch+linvt`

    tokens: a key of VIDEO_TOKENS; None: what chat.bin was tuned for, else `frame_cls` if there are adapters,
    else `branch`. branch_file, chat_file: in the place of branch.pth and chat.bin. chat_file=False, or a
    branch_file alone, passes chat.bin by: the zero-shot setting. new_linvt: options of a LinVT that
    has learned nothing, in the place of linvt.bin."""
    names = "clip", "llava", "branch.pth", "mm_projector.bin", "chat.bin", "linvt.bin"
    clip_path, llava, pretrained, projector_file, tuned, linvt_file = (os.path.join(folder, n) for n in names)
    if chat_file is None and not branch_file and os.path.exists(tuned):
        chat_file = tuned
    learned = weightfile.read_file(chat_file) if chat_file else {}
    given = weightfile.read_file(projector_file) if os.path.exists(projector_file) else {}
    with_branch = any("btadapter" in name for name in learned)
    if with_branch and branch_file:
        raise UserError(f"{chat_file}: has a branch of its own, tuned with its projector, not {branch_file}")
    learned_for = learned and weightfile.read_metadata(chat_file).get("tokens")
    stages = [name for name in ADAPTERS if os.path.exists(os.path.join(folder, name))]
    if stages == ["stage3"]:
        raise UserError(f"{folder}: has stage3 without stage2, on which it was trained")
    tokens = tokens or learned_for or ("frame_cls" if stages else "branch")
    if tokens not in VIDEO_TOKENS:
        raise UserError(f"{chat_file}: tuned for {weightfile.shown(tokens)}, no kind of video tokens here")
    kind, needed = VIDEO_TOKENS[tokens], {"clip": clip_path, "llava": llava}
    if kind.reads_branch and not branch_file:
        branch_file = needed["branch"] = chat_file if with_branch else pretrained
    if stages and not learned and kind.has_clock:
        needed["vtimellm"] = projector_file
    require(folder, needed)
    if kind.reads_linvt and new_linvt is None and not os.path.exists(linvt_file):
        raise UserError(f"{folder}: lacks linvt.bin, which --tokens {tokens} needs")
    if learned_for and learned_for not in (tokens, tokens.removesuffix("+linvt")):
        warnings.warn(f"{chat_file}: tuned for {weightfile.shown(learned_for)}, not for {tokens}: answers "
                      "may be wrong; --no-tuned passes it by")
    tuned_in = [os.path.join(folder, name) for name in stages]
    states = {"llama": sum(map(state_of, (llava, *tuned_in)), []), "clip": state_of(clip_path),
              "branch": state_of(branch_file) if kind.reads_branch else None}
    clip = read_clip(clip_path).image_only()
    language_model, tokenizer, extra = llm.load_llama(llava)
    about, width = config_of_llava(llava), language_model.config.width
    adapters = [llm.read_adapter(path, language_model, about.get("_name_or_path")) for path in tuned_in]
    sources = {chat_file: learned, **{path: a.extra for path, a in zip(tuned_in[::-1], adapters[::-1])},
               projector_file: given}   # a projector of the first one counts
    source = next(filter(sources.get, sources), llava)
    mm_projector = make_projector(sources.get(source, extra), kind.width(clip.config), width, source)
    branch = load_branch(branch_file, clip, skip_last=1) if kind.reads_branch else None
    tokens_of_unit, linvt = clip.config.patch_tokens + kind.reads_branch, None
    if kind.reads_linvt:
        linvt = (load_linvt(linvt_file, tokens_of_unit, width) if new_linvt is None
                 else LinVT(width, tokens_of_unit, **new_linvt))
    chat = VideoChat(clip, kind(mm_projector, branch, linvt), language_model, tokenizer,
                     about.get("mm_use_im_start_end", True))
    for tensors in (given, learned):   # the later one counts
        rows = tensors.get("model.video_start_end.weight")   # of our own files
        words = tensors.get("model.embed_tokens.weight", tensors.get("embed_tokens.weight"))
        if rows is None and words is not None:   # the released ones have all words
            same = len(words) == language_model.config.vocab_size
            rows = added_rows(words, tokenizer, tokenizer.added if same else {})
        if rows is not None and TEMPLATES[kind.template].marked:   # else there is no place for them
            chat.start_end.data = rows
    description = [f"tuned for {learned_for or 'video'}"] * bool(learned)
    description += ["branch.pth unused"] * (kind.reads_branch and with_branch and os.path.exists(pretrained))
    description += [f"with {' and '.join(stages)}"] * bool(stages)
    description = ", ".join(description) or "without chat.bin"
    kept_in = (llava, *tuned_in)[-1]   # another adapter, another folder: one LLaMA may serve several chats
    return OpenChat(chat.requires_grad_(False), tokens, description, kept_in, adapters, states)


def save_chat(path, chat, dtype=torch.float16):
    """Writes a chat.bin: what chat tuning learned, under the released names, and the kind of tokens that it
    is for. The two rows stand apart: the released file holds all word embeddings."""
    kind = next(name for name, kind in VIDEO_TOKENS.items() if type(chat.video_tokens) is kind)
    branch, projector = chat.video_tokens.branch, chat.video_tokens.mm_projector.state_dict()
    tensors = {f"model.mm_projector.{name}": t for name, t in projector.items()}
    tensors["model.video_start_end.weight"] = chat.start_end
    tensors = {name: t.detach().cpu().to(dtype) for name, t in tensors.items()}
    tensors |= branch_tensors(branch, "model.vision_tower.", dtype) if branch else {}
    weightfile.write_safetensors(path, tensors, {"tokens": kind})
