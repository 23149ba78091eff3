"""Weight files as data: read any layout, map files instead of copying them, never execute anything.

The first bytes of a file decide what it is:
  safetensors       a JSON header, then raw tensors: Hugging Face folders
  zip + pickle      torch.save and TorchScript archives: `.pth`, `.bin`, OpenAI's `ViT-L-14.pt`
A pickle is a little program. Here it can build plain containers and descriptions of tensors; whatever else it
asks for is refused. Tensors are views into a private memory map: a file costs memory only where it is used.

A file may be hostile. What it claims is checked against what it has before memory is taken for it. Names from
it are shown without control characters.
"""
import contextlib
import io
import json
import math
import mmap
import os
import pickle
import re
import struct
import zipfile
from collections import namedtuple

import torch
import torch.overrides

from plumbing.cli import UserError, write_atomic

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "BOOL": torch.bool, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8}
# Bytes of a header, a pickle, a zip's directory or a JSON file, at most: a byte can ask for an object of 90.
# A LLaMA of 70B needs 0.1 MB, the log in a checkpoint of mmengine about 1.
MAX_HEADER = 4 << 20
WRAPPERS = re.compile(   # what DDP, torch.compile, peft and FSDP put before names or into them
    r"^(module\.|_orig_mod\.|base_model\.model\.)+"
    r"|\b_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")
DAMAGE = (   # what reading a file raises that is not what it claims
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, EOFError, struct.error,
    zipfile.BadZipFile, pickle.UnpicklingError)


# ---------------------------------------------------------------------------------------- a file or a folder
def read_tensors(path):
    """path: a weight file, or a Hugging Face folder (one file or shards) -> {name: tensor}, as in the file.

    Tensors are memory-mapped and private: writing to one never reaches the file. Raises UserError."""
    path = os.fspath(path)
    if not os.path.isdir(path):
        return read_file(path)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if os.path.exists(file := os.path.join(path, name)):
            return read_file(file)
        if os.path.exists(index := file + ".index.json"):
            try:
                shards = {os.path.basename(shard) for shard in read_json(index)["weight_map"].values()}
            except DAMAGE as e:
                raise UserError(f"{index}: not a list of shards ({type(e).__name__}: {shown(e)})")
            parts = (read_file(os.path.join(path, shard)) for shard in sorted(shards))   # all in this folder
            return {name: t for part in parts for name, t in part.items()}
    raise UserError(f"{path}: no model.safetensors or pytorch_model.bin (nor an index of shards) in it; "
                    f"{likely_reason(os.listdir(path))}")


def read_file(path, advice="get it again, from Git LFS with `git lfs pull`"):
    """One weight file -> {name: tensor}, TorchScript's with dotted names. Raises UserError with `advice`."""
    buffer = map_file(path)
    try:
        if buffer[:4] == b"PK\x03\x04":
            tensors = read_zip_pickle(buffer)
        elif buffer[8:9] == b"{":
            tensors = read_safetensors(buffer)
        else:
            raise ValueError("neither safetensors nor torch.save of torch 1.6 or later: "
                             f"{bytes(buffer[:30])!r}")
        return {WRAPPERS.sub("", name): t for name, t in tensors.items()}
    except DAMAGE as e:
        what = f"{type(e).__name__}: {shown(e, 250)}"
        raise UserError(f"{path}: cut, damaged or no weight data ({what}); {advice}")


def shown(text, longest=100):
    """A name from a file, fit for a terminal: no control characters, not too long."""
    text = "".join(c if c.isprintable() else "?" for c in str(text)[:longest + 1])
    return text if len(text) <= longest else text[:longest - 3] + "..."


def read_json(path):
    """A JSON object from the first MAX_HEADER bytes of a file. Raises UserError if it is something else."""
    buffer = map_file(path)
    try:
        value = json.loads(buffer[:MAX_HEADER])
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not valid JSON ({shown(e)})")
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def map_file(path):
    """The bytes of a file as a private, writable memory map. Raises UserError."""
    if not os.path.isfile(path):   # a pipe would wait for ever
        raise UserError(f"{shown(path, 1000)}: No such file, or no regular one")
    try:
        with open(path, "rb") as f:
            return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as e:   # ValueError: an empty file
        raise UserError(f"{shown(path, 1000)}: {getattr(e, 'strerror', e)}")


# ---------------------------------------------------------------------------------------- safetensors
def read_safetensors(buffer):
    """https://huggingface.co/docs/safetensors: u64 header length, JSON {name: dtype, shape, place}, bytes.
    Raises one of DAMAGE."""
    at = 8 + int.from_bytes(buffer[:8], "little")
    header, tensors = json.loads(buffer[8:min(at, MAX_HEADER)]), {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{shown(name)} is {shown(entry['dtype'])}, as in a model {QUANTISED}")
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if at + end > len(buffer):
            raise ValueError(f"{len(buffer):,} bytes, but {shown(name)} ends at {at + end:,}")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{shown(name)} has shape {shown(shape)} at bytes {begin}..{end}")
        tensors[name] = view(buffer, dtype, at + begin, math.prod(shape)).view(shape)
    return tensors


def view(buffer, dtype, at, count):
    """`count` numbers of a mapped file, without a copy."""
    if not count:   # torch cannot make an empty view of a buffer
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype, offset=at, count=count)


def write_safetensors(path, tensors, metadata=None, values=None):
    """{name: tensor} -> one file, atomically: either the old file is there or the whole new one.

    values: the same tensors in the same order, made one by one as they are written; `tensors` then only says
    what they will be. Raises UserError where the folder cannot be written."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header, at = {"__metadata__": metadata or {}}, 0
    for name, t in tensors.items():
        header[name] = {"dtype": codes[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)   # tensors start aligned

    def write(f):
        f.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values() if values is None else values:
            f.write(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    write_atomic(path, write)


def read_metadata(path):
    """{name: text} beside the tensors of a file that read_file has accepted. Raises UserError."""
    buffer = map_file(path)
    header = json.loads(buffer[8:8 + int.from_bytes(buffer[:8], "little")]) if buffer[8:9] == b"{" else {}
    metadata = header.get("__metadata__")   # no other layout has any
    return {key: str(text) for key, text in metadata.items()} if isinstance(metadata, dict) else {}


# ---------------------------------------------------------------------------------------- zip + pickle
# A pickle describes tensors, with the arguments of torch._utils._rebuild_tensor_v2. They are made at the end.
Storage = namedtuple("Storage", "dtype key count")   # the entry data/KEY of the archive
Described = namedtuple("Described", "storage offset shape stride grad hooks metadata", defaults=[None])


class Record(dict):
    """Stands for a dict and for an object of any class. It does nothing; its state is the entry named ""."""
    def __init__(self, *_):
        super().__init__()

    def __setitem__(self, key, value):
        if not isinstance(key, (str, int)):   # to hash a tuple in a tuple, 100,000 deep, would crash Python
            raise ValueError(f"a {type(key).__name__} as a key")
        super().__setitem__(str(key), value)


def same(value=(), *_):
    """A list stays a list and a parameter a tensor. Not copied: copies of copies could fill a memory."""
    return value


def without_attributes(rebuild, kind, arguments, *_):
    """A tensor that somebody gave attributes: what it would be without them."""
    return rebuild(*arguments)


KNOWN = {   # the names that a pickle may ask for, or modules with all their names, and what it gets
    "torch._utils._rebuild_tensor_v2": Described, "torch._utils._rebuild_parameter": same,
    "torch._utils._rebuild_parameter_with_state": same, "torch.Size": same, "torch.Tensor": same,
    "torch._tensor._rebuild_from_type_v2": without_attributes,
    "torch.jit._pickle": same, "__torch__": Record, "collections.OrderedDict": Record,
    **{f"torch.{name}Storage": dtype for name, dtype in zip(
        "Double Float Half BFloat16 Bool Long Int Short Char Byte".split(), DTYPES.values(), strict=True)},
    **dict.fromkeys("mmengine numpy builtins.getattr __builtin__.getattr _codecs.encode".split(), Record)}


class DataPickle(pickle._Unpickler):
    """Python's unpickler, with the opcodes and names that torch and mmengine write and no others.

    Nothing is imported, and only what stands in KNOWN is called. The unpickler in C will not do: told so by
    five bytes, it reserves 32 GB for its memo."""
    def find_class(self, module, name):
        for asked in (f"{module}.{name}", module, module.split(".")[0]):
            if asked in KNOWN:
                return KNOWN[asked]
        raise pickle.UnpicklingError(f"it asks for {shown(module)}.{shown(name)}, not weight data")

    def persistent_load(self, record):
        kind, dtype, key, _, count = record
        if (kind, type(dtype), type(key), type(count)) != ("storage", torch.dtype, str, int):
            raise ValueError("an unknown record")
        return Storage(dtype, key, count)

    def load_empty_dictionary(self):
        self.append(Record())

    def load_build(self):
        state = self.stack.pop()
        self.stack[-1][""] = state   # of a Record; anything else has no such entry, a TypeError

    def load_other(self):
        raise pickle.UnpicklingError("it uses an opcode that weight data does not need")

    dispatch = dict.fromkeys(range(256), load_other)
    dispatch |= {code: pickle._Unpickler.dispatch[code] for code in (
        b"\x80\x95.(0qr\x94hj"                   # protocol, frame, stop; mark, pop; the memo
        b"N\x88\x89KMJG\x8aX\x8c\x8dBC\x8e"      # None, True, False; whole numbers, floats; texts, bytes
        b"])\x85\x86\x87tsuaec\x93RQ")}          # lists, tuples; their items; names, calls, storages
    dispatch |= {ord("}"): load_empty_dictionary, ord("b"): load_build,
                 0x81: dispatch[ord("R")]}       # NEWOBJ: an object is made by a call of its class


def read_zip_pickle(buffer):
    """{name: tensor} of a torch.save or TorchScript archive, mapped from `buffer`. Raises one of DAMAGE."""
    entries, tensors = {}, {}
    for info in zipfile.ZipFile(buffer).infolist():   # another header precedes the bytes
        start = info.header_offset + 30 + sum(struct.unpack_from("<26xHH", buffer, info.header_offset))
        entries[info.filename.split("/", 1)[-1]] = start, info.file_size
    start, size = entries["data.pkl"]
    if size > MAX_HEADER:
        raise ValueError(f"a pickle of {size:,} bytes")
    content = DataPickle(io.BytesIO(buffer[start:start + size])).load()
    if isinstance(content, Record) and isinstance(content.get("state_dict"), Record):
        content = content["state_dict"]   # a checkpoint has more beside it
    for visits, (name, value) in enumerate(named_values(content)):
        if visits > 100_000 or len(name) > 1000:   # a dict that holds another twice, which holds ...
            raise ValueError("it is nested too deeply")
        if isinstance(value, Described):
            tensors[name] = make_tensor(value, buffer, entries)
    return tensors


def named_values(value, name=""):
    """(dotted name, value) of a value and of all that it holds."""
    yield name, value
    if isinstance(value, Record):
        for key, child in value.items():
            yield from named_values(child, ".".join(filter(None, (name, key))))


def make_tensor(described, buffer, entries):
    """The numbers that a pickle describes, as a view of the mapped file."""
    storage, offset, shape, stride, *_ = described
    start, size = entries[f"data/{storage.key}"]
    if not 0 <= storage.count * storage.dtype.itemsize <= size:
        raise ValueError(f"storage {shown(storage.key)} does not hold {storage.count:,} numbers")
    if math.prod(shape) > storage.count:   # a stride of 0 can make one number look like a terabyte
        raise ValueError(f"a tensor of {math.prod(shape):,} numbers in a storage of {storage.count:,}")
    return view(buffer, storage.dtype, start, storage.count).as_strided(shape, stride, offset)


# ---------------------------------------------------------------------------------------- into a module
QUANTISED = "quantised by another program: take the release in fp16 or bf16"
LIKELY = {   # what a tensor's name that is left over says about its file, or a file's name about its folder
    r"lora_[AB]|^adapter_": "an adapter (LoRA), not a model: merge it into the one it was trained on",
    r"(?i)gptq|awq|gguf|ggml": f"a model {QUANTISED}",
    r"-of-\d+\.": "shards without their list: get the file that ends in .index.json as well",
    r"^(model\.)?language_model\.|^multi_modal_projector":
        "a LLaVA rewritten for transformers: take the original release",
    r"^model\.embed_tokens|^model\.layers\.\d|^tok_embeddings": "a LLaMA, or a relative such as Qwen",
    r"^(vision_model|text_model)\.|^visual\.": "a CLIP",
    r"[bB][tT][aA]dapter|timesFPN": "a BT-Adapter branch", r"mm_projector": "a projector of LLaVA"}


def likely_reason(names):
    """In words, what a file or folder is whose `names` are not those that were expected."""
    for pattern, reason in LIKELY.items():
        if any(re.search(pattern, name) for name in names):
            return f"it looks like {reason}"
    return "is it of another kind or size, or only a part of a model?"


class NoInit(torch.overrides.TorchFunctionMode):
    """Passes by the random numbers that a new module begins with."""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") != "torch.nn.init":
            return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def shapes_only():
    """Modules made inside have shapes and no numbers: those come from a file. (To draw numbers on the meta
    device, torch would import a second's worth of modules.)"""
    with torch.device("meta"), NoInit():
        yield


def check_fit(wanted, tensors, source, reason=None):
    """Raises UserError if the `tensors` {name: tensor} of file `source` are not floats of the shapes `wanted`
    {name: tuple}, with an example of each kind of misfit, and `reason` or the likely one."""
    kinds = {"missing": [name for name in wanted if name not in tensors],
             "unexpected": [name for name in tensors if name not in wanted],
             "of another size or dtype": [
                 name for name in wanted if name in tensors and (wanted[name], True) !=
                 (tensors[name].shape, tensors[name].is_floating_point())]}
    if any(kinds.values()):
        found = {name: f"{tuple(t.shape)} {str(t.dtype)[6:]}" for name, t in tensors.items()}
        examples = [f"{len(names)} {kind}, as {shown(names[0])}: {found.get(names[0], 'nothing')} in the "
                    f"file, {wanted.get(names[0], 'nothing')} in the model"
                    for kind, names in kinds.items() if names]
        raise UserError(f"{source}: does not fit this model: {'; '.join(examples)}; "
                        f"{reason or likely_reason(kinds['unexpected'])}")


def load_into(module, tensors, source):
    """Gives `module` exactly the `tensors` of file `source`. They are adopted, not copied: they keep the
    dtype and the memory map of the file. Raises UserError as check_fit does."""
    wanted = module.state_dict()
    check_fit({name: tuple(t.shape) for name, t in wanted.items()}, tensors, source)
    module.load_state_dict({**wanted, **tensors}, assign=True)
    return module
