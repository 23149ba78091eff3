"""BT-Adapter (arXiv 2309.15785): a branch with temporal attention beside a frozen CLIP, its losses, and the chat on top.

First half: the branch, the video encoder, the three losses of pretraining. Second half: video tokens, prompts, VideoChat.
Layers, names and formulas are those of the released code (github.com/farewellthree/BT-Adapter, commit 393b4b8), which
differ from the paper in places; docs/paper-vs-code.md lists them all.

Shapes: B videos, T frames, N patches a frame, n of them visible under a mask, D width, P projection, S text length.
A video is (B, T, 3, H, W) uint8. The branch holds (B, 1 + n*T, D): one CLS token for the whole video, then
the patches, position by position, each position's T frames side by side.
"""
import hashlib
import os
import re
import sys

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from clip import MLP, Attention, load_clip, load_clip_model, read_clip_config
from llm import load_llama, read_llama_config
from plumbing import weightfile
from plumbing.cli import UserError
from plumbing.training import leave_signals_to_the_parent

OUT_NORM, MIDDLE_NORM = 1e4, 1e2   # the gates' fixed multipliers: they turn a tiny learning rate into a quick decision


# ---------------------------------------------------------------------------------------------------- the branch
def drop_path(x, p, training):
    """Stochastic depth: zeroes whole rows (dim 0) with probability p and scales the others by 1 / (1 - p)."""
    if p == 0 or not training:
        return x
    keep = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= p
    return x * keep / (1 - p)


class TemporalLayer(nn.Module):
    """Attention along time: a patch sees the patches at its own place in all frames. CLS passes by (Eq. 2 of the paper)."""
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
    """A CLIP layer within each frame. The video's CLS joins every frame; what it attends to is averaged over the frames."""
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
        patches = x[:, 1:].view(B, -1, T, D).transpose(1, 2).reshape(B * T, -1, D)   # (B*T, n, D): each frame by itself
        y = self.layer_norm1(torch.cat([cls, patches], dim=1))                       # (B*T, 1+n, D)
        y = drop_path(self.self_attn(y), self.p, self.training).view(B, T, -1, D)    # (B, T, 1+n, D)
        x = x + torch.cat([y[:, :, 0].mean(1, keepdim=True), y[:, :, 1:].transpose(1, 2).reshape(B, L - 1, D)], dim=1)
        return x + self.mlp(self.layer_norm2(x))


class Branch(nn.Module):
    """K temporal + spatial layers that read the outputs of K consecutive CLIP layers. Parameter names are the released ones.

    gated: learnable gates mix the branch with CLIP; without them the two are summed. A weight file has the gates or not.
    checkpointed: in training, a layer's inner activations are computed again when the gradient needs them, not kept."""
    def __init__(self, width=1024, heads=16, mlp_width=4096, depth=4, gated=True, num_positions=64, drop_path=0.0, checkpointed=False):
        super().__init__()
        self.checkpointed = checkpointed
        rates = [drop_path * j / max(1, depth - 1) for j in range(depth)]   # deeper layers are dropped more often
        self.btadapter_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.btadapter_time_embed = nn.Embedding.from_pretrained(torch.empty(num_positions, width), freeze=False)
        if not self.btadapter_time_embed.weight.is_meta:   # drawing on the meta device would load a second's worth of modules
            nn.init.normal_(self.btadapter_time_embed.weight)   # std 1: rows beyond the trained frames keep it, and are saved
        self.btadapter_T_layers = nn.ModuleList(TemporalLayer(width, heads, p) for p in rates)
        self.btadapter_S_layers = nn.ModuleList(SpatialLayer(width, heads, mlp_width, p) for p in rates)
        # zero: both sides count half at first. In fp32 also under AMP: their useful changes are far below half precision.
        self.balance1 = nn.Parameter(torch.zeros(width)) if gated else None
        self.balance2 = nn.Parameter(torch.zeros(width)) if gated else None

    @classmethod
    def beside(cls, clip, depth=4, **options):
        """A new branch for this CLIP: spatial layer j starts as a copy of the CLIP layer whose output it reads."""
        c = clip.config
        branch = cls(c.vision_width, c.vision_heads, c.vision_mlp, depth, **options)
        for layer, source in zip(branch.btadapter_S_layers, clip.vision_model.encoder.layers[-depth:], strict=True):
            layer.load_state_dict({name: t.float().clone() for name, t in source.state_dict().items()})
        return branch

    @property
    def depth(self):
        return len(self.btadapter_S_layers)

    def forward(self, states, position_embedding, kept=None):
        """states: the outputs of K CLIP layers, each (B, T, 1+n, D). position_embedding: CLIP's own (1+N, D).

        kept: (B, n) which patches these are, or None for all N. -> the outputs of the K layers, each (B, 1 + n*T, D).
        More frames than time positions are averaged in groups of neighbours first, the last frame repeated to fill up."""
        times, places = self.btadapter_time_embed.weight, position_embedding[1:]   # (64, D), (N, D)
        if kept is not None:
            places = places[kept][:, None]                                          # (B, 1, n, D)
        group = -(-states[0].shape[1] // len(times))
        outputs = []
        for j, (state, temporal, spatial) in enumerate(zip(states, self.btadapter_T_layers, self.btadapter_S_layers, strict=True)):
            state = average_frames(state, group)   # (B, T', 1+n, D)
            T = state.shape[1]
            if j == 0:   # places and times are marked once, at the entrance (Eq. 3)
                start = self.btadapter_cls_token[0] + position_embedding[0]                                        # (1, D)
                x = to_branch((state[:, :, 0].mean(1) + start) / 2, state[:, :, 1:] + places + times[:T, None])    # (B, 1 + n*T, D)
            else:
                x = mix(x, to_branch(state[:, :, 0].mean(1), state[:, :, 1:]), self.balance2, MIDDLE_NORM)
            if self.checkpointed and self.training:
                x = checkpoint(lambda x, temporal=temporal, spatial=spatial: spatial(temporal(x, T), T), x, use_reentrant=False)
            else:
                x = spatial(temporal(x, T), T)
            outputs.append(x)
        return outputs


def pick(state, index):
    """state (B, L, D), index (B, n) -> (B, n, D): each row's own tokens."""
    return state[torch.arange(len(state), device=state.device)[:, None], index]


def average_frames(state, group):
    """(B, T, L, D) -> (B, ceil(T / group), L, D): means of neighbouring frames."""
    if group == 1:
        return state
    state = torch.cat([state, state[:, -1:].expand(-1, -state.shape[1] % group, -1, -1)], dim=1)
    return state.unflatten(1, (-1, group)).mean(2)


def to_branch(cls, patches):
    """cls (B, D), patches (B, T, n, D) -> (B, 1 + n*T, D) in the branch's order."""
    return torch.cat([cls[:, None], patches.transpose(1, 2).flatten(1, 2)], dim=1)


def mix(branch, backbone, balance, norm):
    """Gated: (1 - w) branch + w backbone, w = sigmoid(norm * balance), one weight a channel (Eq. 4). Ungated: the sum."""
    if balance is None:
        return branch + backbone
    w = torch.sigmoid(norm * balance.float()).to(branch.dtype)
    return (1 - w) * branch + w * backbone


def tube_mask(B, N, mask_ratio, generator=None):
    """-> kept (B, n) int64, sorted: the patches that stay visible, the same in every frame; n = N - int(mask_ratio * N)."""
    order = torch.rand(B, N, generator=generator).argsort(1)
    return order[:, : N - int(mask_ratio * N)].sort(1).values


# ---------------------------------------------------------------------------------------------------- the video encoder
def frames_at_once(config, device):
    """How many frames CLIP (CLIPConfig) sees together: enough to keep a GPU busy; on a CPU no more than leave a layer's widest activations
    at 20 MB in fp32, 4 frames for ViT-L/14. More fit into no cache, and from 32 MB on every tensor is new memory from the kernel: 16 frames
    take 1.15 times as long a frame, 24 take 1.6 times."""
    return 128 if device.type != "cpu" else max(1, min(128, (5 << 20) // ((1 + config.patch_tokens) * config.vision_mlp)))


class VideoEncoder(nn.Module):
    """Frozen CLIP with a branch beside its last layers.

    skip_last: CLIP layers at the end that are not used. 0 for retrieval; 1 for chat, because LLaVA reads the last layer but one
    (and a branch from pretraining then leaves its own last layer idle: see `load_branch`)."""
    def __init__(self, clip, branch, skip_last=0):
        super().__init__()
        self.clip, self.branch, self.skip_last = clip.requires_grad_(False), branch, skip_last

    @torch.no_grad()
    def backbone_states(self, video, depth, kept=None, chunk=None):
        """video (B, T, 3, H, W) -> the outputs of the `depth` CLIP layers before the skipped ones, each (B, T, 1+n, D).

        CLIP sees every patch; of what it says, only CLS and the patches in `kept` (B, n) are held on to, or all of them. Frames
        go through in chunks (None: of frames_at_once): memory does not grow with CLIP's depth, and activations of many frames never pile up."""
        chunk = chunk or frames_at_once(self.clip.config, video.device)
        last, T = self.clip.config.vision_layers - self.skip_last, video.shape[1]
        rows = [[] for _ in range(depth)]
        if kept is not None:   # the same patches in every frame of a clip
            visible = F.pad(kept + 1, (1, 0)).repeat_interleave(T, dim=0).split(chunk)   # (chunk, 1+n): CLS is token 0
        for c, frames in enumerate(video.flatten(0, 1).split(chunk)):                    # (chunk, 3, H, W)
            for i, state in enumerate(self.clip.image_states(frames)):                   # i = layers done
                if i > last - depth:
                    rows[i - 1 - last + depth].append(state if kept is None else pick(state, visible[c]))
                if i == last:
                    break
        return [torch.cat(r).unflatten(0, video.shape[:2]) for r in rows]

    def feature(self, states, kept=None):
        """What backbone_states gave -> (video_feature (B, P), not normalised; last branch tokens (B, 1 + n*T, D))."""
        tokens = self.branch(states, self.clip.vision_model.embeddings.position_embedding.weight, kept)[-1]
        cls = mix(tokens[:, :1], states[-1][:, :, 0], self.branch.balance1, OUT_NORM)   # (B, T, D): Eq. 5, frame by frame
        return self.clip.project_image(cls).mean(1), tokens

    def forward(self, video):
        """video (B, T, 3, H, W) -> (video_feature (B, P), not normalised; last CLIP state (B, T, 1+N, D))."""
        states = self.backbone_states(video, self.branch.depth)
        return self.feature(states)[0], states[-1]

    def encode_video(self, video):
        """video (B, T, 3, H, W) -> (B, P), not normalised."""
        return self(video)[0]

    def mean_feature(self, state):
        """The baseline of every table: CLIP's own image features, averaged over frames; last state (B, T, 1+N, D) -> (B, P)."""
        return self.clip.project_image(state[:, :, 0]).mean(1)


# ---------------------------------------------------------------------------------------------------- features of a data set
@torch.no_grad()
def encode_videos(encoder, dataset, device, batch_size=16, workers=0, amp=False):
    """Each video of a data set once -> names, in its order; normalised features, on the CPU in fp32, of the branch (V, P) and of
    mean-pooled CLIP (V, P); what went wrong with the videos that the data set skips. Under torchrun every process takes its
    share, and all have the whole result. Raises UserError if no video can be read."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    first = {}   # name: the first item with that video
    for i, video in enumerate(dataset.videos):
        first.setdefault(video, i)
    loader = DataLoader(dataset, batch_size, sampler=list(first.values())[rank::size], num_workers=workers, collate_fn=data.collate_skip,
                        worker_init_fn=leave_signals_to_the_parent)
    rows, broken, was_training = [], [], encoder.training
    encoder.eval()
    with torch.autocast(device.type, torch.float16, enabled=amp and device.type == "cuda"):
        for batch in tqdm(loader, desc="encode", leave=False, file=sys.stderr, disable=rank > 0):
            broken += batch["skipped"]
            if len(batch["index"]):
                feature, state = encoder(batch["pixels"].to(device))   # (B, P), (B, T, 1+N, D): one walk through CLIP serves both
                rows.append((batch["index"], feature.float().cpu(), encoder.mean_feature(state).float().cpu()))
    encoder.train(was_training)
    if size > 1:
        shares = [None] * size
        try:
            dist.all_gather_object(shares, (rows, broken))
        except RuntimeError as e:   # most likely a video that stopped one of the others
            raise UserError(f"a process has stopped and says why, or cannot be reached ({str(e).splitlines()[0]})") from e
        rows, broken = ([item for share in shares for item in share[k]] for k in (0, 1))
    if not rows:
        raise UserError(f"none of {len(first)} videos can be read; the first: {broken[0]}")
    index, branch, mean = (torch.cat(column) for column in zip(*rows))
    index, order = index.sort()
    return [dataset.videos[i] for i in index], F.normalize(branch[order], dim=-1), F.normalize(mean[order], dim=-1), broken


@torch.no_grad()
def encode_texts(encoder, tokenizer, texts, length, device, amp=False):
    """-> normalised features (Q, P), on the CPU in fp32; length: tokens of a text that are read, if CLIP has as many."""
    length = min(length, encoder.clip.config.context_length)
    with torch.autocast(device.type, torch.float16, enabled=amp and device.type == "cuda"):
        rows = [encoder.clip.encode_text(tokenizer(texts[i:i + 256], length).to(device)).float().cpu() for i in range(0, len(texts), 256)]
    return F.normalize(torch.cat(rows), dim=-1)


def owners(dataset, videos):
    """-> the items of a data set whose video is among `videos`, and the place there of each one's video."""
    place = {video: i for i, video in enumerate(videos)}
    return zip(*((i, place[video]) for i, video in enumerate(dataset.videos) if video in place))


def encode(encoder, tokenizer, dataset, device, batch_size=16, workers=0, amp=False):
    """-> normalised features, on the CPU in fp32, a row for each pair: of the branch (Q, P), of mean-pooled CLIP (Q, P), of the
    captions (Q, P); and what went wrong with the videos that the data set skips, whose pairs are left out. See encode_videos."""
    videos, branch, mean, broken = encode_videos(encoder, dataset, device, batch_size, workers, amp)
    items, owner = map(list, owners(dataset, videos))
    text = encode_texts(encoder, tokenizer, [dataset.captions[i] for i in items], 77, device, amp)
    return branch[owner], mean[owner], text, broken


# ---------------------------------------------------------------------------------------------------- the three losses
class GatherFeatures(torch.autograd.Function):
    """All ranks' rows, in rank order. Every rank computes the same loss from them, so each one's own rows carry its share of
    the gradient; times the number of ranks, because DDP will average where the global batch needs the sum."""
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
    """video, text (B, P), row i belongs to row i -> InfoNCE over cosines, both directions *summed* as in the released code."""
    with torch.autocast(video.device.type, enabled=False):   # at a scale of 100, half precision is coarse
        logits = F.normalize(video.float(), dim=-1, eps=1e-8) @ F.normalize(text.float(), dim=-1, eps=1e-8).T / temperature
    target = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)


def vtc_loss(video_feature, text_feature):
    """Video-text contrast (Eq. 6): the whole video against the caption."""
    return contrastive_loss(gather(video_feature), gather(text_feature))


def mbca_loss(patch_feature, text_feature):
    """Masked branch cross-modal alignment (Eq. 8): the mean of the branch's visible patches, projected, against the caption."""
    return contrastive_loss(gather(patch_feature), gather(text_feature))


def mbta_loss(student, teacher):
    """Masked branch token alignment (Eq. 7): student (B, n*T, P) and teacher, the same patches of CLIP -> mean of 2 - 2 cos."""
    return (2 - 2 * F.cosine_similarity(student.float(), teacher.float(), dim=-1, eps=1e-8)).mean()


class Pretraining(nn.Module):
    """The encoder, the head of MBTA and the frozen text tower. `look` is all that is frozen, `forward` all that learns."""
    def __init__(self, encoder):
        super().__init__()
        P = encoder.clip.config.projection_dim
        self.encoder = encoder
        self.extra_proj = nn.Sequential(nn.Linear(encoder.clip.config.vision_width, P), nn.LayerNorm(P))

    @torch.no_grad()
    def look(self, video, ids, kept):
        """video (B, T, 3, H, W), ids (B, S), kept (B, n) -> (the branch's input, K states (B, T, 1+n, D); text feature (B, P))."""
        return self.encoder.backbone_states(video, self.encoder.branch.depth, kept), self.encoder.clip.encode_text(ids)

    def forward(self, states, kept):
        """-> (video feature (B, P), for VTC; mean of the visible patches, projected (B, P), for MBCA; MBTA loss ()), in fp32."""
        clip = self.encoder.clip
        video_feature, tokens = self.encoder.feature(states, kept)
        with torch.no_grad():
            teacher = clip.project_image(states[-1][:, :, 1:].transpose(1, 2).flatten(1, 2))   # (B, n*T, P), in the branch's order
        patch_feature = clip.visual_projection(tokens[:, 1:]).mean(1)   # (B, P)
        return video_feature.float(), patch_feature.float(), mbta_loss(self.extra_proj(tokens[:, 1:]), teacher)


# ---------------------------------------------------------------------------------------------------- branch files
def read_branch_file(path):
    """A weight file with a branch -> ({released name without prefix: tensor}, tuned).

    Both released layouts: a pretraining checkpoint (`backbone.btadapter_*`, in older files `backbone.timesFPN_*`, beside a
    whole CLIP), and what chat tuning saves (`model.vision_tower.btadapter_*`, one layer fewer; then `tuned` is True)."""
    tensors = weightfile.read_file(path)
    tuned = any("vision_tower." in name for name in tensors)
    names = {}
    for name, t in tensors.items():
        name = re.sub(r"^(module\.)?(model\.vision_tower\.|backbone\.|vision_model\.|model\.)?", "", name)
        names[re.sub(r"^(timesFPN|BTAdapter)_", "btadapter_", name)] = t
    if any(re.match(r"btadapter_[ST]\.", name) for name in names):
        raise UserError(f"{path}: a branch for EVA-CLIP-g, not for CLIP; only CLIP's are read")
    return names, tuned


def load_branch(path, clip, skip_last=0, drop_path=0.0, *, gates=None):
    """-> Branch in fp32 that fits `clip`. Gates: in the file, the file's; absent from a pretraining file, none (sums, as all
    released evaluations use it); absent from a tuned file, zeros (tuning never saved them). gates=True or False overrides
    that: with gates, the file's or zeros; without, whatever the file has. Raises UserError.

    For chat (skip_last=1) the last layer of a pretraining file is left out: nothing would read it."""
    tensors, tuned = read_branch_file(path)
    depth = len({name.split(".")[1] for name in tensors if name.startswith("btadapter_S_layers.")})
    if depth == 0:
        raise UserError(f"{path}: holds no BT-Adapter branch (no btadapter_S_layers.*)")
    if tuned and not skip_last:
        raise UserError(f"{path}: a branch tuned for chat, {depth} layers; retrieval needs a branch file from pretraining")
    used = depth if tuned else depth - skip_last
    c = clip.config
    if not 1 <= used <= c.vision_layers:
        raise UserError(f"{path}: a branch of {depth} layers, {used} of them in use, does not fit a CLIP of {c.vision_layers}")
    gated = tuned or "balance1" in tensors if gates is None else gates
    positions, = tensors.get("btadapter_time_embed.weight", torch.empty(0)).shape[:1] or (0,)
    if positions < 1:
        raise UserError(f"{path}: its btadapter_time_embed.weight has no row; is this a BT-Adapter branch?")
    with weightfile.shapes_only():   # stochastic depth: each layer keeps its rate where the last layer is left out
        branch = Branch(c.vision_width, c.vision_heads, c.vision_mlp, used, gated, positions,
                        drop_path * max(0, used - 1) / max(1, used + skip_last - 1))
    wanted = {name: t.float() for name, t in tensors.items() if name.startswith(("btadapter_", "balance")[:1 + gated])
              and name != "btadapter_pos_embed"   # an unused leftover in files of the predecessor
              and not re.match(rf"btadapter_[ST]_layers\.{used}\.", name)}
    if gated and (tuned or gates):
        wanted = {"balance1": torch.zeros(c.vision_width), "balance2": torch.zeros(c.vision_width), **wanted}
    width = tensors.get("btadapter_S_layers.0.layer_norm1.weight", torch.empty(0)).numel()
    return weightfile.load_into(branch, wanted, path, reason=None if width in (0, c.vision_width) else (
        f"it looks like a branch for a CLIP {width} wide{' (EVA-CLIP-g)' if width == 1408 else ''}; this one is {c.vision_width}"))


def load_encoder(folder, branch_file, device):
    """-> (VideoEncoder for retrieval in fp32, tokenizer)."""
    clip, tokenizer = load_clip(os.path.join(folder, "clip"))
    branch = load_branch(branch_file or os.path.join(folder, "branch.pth"), clip)
    return VideoEncoder(clip.float(), branch).to(device).eval(), tokenizer


def fingerprint(encoder):
    """A word for the weights, the same for the same numbers. 64 numbers of each tensor will do: training moves all of them."""
    digest = hashlib.sha256()
    for name, t in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tuple(t.shape)}".encode() + t.flatten()[::max(1, t.numel() // 64)].cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def branch_tensors(branch, prefix, dtype=torch.float32):
    """A branch under its released names: prefix `backbone.` (pretraining) or `model.vision_tower.` (chat tuning).

    dtype: of all but the gates, whose small numbers matter."""
    return {prefix + name: t.detach().cpu().to(t.dtype if name.startswith("balance") else dtype)
            for name, t in branch.state_dict().items()}


# ---------------------------------------------------------------------------------------------------- video tokens
def branch_tokens(encoder, video):
    """BT-Adapter: the means over time of backbone and of branch, half each; the N patches, then CLS -> (B, N+1, D)."""
    states = encoder.backbone_states(video, encoder.branch.depth)
    position_embedding = encoder.clip.vision_model.embeddings.position_embedding.weight
    tokens = encoder.branch(states, position_embedding)[-1]                            # (B, 1 + N*T, D)
    backbone, N = states[-1].mean(1), states[-1].shape[2] - 1                          # (B, 1+N, D)
    patches = tokens[:, 1:].unflatten(1, (N, -1)).mean(2)                              # (B, N, D)
    return torch.cat([(backbone[:, 1:] + patches) / 2, (backbone[:, :1] + tokens[:, :1]) / 2], dim=1)


def mean_tokens(encoder, video):
    """Plain LLaVA on the mean frame, blind to order: the mean over time of CLIP's patches -> (B, N, D)."""
    return encoder.backbone_states(video, 1)[0][:, :, 1:].mean(1)


def st_pool_tokens(encoder, video):
    """Video-ChatGPT: a token a frame (its mean over space), then a token a patch (its mean over time) -> (B, T+N, D)."""
    patches = encoder.backbone_states(video, 1)[0][:, :, 1:]   # (B, T, N, D)
    return torch.cat([patches.mean(2), patches.mean(1)], dim=1)


VIDEO_TOKENS = {"branch": branch_tokens, "mean": mean_tokens, "st_pool": st_pool_tokens}


# ---------------------------------------------------------------------------------------------------- prompts
IGNORE_INDEX = -100   # a label that is not learned
VIDEO_INDEX = -200    # stands in a prompt where the video tokens go
SYSTEMS = {   # the sentence before the first question, word for word as each model was trained with it
    "vicuna_v1": "A chat between a curious user and an artificial intelligence assistant. "
                 "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "none": ""}


def prompt_ids(tokenizer, turns, system="vicuna_v1"):
    """turns [(question, answer)], the last answer may be None -> (ids, labels), lists of int of one length.

    `<s>SYSTEM USER: question\\n<video> ASSISTANT: answer</s>USER: ...`: built piece by piece in one pass, so that what is
    learned (an answer and its end) is known exactly and nothing has to be found again in the text. The video follows
    the first question, as in Video-ChatGPT's evaluation."""
    ids, labels = [], []

    def encode(text):   # after the first word, with the space that a tokenizer does not put there by itself
        return tokenizer.encode(tokenizer.between * (len(ids) > 1) + text)

    def add(new, learn=False):
        ids.extend(new)
        labels.extend(new if learn else [IGNORE_INDEX] * len(new))

    add([tokenizer.bos_id])
    if SYSTEMS[system]:
        add(encode(SYSTEMS[system]))
    for i, (question, answer) in enumerate(turns):
        add(encode(f"USER: {question}" + ("\n" if i == 0 else "")))
        if i == 0:
            add([VIDEO_INDEX])
        add(encode("ASSISTANT:"))
        if answer is not None:
            add(encode(answer) + [tokenizer.eos_id], learn=True)
    return ids, labels


# ---------------------------------------------------------------------------------------------------- the chat model
class VideoChat(nn.Module):
    """Video tokens, projected into the embedding space of a LLaMA between a start and an end row, inside a prompt.

    tokens: a key of VIDEO_TOKENS. start_end (2, D_llm): LLaVA's trained <im_start> and <im_end> rows where the weights have
    them, else the mean of all word embeddings; (0, D_llm) for weights that were trained without (marked=False, LLaVA-1.5)."""
    def __init__(self, encoder, mm_projector, llm, tokenizer, tokens="branch", marked=True):
        super().__init__()
        self.encoder, self.mm_projector, self.llm, self.tokenizer, self.tokens = encoder, mm_projector, llm, tokenizer, tokens
        words = llm.model.embed_tokens.weight.detach()
        rows = last_added(words, tokenizer.vocab_size)
        if rows is None:
            rows = words.float().mean(0, keepdim=True).repeat(2, 1)   # (2, D_llm)
        self.start_end = nn.Parameter(rows[:2 * marked].to(words.dtype).clone())

    def encode_video(self, video):
        """video (B, T, 3, H, W) -> video tokens (B, K, D_llm); K does not depend on T (but for st_pool)."""
        return self.mm_projector(VIDEO_TOKENS[self.tokens](self.encoder, video).to(self.start_end.dtype))

    def splice(self, ids, video_tokens):
        """ids: list of int with one VIDEO_INDEX; video_tokens (K, D_llm) -> embeddings (len(ids) - 1 + K + len(start_end), D_llm)."""
        at = ids.index(VIDEO_INDEX)
        before, after = (self.llm.model.embed_tokens(torch.tensor(part, dtype=torch.long, device=video_tokens.device))
                         for part in (ids[:at], ids[at + 1:]))
        return torch.cat([before, self.start_end[:1], video_tokens, self.start_end[1:], after])

    def logits(self, video, prompts):
        """video (B, T, 3, H, W); prompts: B pairs (ids, labels) of prompt_ids -> logits (B, S, V) of the next token at every
        place, and what it should be (B, S), IGNORE_INDEX where that is not learned. What is longer than the context is cut."""
        rows, targets, longest = [], [], self.llm.config.context_length
        for tokens, (ids, labels) in zip(self.encode_video(video), prompts, strict=True):
            at = ids.index(VIDEO_INDEX)
            rows.append(self.splice(ids, tokens)[:longest])   # (S, D_llm)
            targets.append(torch.tensor(labels[:at] + [IGNORE_INDEX] * (len(tokens) + len(self.start_end)) + labels[at + 1:])[1:longest])
        embeds = nn.utils.rnn.pad_sequence(rows, batch_first=True)   # (B, S, D_llm): padded on the right, where nothing looks
        target = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORE_INDEX)
        return self.llm(embeds=embeds)[:, :-1], target.to(embeds.device)

    def forward(self, video, prompts):
        """-> mean cross-entropy over the learned tokens of all processes: this one's share, times their number, because DDP
        will average where the joined batch needs the sum."""
        logits, target = self.logits(video, prompts)
        total = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
        count = (target != IGNORE_INDEX).sum()
        if dist.is_initialized():
            dist.all_reduce(count)
            total = total * dist.get_world_size()
        return total / count.clamp(min=1)


def make_projector(tensors, visual, width, source):
    """{weight, bias} -> Linear; {0.weight, 0.bias, 2.weight, 2.bias} (LLaVA-1.5) -> Linear, GELU, Linear."""
    if not tensors:
        raise UserError(f"{source}: holds no mm_projector; this is a LLaMA, not a LLaVA")
    module = nn.Linear(visual, width) if "weight" in tensors else nn.Sequential(
        nn.Linear(visual, width), nn.GELU(), nn.Linear(width, width))
    first = tensors.get("weight", tensors.get("0.weight", torch.empty(0)))
    return weightfile.load_into(module, tensors, source, reason=None if first.shape == (width, visual) or first.ndim != 2 else
                                f"it looks like a projector from a CLIP {first.shape[1]} wide into a LLaMA {first.shape[0]} wide; "
                                f"these are {visual} and {width}")


def part(tensors, prefix):
    """The tensors whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def projector_part(tensors):
    """The mm_projector among {name: tensor}, under LLaVA's name or Video-ChatGPT's, the same without `model.`; {} if none."""
    return part(tensors, "model.mm_projector.") or part(tensors, "mm_projector.")


def last_added(words, vocab_size):
    """The start and end row, the last two of words (V, D_llm), or None. LLaVA appends <im_patch>, <im_start>, <im_end> to the tokenizer's
    words, its v0 before them <pad>, and Video-ChatGPT the same three for videos; dozens of rows more are a table filled up to a round size."""
    return words[-2:] if 2 <= len(words) - vocab_size <= 8 else None


def start_end_rows(tensors, vocab_size):
    """(2, D_llm) or None: the start and end row among {name: tensor}. Our own files name the two; the released ones hold all
    word embeddings, with the two among them."""
    rows = tensors.get("model.video_start_end.weight")
    words = tensors.get("model.embed_tokens.weight", tensors.get("embed_tokens.weight"))
    return rows if rows is not None or words is None or words.ndim != 2 else last_added(words, vocab_size)


def is_marked(llava):
    """Whether a LLaVA in this folder was trained with a start and an end row around a picture: LLaVA-1.5 says that it was not."""
    settings = os.path.join(llava, "config.json")   # Meta's folders have none
    return not os.path.exists(settings) or bool(weightfile.read_json(settings).get("mm_use_im_start_end", True))


def chat_parts(folder):
    """-> the paths of what load_chat looks for in a folder of weights. Raises UserError."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder of weights; it needs clip, llava and branch.pth, see README.md")
    return [os.path.join(folder, name) for name in ("clip", "llava", "branch.pth", "mm_projector.bin", "chat.bin")]


def read_sizes(folder):
    """-> (CLIPConfig, LLaMAConfig) of what load_chat would make of a folder, from headers alone. Raises UserError."""
    clip, llava, *_ = chat_parts(folder)
    return read_clip_config(clip), read_llama_config(llava)


def load_chat(folder, tokens="branch", tuned=True, dtype=torch.float32, device=None, *, quantize=None, base=None, gates=None):
    """A folder of weights -> (VideoChat, eval mode; what it is, in words). Raises UserError.

    clip              CLIP: a Hugging Face folder, or OpenAI's ViT-L-14.pt under this name
    llava             LLaVA: a Hugging Face folder; or, with a projector elsewhere, any LLaMA in Hugging Face's or Meta's layout
    branch.pth        a branch, from pretraining or tuned for chat (needed for tokens="branch")
    mm_projector.bin  optional: a projector of LLaVA or Video-ChatGPT; it counts before the one inside llava
    chat.bin          optional: what chat tuning learned (branch, mm_projector, start and end rows); it counts before all of
                      these, and tuned=False passes it by
    base: the folder of the LLaMA that llava adds to, where llava holds delta weights. gates: see load_branch.
    quantize: a key of quant.SCHEMES for the language model, or None; dtype is that of all else, None for what the files have,
    without a copy. device: where it goes, tensor by tensor; None: nowhere, it stays in the CPU's memory or in the files."""
    clip_path, llava, branch_file, projector_file, chat_file = chat_parts(folder)
    clip = load_clip_model(clip_path).image_only()
    llm, tokenizer, extra = load_llama(llava, quantize=quantize, base=base)
    learned = weightfile.read_file(chat_file) if tuned and os.path.exists(chat_file) else {}
    given = weightfile.read_file(projector_file) if os.path.exists(projector_file) else {}
    for file, t in ((chat_file, learned), (projector_file, given)):
        if t and not projector_part(t):
            raise UserError(f"{file}: holds no mm_projector; {weightfile.likely_reason([], t, [])}")
    if any("btadapter" in name for name in learned):
        branch_file = chat_file
    branch = load_branch(branch_file, clip, skip_last=1, gates=gates) if tokens == "branch" else None
    source = next((file for file, t in ((chat_file, learned), (projector_file, given)) if projector_part(t)), llava)
    projector = projector_part(learned) or projector_part(given) or projector_part(extra)
    mm_projector = make_projector(projector, clip.config.vision_width, llm.config.width, source)
    chat = VideoChat(VideoEncoder(clip, branch, skip_last=1), mm_projector, llm, tokenizer, tokens, is_marked(llava)).requires_grad_(False)
    for file, t in ((projector_file, given), (chat_file, learned)):   # the later one counts
        rows = start_end_rows(t, tokenizer.vocab_size)
        if rows is not None:
            if rows.shape not in ((2, llm.config.width), (0, llm.config.width)):
                raise UserError(f"{file}: its start and end rows are {tuple(rows.shape)}, this LLaVA needs (2, {llm.config.width})")
            chat.start_end.data = rows
    return chat.to(device=device, dtype=dtype).eval(), "tuned on video" if learned else "without chat.bin"


def chat_tensors(chat, dtype):
    """What chat tuning learns, under the released names (the two rows apart: the released file holds all word embeddings)."""
    tensors = branch_tensors(chat.encoder.branch, "model.vision_tower.", dtype) if chat.encoder.branch else {}
    rows = {f"model.mm_projector.{name}": t for name, t in chat.mm_projector.state_dict().items()}
    rows["model.video_start_end.weight"] = chat.start_end
    return tensors | {name: t.detach().cpu().to(dtype) for name, t in rows.items()}
