"""Linear layers in fewer bits, by hand on torch's own kernels, for a 7B that shall run on an ordinary machine.

To write a token, a decoder reads every weight once and does little with it: the memory sets the pace, so half the bytes are twice
the speed. To read a prompt it uses each weight for many rows: there arithmetic counts, and small integers multiply faster than floats.

  a scale     w ~ q * scale, with q a whole number of few bits. With scale = max |w| / 127 no int8 number is off by more than scale / 2.
  whose scale A larger max means a larger step for all that share it. Each output channel (row of the weight) has a scale of its own:
              it leaves the sum as a factor. So does a row of activations: y[m, n] = x_scale[m] * w_scale[n] * sum_k xq[m, k] * wq[n, k],
              and the sum is exact in whole numbers. One scale for all rows would let one wild token blur its neighbours.
  outliers    Some rows have a few channels a hundred times as large as the rest (the input of down_proj is known for it); the others
              then fall between the first steps. Such a row is multiplied twice: what rounding left over is a row as well.
  groups      With 4 bits a whole row is too long for one scale: 15 steps from its lowest to its highest number are too coarse. 64
              neighbours share a scale, and a middle, because their lowest and highest are seldom opposite.

"bf16" takes the faster of torch's ways to multiply, with weights as they are in the file, but for fp32, which it rounds to bf16. "int8" rounds weights and
activations, "int4" weights only. What was measured, and what was not taken, is in LOG.md; errors are in docs/numbers.md.
All is for inference: rounding has no gradient. Shapes: M rows (tokens), K inputs, N outputs.
"""
import contextlib
import ctypes
import functools
import glob
import itertools
import json
import math
import mmap
import os
import sys
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from plumbing.cli import UserError
from plumbing.weightfile import read_file, read_metadata, write_safetensors

ROWS = 64         # rows of a weight that are converted at a time: as floats, 1 MB, they stay in a cache
GROUP = 64        # neighbours that share a scale in int4
EXTREME = 20.0    # a row whose largest value is more times its root mean square is multiplied twice; noise has 4, silu(noise) * noise 12
FEW = 48          # rows up to which the kernel for packed int4 is faster than unpacking the weight first
FORMAT = 1        # of a file of quantised weights; after a change of what is in it, another
TINY = 1e-30      # the least scale: a row of zeros is divided by it


# ---------------------------------------------------------------------------------------------------- rounding
def round_rows(x, levels=127):
    """x (M, K), any float -> q (M, K) int8 in -levels..levels, scale (M, 1) fp32, with |x - q * scale| <= scale / 2."""
    x = x.float()
    scale = (torch.maximum(x.amax(1, keepdim=True), -x.amin(1, keepdim=True)) / levels).clamp(min=TINY)
    return (x / scale).round_().to(torch.int8), scale


def round_groups(w):
    """w (N, K) -> q (N, K) uint8 in 0..15, scale and middle (N, K / GROUP) bf16, w ~ (q - 8) * scale + middle, off by <= scale / 2.

    15.8 steps, not 15, lie between lowest and highest: these two may be off by half a step like all others (0.2 less, because
    scale and middle are rounded, too). Zero is always between them, so that the middle is small and its rounding harmless."""
    w = w.float().unflatten(1, (-1, GROUP))   # (N, K / GROUP, GROUP)
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    scale = ((high - low) / 15.8).clamp(min=TINY).bfloat16()
    middle = ((high + low + scale) / 2).bfloat16()   # 8 of the levels are below q = 8 and 7 above it
    q = ((w - middle[..., None].float()) / scale[..., None].float() + 8).round().clamp(0, 15)
    return q.to(torch.uint8).flatten(1), scale, middle


@functools.cache
def weight_levels():
    """The largest |q| for which this CPU's product of int8 matrices is exact: 127 with VNNI. Older CPUs add two products in 16 bits,
    which overflow and are cut without a word; with weights of 7 bits, up to 63, they cannot. Raises UserError if neither is exact."""
    for levels in (127, 63):
        x, w = torch.full((4, 64), 127, dtype=torch.int8), torch.full((16, 64), levels, dtype=torch.int8)
        if all((torch._int_mm(sign * x[:rows], w.T) == sign * 127 * levels * 64).all() for sign in (-1, 1) for rows in (1, 4)):
            return levels
    raise UserError("int8: this machine's product of int8 matrices is not exact; choose --quantize none")


# ---------------------------------------------------------------------------------------------------- layers
class FrozenLinear(nn.Module):
    """What a Linear becomes. A scheme is a subclass: `convert` makes its tensors of a weight (N, K) in half or full precision, `shapes` says
    what they will be, `product` multiplies by them.

    tensors: {name: tensor} as from `convert`, adopted, so that they may be mapped from a file; bias: (N,) or None."""
    def __init__(self, tensors, bias=None):
        super().__init__()
        for name, t in (tensors | {"bias": bias}).items():
            self.register_buffer(name, t if t is None else t.detach())

    def forward(self, x):
        """x (..., K), fp32 or half precision -> (..., N) in the same dtype."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("quantised layers are for inference: there is no gradient through rounding; use torch.no_grad()")
        y = self.product(x.reshape(-1, x.shape[-1]))   # (M, K) -> (M, N)
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def _apply(self, fn, recurse=True):
        """`.to(dtype)` is about activations here: tensors move to another device, but keep the precision of their scheme."""
        return super()._apply(lambda t: t.to(fn(torch.empty_like(t[:0])).device), recurse)


@functools.cache
def fast_bf16():
    """Whether this CPU has arithmetic for bf16 (AVX512_BF16, AMX, ...) and not only room for it."""
    return any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)


class BF16Linear(FrozenLinear):
    """Weights in bf16 or fp16, as they are in most files; fp32 becomes bf16. One row by `mv`, which reads memory faster than `linear`
    does; many rows in fp32, a part of the weight at a time, where the CPU has no arithmetic for bf16 and torch's own way takes three times
    as long."""
    @staticmethod
    def convert(weight):
        return {"weight": weight.detach().bfloat16() if weight.dtype == torch.float32 else weight.detach()}

    @staticmethod
    def shapes(N, K):
        return {"weight": ((N, K), torch.bfloat16)}

    def product(self, x):
        w = self.weight
        if x.device.type == "cpu" and len(x) == 1:
            return torch.mv(w, x[0].to(w.dtype))[None]
        if x.device.type == "cpu" and not fast_bf16():
            return torch.cat([F.linear(x.float(), rows.float()) for rows in w.split(1024)], dim=1)
        return F.linear(x.to(w.dtype), w)


class Int8Linear(FrozenLinear):
    """Weights and activations in int8, a scale for each row of both. torch._int_mm takes the weight as it lies in the file: nothing is
    packed, no second copy is made. Elsewhere than on a CPU only the weights are int8, and multiplied as floats."""
    @staticmethod
    def convert(weight):
        parts = [round_rows(rows, weight_levels()) for rows in weight.detach().split(ROWS)]
        return {"weight": torch.cat([q for q, _ in parts]), "scale": torch.cat([scale for _, scale in parts])[:, 0]}

    @staticmethod
    def shapes(N, K):
        return {"weight": ((N, K), torch.int8), "scale": ((N,), torch.float32)}

    def product(self, x):
        if x.device.type != "cpu":   # a part of the weight at a time: lm_head in floats would take gigabytes
            parts = zip(self.weight.split(4096), self.scale.split(4096))
            return torch.cat([F.linear(x, self.numbers(*part).to(x.dtype)) for part in parts], dim=1)
        x = x.float()
        q, scale = round_rows(x)
        y = self.whole_numbers(q, scale)
        extreme = (scale[:, 0] * 127 * x.shape[1] ** 0.5 > EXTREME * torch.linalg.vector_norm(x, dim=1)).nonzero()[:, 0]
        if len(extreme):
            rest = x[extreme] - q[extreme] * scale[extreme]   # at most scale / 2: once more, with steps 254 times as fine
            y[extreme] += self.whole_numbers(*round_rows(rest))
        return y

    def numbers(self, q, scale):
        """q (N, K) int8, scale (N,) -> the weights (N, K) fp32. Scaled before they are multiplied: fp16 does not hold sums of whole numbers."""
        return q * scale[:, None]

    def whole_numbers(self, q, scale):
        """q (M, K) int8, scale (M, 1) -> (M, N) fp32. The sum of K products of int8 is exact in int32 up to K = 133,000."""
        return torch._int_mm(q, self.weight.T).float().mul_(self.scale).mul_(scale)


@functools.cache
def packing():
    """How torch's kernel for int4 wants its weights on this machine -> (rows that it works on side by side, whether a byte holds two that
    are neighbours): 64 with AVX512, 32 with AVX2, and neighbours without either. Raises UserError where it is something else."""
    q = (torch.arange(64 * 64).view(64, 64) * 37 // 64 % 16).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 2)
    for rows, neighbours in itertools.product((64, 32), (False, True)):
        if torch.equal(unpack(packed, rows, neighbours), q):
            return rows, neighbours
    raise UserError("int4: this machine's kernel packs weights in a way that is not known here; choose --quantize int8")


def unpack(packed, rows, neighbours):
    """packed (N, K / 2) uint8, two numbers a byte -> (N, K) uint8 in 0..15. Of so many rows side by side, byte j of column k holds in its
    lower and its upper half the rows 2j and 2j + 1, if these are neighbours, else j and j + rows / 2."""
    blocks = packed.view(-1, packed.shape[1] * 2, rows // 2)                                      # (N / rows, K, rows / 2)
    pairs = torch.stack((blocks & 15, blocks >> 4), 3 if neighbours else 2)                       # the last two: rows
    return pairs.flatten(2).transpose(1, 2).flatten(0, 1)                                         # (N / rows, rows, K) -> (N, K)


class Int4Linear(FrozenLinear):
    """Weights in 4 bits, a scale and a middle for each group of 64 along K: 4.5 bits a weight. A few rows go through torch's kernel
    for packed weights, whose time grows with their number. For many, the weight becomes int8, whose error is small beside that of int4."""
    def __init__(self, tensors, bias=None):
        super().__init__(tensors, bias)
        self.packing = packing()

    @staticmethod
    def fits(N, K):   # 64 rows are what a kernel works on at most; the same everywhere, so that what memory it takes is, too
        return N % 64 == 0 and K % GROUP == 0

    @staticmethod
    def convert(weight):
        parts = []
        for rows in weight.detach().split(ROWS):
            q, scale, middle = round_groups(rows)
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 2)
            parts.append((packed, torch.stack((scale.T, middle.T), dim=2)))   # (rows, K / 2), (K / GROUP, rows, 2)
        return {"weight": torch.cat([w for w, _ in parts]), "groups": torch.cat([groups for _, groups in parts], dim=1)}

    @staticmethod
    def shapes(N, K):
        return {"weight": ((N, K // 2), torch.uint8), "groups": ((K // GROUP, N, 2), torch.bfloat16)}

    def product(self, x):
        if x.device.type == "cpu" and len(x) <= FEW:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), self.weight, GROUP, self.groups)
        if x.device.type != "cpu":
            return F.linear(x, self.numbers(self.weight, self.groups).to(x.dtype))
        scale = self.int8_scale()
        parts = zip(self.weight.split(ROWS), self.groups.split(ROWS, dim=1), scale.split(ROWS))
        q = torch.cat([self.numbers(*part).round_().to(torch.int8) for part in parts])
        return Int8Linear({"weight": q, "scale": scale[:, 0]}).product(x)

    def int8_scale(self):
        """(N, 1) fp32: what the largest number that a row's groups could hold is divided by."""
        scale, middle = self.groups.float().unbind(-1)
        return ((8 * scale + middle.abs()).amax(0) / weight_levels())[:, None]

    def numbers(self, packed, groups, unit=1.0):
        """packed (rows, K / 2), groups (K / GROUP, rows, 2) -> the weights (rows, K) fp32, in units of `unit` (rows, 1)."""
        scale, middle = (groups.float().permute(2, 1, 0) / unit).contiguous().unsqueeze(-1)   # (rows, K / GROUP, 1) each
        q = unpack(packed, *self.packing).unflatten(1, (-1, GROUP)).float()                   # (rows, K / GROUP, GROUP)
        return q.mul_(scale).add_(middle - 8 * scale).flatten(1)


SCHEMES = {"bf16": BF16Linear, "int8": Int8Linear, "int4": Int4Linear}


def scheme_of(name, N, K, scheme):
    """The class for one Linear. int4 leaves to int8: lm_head, whose rows are the words themselves, and what is not whole groups."""
    if scheme == "int4" and (name.endswith("lm_head") or not Int4Linear.fits(N, K)):
        return Int8Linear
    return SCHEMES[scheme]


# ---------------------------------------------------------------------------------------------------- models
def linears(module, scheme):
    """[(name, nn.Linear, class that takes its place)]. Raises UserError for an unknown scheme."""
    if scheme not in SCHEMES:
        raise UserError(f"{scheme}: no such scheme; choose one of {', '.join(SCHEMES)}")
    found = [(name, m, scheme_of(name, m.out_features, m.in_features, scheme)) for name, m in module.named_modules() if isinstance(m, nn.Linear)]
    odd = [name for name, _, kind in found if kind is not SCHEMES[scheme] and not name.endswith("lm_head")]
    if odd:
        warnings.warn(f"int4 takes whole groups of {GROUP} inputs and blocks of 64 outputs; {len(odd)} layers are int8 instead: "
                      f"{', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''}")
    return found


def quantize(module, scheme):
    """Puts a layer of `scheme` in place of every nn.Linear inside `module`, one after the other -> module.

    Weights may be mapped from a file; each is forgotten once its successor is there. The word embeddings stay."""
    for name, linear, kind in linears(module, scheme):
        module.set_submodule(name, kind(kind.convert(linear.weight), linear.bias))
        if kind is not BF16Linear:
            release(linear.weight)
    return module


def quantized(model, scheme, made_from, folder):
    """As quantize, but the work is done once: `folder`/quantised_SCHEME.safetensors is mapped if it was made of just these files
    (made_from, what `origin` said of them before they were read), else made. Where it cannot be written, that is said and the model is
    quantised in memory. -> model"""
    if scheme == "bf16":   # nothing to compute, nothing to keep
        return quantize(model, scheme)
    path, found = os.path.join(folder, f"quantised_{scheme}.safetensors"), linears(model, scheme)
    shapes = {f"{name}.{key}": spec for name, m, kind in found for key, spec in kind.shapes(m.out_features, m.in_features).items()}
    tensors = read_quantised(path, shapes, made_from) if os.path.exists(path) else None
    if tensors is None:
        try:
            write_quantised(path, found, shapes, made_from)
        except UserError as e:
            warnings.warn(f"{e}; quantising in memory, and again at the next start")
            return quantize(model, scheme)
        tensors = read_quantised(path, shapes, made_from)
        if tensors is None:   # another process has put another one in its place
            return quantize(model, scheme)
    for name, linear, kind in found:
        mapped = {key: tensors[f"{name}.{key}"] for key in kind.shapes(linear.out_features, linear.in_features)}
        model.set_submodule(name, kind(mapped, linear.bias))
    return model


def weight_files(*folders):
    """The files in these folders, where there are such, that weights can be in, but for those that `quantized` writes; and the number of
    heads in Meta's layout, which decides how rows are sorted."""
    paths = [os.path.join(folder, name) for folder in filter(os.path.isdir, folders) for name in sorted(os.listdir(folder))]
    paths = [path for path in paths if not os.path.basename(path).startswith("quantised_")]
    return [path for path in paths if path.endswith((".safetensors", ".bin", ".pth", ".pt", "params.json")) and os.path.isfile(path)]


def origin(scheme, source_files):
    """What a file of quantised weights depends on, as text: the files, this scheme's settings, and how this machine wants them."""
    files = [(os.path.realpath(file), os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in sorted(map(os.fspath, source_files))]
    machine = [FORMAT, weight_levels(), GROUP, *packing()] if scheme == "int4" else [FORMAT, weight_levels()]
    return {"scheme": scheme, "settings": json.dumps(machine), "made_from": json.dumps(files)}


def read_quantised(path, shapes, made_from):
    """{name: tensor}, mapped; None, with a word, if the file is of other weights or cut. A flipped bit among the numbers is not noticed:
    to look at all of them would take as long as to copy them."""
    try:
        tensors = read_file(path)
        if read_metadata(path) != made_from:
            raise UserError(f"{path}: made from other weights, or on another kind of machine")
        if {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} != shapes:
            raise UserError(f"{path}: holds other layers than this model has")
    except UserError as e:
        warnings.warn(f"{e}; making it again")
        return None
    return tensors


def write_quantised(path, found, shapes, made_from):
    """The file, atomically and layer by layer: of the whole model, no more than one layer is in memory. Raises UserError."""
    def layers():
        for _, linear, kind in tqdm(found, desc=f"quantising, once: {os.path.basename(path)}", delay=2, file=sys.stderr):
            yield from kind.convert(linear.weight).values()
            release(linear.weight)
    for leftover in glob.glob(glob.escape(path) + ".*.tmp"):   # of gigabytes, by one that was killed; one that still writes does without
        with contextlib.suppress(OSError):
            os.remove(leftover)
    sizes = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()}
    write_safetensors(path, sizes, made_from, values=layers())


def release(t):
    """Tells Linux that the pages under a tensor are not needed soon. What is mapped from a file leaves memory, and is read again if it
    is wanted after all; other memory goes to swap space, if there is some."""
    if sys.platform == "linux" and t.device.type == "cpu":
        start, end = -(-t.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE, (t.data_ptr() + t.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(max(0, end - start)), 21)   # MADV_PAGEOUT, of <sys/mman.h>


def nbytes(module, scheme, dtype):
    """Bytes that `module` takes once its Linears are of `scheme` (None: as they are) and all else is of `dtype`.

    Told by the shapes of its tensors, so that it may be on the meta device. A tensor that two modules share counts once."""
    sizes = {}
    for name, m in module.named_modules():
        for key, t in (*m.named_parameters(recurse=False), *m.named_buffers(recurse=False)):
            if scheme and isinstance(m, nn.Linear) and key == "weight":
                kind = scheme_of(name, *t.shape, scheme)
                size = sum(math.prod(shape) * number.itemsize for shape, number in kind.shapes(*t.shape).values())
                sizes[t if kind is BF16Linear else name] = size
            else:
                sizes[t] = t.numel() * dtype.itemsize
    return sum(sizes.values())


def memory_need(config, scheme=None, dtype=torch.bfloat16, context_length=None):
    """What a decoder of these sizes (LLaMAConfig) takes -> {"weights": bytes, "kv_cache": bytes}, the latter for a full context.

    scheme: a key of SCHEMES, or None: all weights in `dtype`, as word embeddings and KV cache are in any case."""
    c, D = config, config.width
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    block = [(q, D), (kv, D), (kv, D), (D, q), (c.mlp, D), (c.mlp, D), (D, c.mlp)]

    def size(name, N, K):
        shapes = scheme_of(name, N, K, scheme).shapes(N, K).values() if scheme else [((N, K), dtype)]
        return sum(torch.Size(shape).numel() * kind.itemsize for shape, kind in shapes)
    weights = c.layers * sum(size("", *shape) for shape in block) + size("lm_head", c.vocab_size, D) * (not c.tied or scheme not in (None, "bf16"))
    weights += (c.vocab_size * D + (2 * c.layers + 1) * D) * dtype.itemsize   # embed_tokens, norms
    return {"weights": weights, "kv_cache": 2 * c.layers * kv * (context_length or c.context_length) * dtype.itemsize}
