"""Weight files as data: read whatever layout a file has, map it instead of copying it, and never execute any of it.

What a file is, is decided by its first bytes:
  safetensors       a JSON header, then raw tensors: Hugging Face folders
  zip + pickle      torch.save and TorchScript archives: `.pth`, `.bin`, OpenAI's `ViT-L-14.pt`
A pickle is a little program. Ours runs on a machine that knows tensors, ordered dicts and inert stand-ins, and refuses
everything else by name. Tensors are views into a private memory map, so a file costs memory only where it is used.
"""
import collections
import json
import mmap
import os
import pickle
import zipfile

import torch

from common import UserError, write_atomic

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
STORAGES = {"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
            "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
            "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool}
MAX_HEADER = 100 << 20   # bytes; the bound that the safetensors format itself states


# ---------------------------------------------------------------------------------------------------- one file or a folder
def read_tensors(path):
    """path: a weight file, or a Hugging Face folder (one file or shards) -> {name: tensor}, as named and typed in the file.

    Tensors are memory-mapped and private: writing to one never reaches the file. Raises UserError."""
    path = os.fspath(path)
    if not os.path.isdir(path):
        return read_file(path)
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = os.path.join(path, single + ".index.json")
        if os.path.exists(index):
            tensors = {}
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise UserError(f"{index}: its weight_map does not map names to files")
            for shard in sorted(set(shards.values())):
                if os.path.basename(shard) != shard or shard in ("", ".", ".."):
                    raise UserError(f"{index}: names the shard {shard!r} outside its own folder; do not use this file")
                tensors.update(read_file(os.path.join(path, shard)))
            return tensors
        if os.path.exists(os.path.join(path, single)):
            return read_file(os.path.join(path, single))
    raise UserError(f"{path}: no model.safetensors or pytorch_model.bin (nor an index of shards) in this folder")


def read_file(path):
    """One weight file -> {name: tensor}; nested modules of a TorchScript archive become dotted names. Raises UserError."""
    buffer = map_file(path)
    if buffer[:4] == b"PK\x03\x04":
        return read_zip_pickle(path, buffer)
    if buffer[8:9] == b"{":
        return read_safetensors(path, buffer)
    raise UserError(f"{path}: neither safetensors nor a torch.save file (is the download complete?)")


def read_json(path):
    """A JSON object from a file. Raises UserError if it is missing or is something else."""
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}")
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not valid JSON ({e})")
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def map_file(path):
    """The bytes of a file as a private, writable memory map."""
    try:
        with open(path, "rb") as f:
            return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}")
    except ValueError:
        raise UserError(f"{path}: the file is empty")


# ---------------------------------------------------------------------------------------------------- safetensors
def read_safetensors(path, buffer):
    """https://huggingface.co/docs/safetensors: u64 header length, JSON {name: dtype, shape, [begin, end)}, raw bytes."""
    header_bytes = int.from_bytes(buffer[:8], "little")
    data = 8 + header_bytes
    if header_bytes > min(MAX_HEADER, len(buffer) - 8):
        raise UserError(f"{path}: its header claims {header_bytes} bytes of {len(buffer)}; the file is cut or damaged")
    try:
        header = json.loads(buffer[8:data])
        entries = []
        for name, e in header.items():
            if name != "__metadata__":
                begin, end = map(int, e["data_offsets"])
                entries.append((name, DTYPES[e["dtype"]], [int(n) for n in e["shape"]], begin, end))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as e:
        raise UserError(f"{path}: damaged safetensors header ({type(e).__name__}: {e})")
    tensors, end_of_last = {}, 0
    for name, dtype, shape, begin, end in sorted(entries, key=lambda e: e[3:]):
        count = 1
        for n in shape:
            count *= n
        if min(shape, default=0) < 0 or max(shape, default=0) > len(buffer) or begin != end_of_last or end - begin != count * dtype.itemsize:
            raise UserError(f"{path}: {name} has shape {shape} at bytes {begin}..{end}; the header is damaged")
        if data + end > len(buffer):
            raise UserError(f"{path}: cut: {name} ends at byte {data + end} of {len(buffer)}; download it again")
        tensors[name], end_of_last = view(buffer, dtype, data + begin, count).view(shape), end
    return tensors


def view(buffer, dtype, offset, count):
    """`count` numbers of a mapped file, without a copy (torch cannot make an empty view of a buffer)."""
    return torch.frombuffer(buffer, dtype=dtype, offset=offset, count=count) if count else torch.empty(0, dtype=dtype)


def write_safetensors(path, tensors, metadata=None):
    """{name: tensor} -> one file, atomically: either the old file is there or the whole new one."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header, offset = {"__metadata__": metadata or {}}, 0
    for name, t in tensors.items():
        header[name] = {"dtype": codes[t.dtype], "shape": list(t.shape), "data_offsets": [offset, offset + t.nbytes]}
        offset += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)   # tensors start aligned

    def write(f):
        f.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            f.write(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    write_atomic(path, write)


def read_metadata(path):
    """{name: text} that a safetensors file, which read_file has accepted, carries beside its tensors. Raises UserError."""
    buffer = map_file(path)
    metadata = json.loads(buffer[8:8 + int.from_bytes(buffer[:8], "little")]).get("__metadata__", {}) if buffer[8:9] == b"{" else {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise UserError(f"{path}: damaged safetensors header (its metadata is not text)")
    return metadata


# ---------------------------------------------------------------------------------------------------- zip + pickle
class Inert:
    """Stands for an object of a class that we do not have (a TorchScript module, a logger): keeps its state, does nothing."""
    def __init__(self, *args, **kwargs):
        self.state = {}

    def __setstate__(self, state):
        self.state = state

    def __setitem__(self, key, value):   # what a pickle does to fill a dict-like object ...
        self.state[key] = value

    def append(self, value):             # ... and a list-like one
        pass

    extend = append


KNOWN = {("collections", "OrderedDict"): collections.OrderedDict, ("torch", "Size"): tuple,
         ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
         ("torch.jit._pickle", "build_intlist"): list, ("torch.jit._pickle", "build_boollist"): list,
         ("torch.jit._pickle", "build_doublelist"): list, ("torch.jit._pickle", "build_tensorlist"): list,
         ("torch.jit._pickle", "restore_type_tag"): lambda value, tag: value,
         # what an mmengine checkpoint has beside its tensors: the history of its log
         ("mmengine.logging.history_buffer", "HistoryBuffer"): Inert, ("builtins", "getattr"): Inert, ("__builtin__", "getattr"): Inert,
         ("numpy.core.multiarray", "_reconstruct"): Inert, ("numpy._core.multiarray", "_reconstruct"): Inert,
         ("numpy.core.multiarray", "scalar"): Inert, ("numpy._core.multiarray", "scalar"): Inert,
         ("numpy", "ndarray"): Inert, ("numpy", "dtype"): Inert, ("_codecs", "encode"): Inert}


class DataUnpickler(pickle.Unpickler):
    """A pickle machine that can only build data: KNOWN names, tensor storages, and Inert for TorchScript classes."""
    def __init__(self, file, path, storage):
        super().__init__(file, encoding="utf-8")
        self.path, self.storage = path, storage

    def find_class(self, module, name):
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.rebuild_tensor
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module.split(".")[0] == "__torch__":
            return type(name, (Inert,), {})
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        raise UserError(f"{self.path}: this pickle asks for {module}.{name}, which is not weight data; refused")

    def persistent_load(self, pid):
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"unknown record {kind!r}")
        return self.storage(dtype, str(key), count)

    @staticmethod
    def rebuild_tensor(storage, offset, shape, stride, *_):
        return storage.as_strided(tuple(shape), tuple(stride), offset)   # torch checks the bounds


def read_zip_pickle(path, buffer):
    """{name: tensor} of a torch.save or TorchScript archive, mapped from `buffer`. Raises UserError."""
    try:
        archive = zipfile.ZipFile(path)
        entries = {e.filename.split("/", 1)[-1]: e for e in archive.infolist()}
        if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
            raise UserError(f"{path}: written on a big-endian machine; re-save it on a little-endian one")

        def storage(dtype, key, count):
            entry = entries["data/" + key]
            head = entry.header_offset   # a local header is 30 bytes, then the name and padding of stated lengths
            start = head + 30 + int.from_bytes(buffer[head + 26:head + 28], "little") \
                + int.from_bytes(buffer[head + 28:head + 30], "little")
            if entry.compress_type != zipfile.ZIP_STORED or count * dtype.itemsize > entry.file_size:
                raise pickle.UnpicklingError(f"storage {key} does not hold {count} numbers")
            return view(buffer, dtype, start, count)
        with archive.open(entries["data.pkl"]) as f:
            return flatten(DataUnpickler(f, path, storage).load(), path)
    except UserError:
        raise
    except (zipfile.BadZipFile, KeyError) as e:
        raise UserError(f"{path}: cut, or not a torch.save file ({e}); download it again")
    except Exception as e:   # a hostile pickle can make the machine raise anything
        raise UserError(f"{path}: damaged pickle ({type(e).__name__}: {e})")


def flatten(value, path):
    """{name: tensor} of whatever was pickled: a dict, a checkpoint around a `state_dict`, or nested TorchScript modules."""
    tensors = {}

    def walk(value, name):
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        children = value.state if isinstance(value, Inert) else value
        if isinstance(children, dict):
            for key, child in children.items():
                walk(child, f"{name}.{key}" if name else str(key))
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    walk(value, "")
    if not tensors:
        raise UserError(f"{path}: holds no tensors")
    return tensors


# ---------------------------------------------------------------------------------------------------- into a module
def load_into(module, tensors, source, optional=()):
    """Gives `module` exactly the `tensors` of file `source`: same names, same shapes, nothing left over on either side.

    Tensors are adopted, not copied (they keep the dtype and the memory map of the file). Names in `optional` may be
    missing and keep their values. Raises UserError with the first offenders."""
    wanted = module.state_dict()
    missing = [k for k in wanted if k not in tensors and k not in optional]
    unexpected = [k for k in tensors if k not in wanted]
    shapes = [f"{k} {tuple(tensors[k].shape)} where {tuple(wanted[k].shape)} is expected"
              for k in wanted if k in tensors and tensors[k].shape != wanted[k].shape]
    numbers = [k for k in wanted if k in tensors and tensors[k].is_floating_point() != wanted[k].is_floating_point()]
    problems = [f"{len(names)} {kind}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
                for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another size", shapes), ("of another kind of number", numbers)) if names]
    if problems:
        raise UserError(f"{source}: does not fit this model: {'; '.join(problems)}")
    module.load_state_dict({**wanted, **tensors}, assign=True)
    return module
