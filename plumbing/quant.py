"""Linear layers in fewer bits, by hand on torch's own kernels, so that a 7B runs on an ordinary machine.

To write a token, a decoder reads every weight once and does little with it: memory sets the pace, and half
the bytes are twice the speed. To read a prompt it uses each weight for many rows: there arithmetic counts,
and small integers multiply faster than floats.

  a scale     w ~ q * scale, with q a whole number of few bits. With scale = max |w| / 127 no int8 number is
              off by more than scale / 2.
  whose scale A larger maximum means larger steps for all that share the scale. So each output channel (row
              of the weight) has its own: it leaves the sum as a factor. So does each row of activations:
              y[m, n] = x_scale[m] * w_scale[n] * sum_k xq[m, k] * wq[n, k], where the sum is exact.
  outliers    In some rows, as of the input of down_proj, a few channels are a hundred times as large as the
              rest, which falls between the first steps. What rounding left over of such a row is a row, too.
  groups      With 4 bits a row is too long for one scale: 15 steps from its lowest to its highest number are
              too coarse. 64 neighbours share a scale, and a middle, because these two are seldom opposite.

"int8" rounds weights and activations, "int4" weights only, "bf16" nothing but fp32. docs/log.md says what
else was measured, docs/numbers.md the errors. All is for inference: rounding has no gradient. Shapes: M rows
(tokens), K inputs, N outputs.
"""
import functools
import itertools
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from plumbing.cli import UserError
from plumbing.store import Store

ROWS = 64        # rows of a weight that are converted at a time: as floats, 1 MB, they stay in a CPU's cache
GROUP = 64       # neighbours that share a scale in int4
EXTREME = 20.0   # a row whose maximum is more times its root mean square is multiplied twice; noise has 4
FEW = 48         # rows up to which the kernel for packed int4 is surely faster than unpacking
TINY = 1e-30     # the least scale: a row of zeros is divided by it
GAP = 64         # bytes between rows of int8: 4,096 apart they share a few places of a cache, and wait
VERSION = 3      # of what `convert` makes; raise it when that changes, and kept weights are made again


# ------------------------------------------------------------------------------------------------- rounding
def round_rows(x, levels=127):
    """x (M, K) -> q (M, K) int8 in -levels..levels, scale (M, 1) fp32, with |x - q * scale| <= scale / 2."""
    x = x.float()
    scale = (torch.maximum(x.amax(1, keepdim=True), -x.amin(1, keepdim=True)) / levels).clamp(min=TINY)
    return (x / scale).round_().to(torch.int8), scale


def round_groups(w):
    """w (N, K) -> q (N, K) uint8 in 0..15, scale and middle (N, K / GROUP) bf16.

    w ~ (q - 8) * scale + middle, off by at most scale / 2. From lowest to highest are 15.8 steps, not 15:
    both may be off by half a step, like all others; 0.2 are left for the rounding of scale and middle. Zero
    is always between them, so that the middle is small."""
    w = w.float().unflatten(1, (-1, GROUP))   # (N, K / GROUP, GROUP)
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    scale = ((high - low) / 15.8).clamp(min=TINY).bfloat16()
    middle = ((high + low + scale) / 2).bfloat16()   # 8 levels are below q = 8, and 7 above it
    q = ((w - middle[..., None].float()) / scale[..., None].float() + 8).round().clamp(0, 15)
    return q.to(torch.uint8).flatten(1), scale, middle


@functools.cache
def weight_levels():
    """The largest |q| for which this CPU's product of int8 matrices is exact. Raises UserError if none is.

    127 with VNNI. Older CPUs add two products in 16 bits, and cut silently what is more: up to 63 it fits."""
    for levels in (127, 63):
        x, w = torch.full((4, 64), 127, dtype=torch.int8), torch.full((16, 64), levels, dtype=torch.int8)
        ways = F.pad(w, (0, GAP))[:, :-GAP].T, w.T.contiguous()   # as int8 has it, and unpacked int4
        if all((torch._int_mm(sign * x[:rows], way) == sign * 127 * levels * 64).all()
               for sign in (-1, 1) for rows in (1, 4) for way in ways):
            return levels
    raise UserError("int8: this machine's product of int8 matrices is not exact; choose --quantize none")


# --------------------------------------------------------------------------------------------------- layers
class FrozenLinear(nn.Module):
    """What a Linear becomes. A scheme is a subclass: `convert` makes its tensors from a weight (N, K),
    `product` multiplies by them. `empty` says what they will be, where a file keeps them.

    tensors: {name: tensor} as from `convert`, adopted, so that they may be mapped; bias: (N,) or None."""
    def __init__(self, tensors, bias=None):
        super().__init__()
        for name, t in (tensors | {"bias": bias}).items():
            self.register_buffer(name, t if t is None else t.detach())

    def forward(self, x):
        """x (..., K), fp32 or half precision -> (..., N) in the same dtype."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("quantised layers are for inference: rounding has no gradient; use no_grad()")
        y = self.product(x.reshape(-1, x.shape[-1]))   # (M, K) -> (M, N)
        if self.bias is not None:
            y += self.bias   # in place: beyond some megabytes new memory costs more than the sum
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def _apply(self, fn, recurse=True):
        """`.to(dtype)` is about activations here: tensors move between devices, and keep their precision."""
        return super()._apply(lambda t: t.to(fn(torch.empty_like(t[:0])).device), recurse)


@functools.cache
def fast_bf16():
    """Whether this CPU has arithmetic for bf16 (AVX512_BF16, AMX, ...), and not only room for it."""
    return any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)


class BF16Linear(FrozenLinear):
    """Weights in bf16 or fp16, as in most files; fp32 becomes bf16. A CPU without arithmetic for bf16
    multiplies one row quicker by `mv`, and many rows two to three times as quick in fp32, a part of the
    weight at a time."""
    @staticmethod
    def convert(weight):
        return {"weight": weight.bfloat16() if weight.dtype == torch.float32 else weight}

    def product(self, x):
        if x.device.type != "cpu" or fast_bf16():
            return F.linear(x.to(self.weight.dtype), self.weight)
        if len(x) == 1:
            return torch.mv(self.weight, x[0].to(self.weight.dtype))[None]
        return torch.cat([F.linear(x.float(), rows.float()) for rows in self.weight.split(1024)], dim=1)


class Int8Linear(FrozenLinear):
    """Weights and activations in int8, a scale for each row of both; torch._int_mm takes the weight as it
    lies in a file. On a GPU only the weights are int8, and multiplied as floats. With a GAP after each row of
    the weight, 2 to 32 rows of activations are multiplied two to four times as fast."""
    @staticmethod
    def convert(weight):
        q, scale = map(torch.cat, zip(*(round_rows(rows, weight_levels()) for rows in weight.split(ROWS))))
        return {"weight": F.pad(q, (0, GAP)), "scale": scale[:, 0]}

    @staticmethod
    def empty(N, K):
        return {"weight": torch.empty(N, K + GAP, dtype=torch.int8, device="meta"),
                "scale": torch.empty(N, device="meta")}

    def product(self, x):
        weight = self.weight[:, :-GAP]
        if x.device.type != "cpu":   # sums of whole numbers are beyond fp16
            return torch.mm(x, weight.to(x.dtype).T, out_dtype=torch.float32) * self.scale
        return in_whole_numbers(x, weight.T, self.scale)


def in_whole_numbers(x, weight, scale):
    """x (M, K), weight (K, N) int8, scale (N,) of its columns -> (M, N) fp32. Sums fit int32 up to K =
    133,000."""
    def multiply(q, rows):
        return torch._int_mm(q, weight).float().mul_(scale).mul_(rows)
    x = x.float()
    q, rows = round_rows(x)
    y = multiply(q, rows)
    extreme = rows[:, 0] * 127 * x.shape[1] ** 0.5 > EXTREME * torch.linalg.vector_norm(x, dim=1)
    if extreme.any():   # what rounding left over is at most rows / 2: finer steps
        y[extreme] += multiply(*round_rows(x[extreme] - q[extreme] * rows[extreme]))
    return y


@functools.cache
def packing():
    """How torch's kernel for int4 wants weights on this machine -> rows, neighbours as in `unpack`: 64, False
    with AVX512; 32, False with AVX2; 32, True without either. Raises UserError for another way."""
    q = (torch.arange(64 * 64).view(64, 64) * 37 // 64 % 16).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 2)
    for way in itertools.product((64, 32), (False, True)):
        if torch.equal(unpack(packed, *way).T, q):
            return way
    raise UserError("int4: this machine's kernel packs weights in an unknown way; choose --quantize int8")


def unpack(packed, rows, neighbours, columns=slice(None)):
    """packed (N, K / 2) uint8, two numbers a byte -> (K, N) uint8 in 0..15, of `columns`. The kernel has
    `rows` side by side: byte j of column k holds 2j and 2j + 1 if `neighbours`, else j and j + rows / 2."""
    blocks = packed.view(-1, packed.shape[1] * 2, rows // 2)[:, columns].transpose(0, 1)
    return torch.stack((blocks & 15, blocks >> 4), 3 if neighbours else 2).flatten(1)


class Int4Linear(FrozenLinear):
    """Weights in 4 bits, a scale and a middle for each group of 64 along K: 4.5 bits a weight. Torch's kernel
    for packed weights takes time with every row, so for many rows the weight becomes int8: its error is small
    beside that of int4."""
    @staticmethod
    def convert(weight):
        weights, groups = [], []
        for rows in weight.split(ROWS):
            q, scale, middle = round_groups(rows)
            weights.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 2))   # (rows, K / 2)
            groups.append(torch.stack((scale.T, middle.T), dim=2))   # (K / GROUP, rows, 2)
        return {"weight": torch.cat(weights), "groups": torch.cat(groups, dim=1)}

    @staticmethod
    def empty(N, K):
        return {"weight": torch.empty(N, K // 2, dtype=torch.uint8, device="meta"),
                "groups": torch.empty(K // GROUP, N, 2, dtype=torch.bfloat16, device="meta")}

    def product(self, x):
        if x.device.type != "cpu":
            return torch.ops.aten._weight_int4pack_mm(x.bfloat16(), self.weight, GROUP, self.groups)
        if len(x) <= FEW:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), self.weight, GROUP, self.groups)
        scale, middle = self.groups.float().unbind(-1)                # (K / GROUP, N) each
        unit = (8 * scale + middle.abs()).amax(0) / weight_levels()   # (N,): holds the largest
        scale, low = scale / unit, (middle - 8 * scale) / unit
        q = torch.cat([self.numbers(g).mul_(scale[g]).add_(low[g]).round_().to(torch.int8)
                       for g in range(len(scale))])                   # (K, N)
        return in_whole_numbers(x, q, unit)

    def numbers(self, group):
        """-> (GROUP, N) fp32 in 0..15: a group of all outputs, as torch is quick along a long last side."""
        return unpack(self.weight, *packing(), slice(group * GROUP, group * GROUP + GROUP)).float()

    def _apply(self, fn, recurse=True):
        """A GPU's kernel wants the numbers packed in another way."""
        was_here = self.weight.device.type == "cpu"
        super()._apply(fn, recurse)
        if was_here and self.weight.is_cuda:
            q = unpack(self.weight, *packing()).T.contiguous()
            self.weight = torch.ops.aten._convert_weight_to_int4pack(q[:, ::2] << 4 | q[:, 1::2], 4)
        return self


SCHEMES = {"bf16": BF16Linear, "int8": Int8Linear, "int4": Int4Linear}


def scheme_of(name, N, K, scheme):
    """The class for one Linear. int4 leaves to int8: lm_head, whose rows are the words, and what is not whole
    groups of inputs or blocks of 64 outputs, which a kernel may work on side by side."""
    if scheme == "int4" and (name.endswith("lm_head") or N % 64 or K % GROUP):
        return Int8Linear
    return SCHEMES[scheme]


# --------------------------------------------------------------------------------------------------- models
def linears(module, scheme):
    """[(name, nn.Linear, class that takes its place)]"""
    return [(name, m, scheme_of(name, *m.weight.shape, scheme))
            for name, m in module.named_modules() if isinstance(m, nn.Linear)]


def unchanged(name, weight):
    return weight


@torch.no_grad()
def quantize(module, scheme, change=unchanged):
    """Puts a layer of `scheme`, a key of SCHEMES, in place of every nn.Linear inside `module` -> module.

    change: (name of a Linear, weight (N, K)) -> the weight to take. It is called when its turn has come, so
    that no two changed weights are in memory."""
    for name, linear, kind in linears(module, scheme):
        module.set_submodule(name, kind(kind.convert(change(name, linear.weight)), linear.bias))
    return module


@torch.no_grad()
def quantized(model, scheme, folder, sources, change=unchanged, prefix=""):
    """As quantize, but the work is done once: the layers are kept in `folder`, beside the original weights,
    and mapped from then on. Where they cannot be kept, this warns and quantises in memory. -> model

    sources: store.state_of all that the weights and `change` follow from, before it was read: somebody may
    replace it meanwhile. prefix: tells two models in one folder apart."""
    if scheme == "bf16":   # nothing to compute, nothing to keep
        return quantize(model, scheme, change)
    # 0: the newest alone, of gigabytes
    store = Store(folder, max_bytes=0, prefix=f"quantised_{prefix}{scheme}_")
    key = [VERSION, scheme, GROUP, weight_levels(), packing() if scheme == "int4" else None, sources]
    found, entry = linears(model, scheme), store.get(key)
    if entry is None:
        shapes = {f"{name}.{part}": t for name, linear, kind in found
                  for part, t in kind.empty(*linear.weight.shape).items()}
        layers = tqdm(found, f"quantising to {scheme}, once", disable=None, delay=2)
        values = (t for name, linear, kind in layers
                  for t in kind.convert(change(name, linear.weight)).values())
        try:   # tensor by tensor: no two layers are in memory
            store.put(key, shapes, values=values)
        except UserError as e:
            warnings.warn(f"{e}; quantising in memory, and again at the next start")
            return quantize(model, scheme, change)
        entry = store.get(key)
    for name, linear, kind in found:
        mapped = {part: entry[0][f"{name}.{part}"] for part in kind.empty(*linear.weight.shape)}
        model.set_submodule(name, kind(mapped, linear.bias))
    return model


def nbytes(module, scheme, dtype):
    """Bytes that `module` takes once its Linears are of `scheme` (None: of `dtype`) and the rest of `dtype`.

    Told by the shapes of its tensors, so that it may be on the meta device. A shared tensor counts once."""
    sizes = {}
    for name, m in module.named_modules():
        for key, t in (*m.named_parameters(recurse=False), *m.named_buffers(recurse=False)):
            if scheme in ("int8", "int4") and isinstance(m, nn.Linear) and key == "weight":
                parts = scheme_of(name, *t.shape, scheme).empty(*t.shape)
                sizes[name] = sum(part.nbytes for part in parts.values())
            else:
                sizes[t] = t.numel() * dtype.itemsize
    return sum(sizes.values())
