"""Weight files as data: read whatever layout a file has, map it instead of copying it, and never execute any of it.

What a file is, is decided by its first bytes:
  safetensors       a JSON header, then raw tensors: Hugging Face folders
  zip + pickle      torch.save and TorchScript archives: `.pth`, `.bin`, OpenAI's `ViT-L-14.pt`
A pickle is a little program. Ours runs on a machine of our own that knows tensors, plain containers and inert stand-ins, and
refuses everything else by name. Tensors are views into a private memory map, so a file costs memory only where it is used.

A file may be hostile. Whatever it claims is checked against what it has before memory is taken for it, names that it
brings are shown without control characters, and only regular files are opened: a pipe would wait for ever.
"""
import contextlib
import json
import mmap
import os
import re
import stat
import struct

import torch
import torch.overrides

from plumbing.cli import UserError, write_atomic

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
STORAGES = {"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
            "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
            "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool}
# A header, a pickle, a JSON file: bytes at most. safetensors itself allows 100 MB, but a byte of `[` or of a pickle can ask
# for a Python object of 64 bytes. A LLaMA of 70B needs 0.1 MB, the log in a checkpoint of mmengine about 1.
MAX_HEADER = 8 << 20
MAX_NAMES = 100_000   # tensors in one file


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
            return read_shards(path, index)
        if os.path.exists(os.path.join(path, single)):
            return read_file(os.path.join(path, single))
    raise UserError(f"{path}: no model.safetensors or pytorch_model.bin (nor an index of shards) in this folder")


def read_index(index):
    """What an index of shards says -> {name of a tensor: file, always in its own folder}. Raises UserError."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise UserError(f"{index}: its weight_map does not map names to files")
    for shard in sorted(set(shards.values())):
        if re.search(r"[/\\\0]", shard) or shard in ("", ".", ".."):
            raise UserError(f"{index}: names the shard {shown(shard)!r} outside its own folder; do not use this file")
    return shards


def read_shards(folder, index):
    """The files that an index names -> {name: tensor}. Raises UserError."""
    shards, tensors = read_index(index), {}
    for shard in sorted(set(shards.values())):
        part = read_file(os.path.join(folder, shard))
        for name in part:
            if name in tensors or shards.get(name, shard) != shard:
                raise UserError(f"{index}: {shown(name)} is in {shown(shard)} and in another shard; which one counts?")
        tensors.update(part)
    return tensors


def read_file(path):
    """One weight file -> {name: tensor}; nested modules of a TorchScript archive become dotted names. Raises UserError."""
    buffer = map_file(path)
    if buffer[:4] == b"PK\x03\x04":
        return read_zip_pickle(path, buffer)
    if buffer[8:9] == b"{":
        return read_safetensors(path, buffer)
    for start, kind in OTHER_FILES.items():
        if buffer[:len(start)] == start:
            raise UserError(f"{path}: {kind}")
    raise UserError(f"{path}: neither safetensors nor a torch.save file (is the download complete?)")


OTHER_FILES = {   # what else is found under the names of weight files, by its first bytes
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9": "a torch.save file as before torch 1.6; load and save it once with a newer torch",
    b"\x80": "a bare pickle, not a torch.save file; refused", b"GGUF": "a file of llama.cpp (GGUF); take the safetensors or .bin release",
    b"version https://git-lfs": "a pointer of Git LFS where the weights should be; fetch them with `git lfs pull`",
    b"<": "a web page; was the download refused?"}


def shown(text, longest=100):
    """A name from a file, fit for a terminal: no control characters, not too long."""
    text = "".join(c if c.isprintable() else "?" for c in str(text)[:longest + 1])
    return text if len(text) <= longest else text[:longest - 3] + "..."


def read_json(path):
    """A JSON object from a file. Raises UserError if it is missing or is something else."""
    buffer = map_file(path)
    if len(buffer) > MAX_HEADER:
        raise UserError(f"{path}: {len(buffer):,} bytes; that is no description of a model")
    try:
        value = json.loads(bytes(buffer))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not valid JSON ({shown(e)})")
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def map_file(path):
    """The bytes of a file as a private, writable memory map. Raises UserError, also for what is not a plain file."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)   # without NONBLOCK a pipe waits for its writer
    except (OSError, ValueError) as e:   # ValueError: a NUL in the name
        raise UserError(f"{shown(path, 1000)}: {getattr(e, 'strerror', e)}")
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: {'a folder' if stat.S_ISDIR(status.st_mode) else 'not a regular file'}; a file is needed here")
        if status.st_size == 0:
            raise UserError(f"{path}: the file is empty")
        return mmap.mmap(file, 0, access=mmap.ACCESS_COPY)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}")
    finally:
        os.close(file)


# ---------------------------------------------------------------------------------------------------- safetensors
def read_safetensors(path, buffer):
    """https://huggingface.co/docs/safetensors: u64 header length, JSON {name: dtype, shape, [begin, end)}, raw bytes.

    The tensors must fill the rest of the file from end to end, in whatever order: no hole, no overlap, nothing behind."""
    header_bytes = int.from_bytes(buffer[:8], "little")
    data = 8 + header_bytes
    if header_bytes > min(MAX_HEADER, len(buffer) - 8):
        raise UserError(f"{path}: its header claims {header_bytes:,} bytes of {len(buffer):,}; the file is cut or damaged")
    try:
        header = json.loads(buffer[8:data], object_pairs_hook=without_doubles)
        strange = {e["dtype"] for name, e in header.items() if name != "__metadata__"} - DTYPES.keys()
        if strange:
            raise UserError(f"{path}: holds numbers of type {shown(', '.join(sorted(map(str, strange))))}, which this program does not read; take the "
                            "release in fp16 or bf16")
        entries = [(name, DTYPES[e["dtype"]], whole(e["shape"]), *whole(e["data_offsets"], 2))
                   for name, e in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path}: damaged safetensors header ({type(e).__name__}: {shown(e)})")
    tensors, expected = {}, 0
    for name, dtype, shape, begin, end in sorted(entries, key=lambda e: e[3:]):
        count = 1
        for n in shape:
            count *= n
        if max(shape, default=0) > 1 << 48 or begin != expected or end - begin != count * dtype.itemsize:
            raise UserError(f"{path}: {shown(name)} has shape {shown(shape)} at bytes {begin}..{end}; the header is damaged")
        expected = end
    check_length(path, buffer, data + expected)
    for name, dtype, shape, begin, end in entries:
        tensors[name] = view(buffer, dtype, data + begin, (end - begin) // dtype.itemsize).view(shape)
    return tensors


def without_doubles(pairs):
    """What JSON calls an object; of two entries of one name json.loads would silently keep the second."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name stands in it twice")
    return dict(pairs)


def whole(numbers, count=None):
    """A list of (`count`) numbers from 0 on, as it is. Raises ValueError for anything else, True and 1.0 included."""
    good = isinstance(numbers, list) and len(numbers) <= 64 and all(type(n) is int and n >= 0 for n in numbers)
    if not good or count not in (None, len(numbers)):
        raise ValueError(f"whole numbers are needed, not {shown(numbers)}")
    return numbers


def check_length(path, buffer, expected, about=""):
    """Raises UserError where a file is shorter than it must have been once, or longer."""
    if len(buffer) < expected:
        raise UserError(f"{path}: cut: {len(buffer):,} bytes where {about}{expected:,} are expected; download it again")
    if len(buffer) > expected and not about:
        raise UserError(f"{path}: {len(buffer):,} bytes where {expected:,} are expected; the file is damaged")


def view(buffer, dtype, offset, count):
    """`count` numbers of a mapped file, without a copy (torch cannot make an empty view of a buffer)."""
    return torch.frombuffer(buffer, dtype=dtype, offset=offset, count=count) if count else torch.empty(0, dtype=dtype)


def write_safetensors(path, tensors, metadata=None, values=None):
    """{name: tensor} -> one file, atomically: either the old file is there or the whole new one.

    values: the same tensors in the same order, made one by one as they are written; `tensors` then only says what they will be."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header, offset = {"__metadata__": metadata or {}}, 0
    for name, t in tensors.items():
        header[name] = {"dtype": codes[t.dtype], "shape": list(t.shape), "data_offsets": [offset, offset + t.nbytes]}
        offset += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)   # tensors start aligned

    def write(f):
        f.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values() if values is None else values:
            f.write(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    write_atomic(path, write)


def read_metadata(path):
    """{name: text} that a safetensors file, which read_file has accepted, carries beside its tensors. Raises UserError."""
    buffer = map_file(path)
    metadata = json.loads(buffer[8:8 + int.from_bytes(buffer[:8], "little")]).get("__metadata__", {}) if buffer[8:9] == b"{" else {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise UserError(f"{path}: damaged safetensors header (its metadata is not text)")
    return metadata


# ---------------------------------------------------------------------------------------------------- pickle
class Inert:
    """Stands for an object of a class that we do not have (a TorchScript module, a logger): keeps its state, does nothing."""
    def __init__(self, *args, **kwargs):
        self.state = {}


def plain_dict(pairs=()):
    """What OrderedDict(pairs) is asked for: an empty one, or pairs, as Python 2 wrote them."""
    made = {}
    if type(pairs) not in (list, tuple) or not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError("an OrderedDict of something else than pairs")
    for key, value in pairs:
        put(made, key, value)
    return made


def put(target, key, value):
    """target[key] = value, where target is a dict or stands for one. A key is a name: what hashes slowly or deeply is none."""
    if not isinstance(key, (str, int)):
        raise ValueError(f"a {type(key).__name__} as a key")
    (target.state if isinstance(target, Inert) else target)[key] = value


def same(value=(), *_):
    """A list stays a list and a parameter a tensor. Not copied: copies of copies could fill a memory."""
    return value


KNOWN = {("collections", "OrderedDict"): plain_dict, ("torch", "Size"): same, ("torch._utils", "_rebuild_parameter"): same,
         **{("torch.jit._pickle", name): same for name in ("build_intlist", "build_boollist", "build_doublelist", "build_tensorlist",
                                                           "restore_type_tag")},
         # what an mmengine checkpoint has beside its tensors: the history of its log
         ("mmengine.logging.history_buffer", "HistoryBuffer"): Inert, ("_codecs", "encode"): Inert,
         ("builtins", "getattr"): Inert, ("__builtin__", "getattr"): Inert, ("numpy", "ndarray"): Inert, ("numpy", "dtype"): Inert,
         **{(f"numpy.{core}.multiarray", name): Inert for core in ("core", "_core") for name in ("_reconstruct", "scalar")}}


class DataPickle:
    """A pickle machine that can only build data. Its opcodes are those of OPCODES; a class or function that a pickle asks for
    is one of KNOWN, a storage, or (the classes of TorchScript) Inert. Nothing is imported, looked up or called by its name.

    storage(dtype, key, count) -> a tensor of `count` numbers. Python's own unpickler will not do even with its look-up
    replaced: it hashes what it is told to, and a five-byte opcode makes it reserve 32 GB for its memo."""
    def __init__(self, data, path, storage):
        self.data, self.at, self.path, self.storage = data, 0, path, storage
        self.stack, self.marks, self.memo = [], [], {}

    def load(self):
        while (code := self.take(1)) != b".":
            if code not in OPCODES:
                raise UserError(f"{self.path}: this pickle uses the opcode {code!r}, which weight data does not need; refused")
            OPCODES[code](self)
        return self.stack.pop()

    def take(self, count):
        """The next `count` bytes."""
        start, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise ValueError("it ends in the middle")
        return self.data[start:self.at]

    def number(self, layout):
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def text(self, layout):
        return self.take(self.number(layout)).decode("utf-8", "replace")

    def line(self):
        text = self.take(self.data.index(b"\n", self.at) - self.at).decode("utf-8", "replace")
        self.at += 1
        return text

    def push(self, value):
        self.stack.append(value)

    def pop(self):
        return self.stack.pop()

    def since_mark(self):
        """Takes from the stack what was put there since the last mark."""
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def find(self, module, name):
        """What a pickle means by module.name. Raises UserError for all that is not weight data."""
        if not isinstance(module, str) or not isinstance(name, str):   # to look such a thing up is to hash it, however deep it is
            raise UserError(f"{self.path}: this pickle asks for something whose name is no text, which is not weight data; refused")
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return rebuild_tensor
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module.split(".")[0] == "__torch__":
            return Inert
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        raise UserError(f"{self.path}: this pickle asks for {shown(module)}.{shown(name)}, which is not weight data; refused")

    def reduce(self):
        args, function = self.pop(), self.pop()
        if type(args) is not tuple:   # to take a tensor apart is to make a tensor of each of its numbers
            raise ValueError("arguments that are no tuple")
        self.push(function(*args))   # only `find` puts on the stack what can be called

    def build(self):
        state, target = self.pop(), self.stack[-1]
        if isinstance(target, Inert):
            target.state = state
        elif type(target) is not dict:   # the attributes of an OrderedDict are left out
            raise ValueError(f"a state for a {type(target).__name__}")

    def set_items(self, pairs):
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            put(self.stack[-1], key, value)

    def append(self, values):
        if type(self.stack[-1]) is list:   # what is appended to a stand-in is left out
            self.stack[-1].extend(values)

    def persistent(self):
        record = self.pop()   # ("storage", dtype, key, device, count)
        if type(record) is not tuple or len(record) != 5 or record[0] != "storage" or type(record[1]) is not torch.dtype \
                or type(record[2]) not in (str, int) or type(record[4]) is not int or record[4] < 0:
            raise ValueError("an unknown record")
        self.push(self.storage(record[1], str(record[2]), record[4]))


def rebuild_tensor(storage, offset, shape, stride, *_):
    """A view of a storage. torch checks that it stays inside; that it is no larger is for us to say: a stride of 0 can make
    one number look like a terabyte."""
    if not isinstance(shape, (list, tuple)) or len(shape) > 64:
        raise ValueError("the shape of a tensor is no list of sizes")
    tensor = storage.as_strided(shape, stride, offset)
    if tensor.numel() > storage.numel():
        raise ValueError(f"a tensor of {tensor.numel():,} numbers in a storage of {storage.numel():,}")
    return tensor


OPCODES = {   # of pickle's protocols 2 to 5, those that torch's and mmengine's writers use
    b"\x80": lambda p: p.take(1), b"\x95": lambda p: p.take(8),   # protocol, frame: nothing to do
    b"(": lambda p: p.marks.append(len(p.stack)), b"0": lambda p: p.pop(), b"1": lambda p: p.since_mark(),
    b"q": lambda p: p.memo.update({p.number("<B"): p.stack[-1]}), b"r": lambda p: p.memo.update({p.number("<I"): p.stack[-1]}),
    b"\x94": lambda p: p.memo.update({len(p.memo): p.stack[-1]}),
    b"h": lambda p: p.push(p.memo[p.number("<B")]), b"j": lambda p: p.push(p.memo[p.number("<I")]),
    b"N": lambda p: p.push(None), b"\x88": lambda p: p.push(True), b"\x89": lambda p: p.push(False),
    b"K": lambda p: p.push(p.number("<B")), b"M": lambda p: p.push(p.number("<H")), b"J": lambda p: p.push(p.number("<i")),
    b"G": lambda p: p.push(p.number(">d")),
    b"\x8a": lambda p: p.push(int.from_bytes(p.take(p.number("<B")), "little", signed=True)),
    b"X": lambda p: p.push(p.text("<I")), b"\x8c": lambda p: p.push(p.text("<B")), b"\x8d": lambda p: p.push(p.text("<Q")),
    b"T": lambda p: p.push(p.text("<I")), b"U": lambda p: p.push(p.text("<B")),   # Python 2's strings
    b"B": lambda p: p.push(p.take(p.number("<I"))), b"C": lambda p: p.push(p.take(p.number("<B"))),
    b"\x8e": lambda p: p.push(p.take(p.number("<Q"))),
    b"}": lambda p: p.push({}), b"]": lambda p: p.push([]), b")": lambda p: p.push(()),
    b"\x85": lambda p: p.push((p.pop(),)), b"\x86": lambda p: p.push((p.pop(), p.pop())[::-1]),
    b"\x87": lambda p: p.push((p.pop(), p.pop(), p.pop())[::-1]), b"t": lambda p: p.push(tuple(p.since_mark())),
    b"s": lambda p: p.set_items([p.pop(), p.pop()][::-1]), b"u": lambda p: p.set_items(p.since_mark()),
    b"a": lambda p: p.append([p.pop()]), b"e": lambda p: p.append(p.since_mark()),
    b"c": lambda p: p.push(p.find(p.line(), p.line())), b"\x93": lambda p: p.push(p.find(*(p.pop(), p.pop())[::-1])),
    b"R": DataPickle.reduce, b"\x81": DataPickle.reduce, b"b": DataPickle.build, b"Q": DataPickle.persistent}


# ---------------------------------------------------------------------------------------------------- zip
def read_zip_pickle(path, buffer):
    """{name: tensor} of a torch.save or TorchScript archive, mapped from `buffer`. Raises UserError."""
    try:
        entries = zip_entries(path, buffer)
        if "byteorder" in entries and entry_bytes(buffer, entries["byteorder"]) != b"little":
            raise UserError(f"{path}: written on a big-endian machine; re-save it on a little-endian one")

        def storage(dtype, key, count):
            start, size, packed = entries["data/" + key]
            if packed or count * dtype.itemsize > size:
                raise ValueError(f"storage {shown(key)} does not hold {count:,} numbers")
            return view(buffer, dtype, start, count)
        return flatten(DataPickle(entry_bytes(buffer, entries["data.pkl"]), path, storage).load(), path)
    except KeyError as e:
        raise UserError(f"{path}: cut, or not a torch.save file (no {shown(e)}); download it again")
    except (ValueError, TypeError, IndexError, AttributeError, OverflowError, RecursionError, RuntimeError, struct.error) as e:
        raise UserError(f"{path}: damaged pickle or zip ({type(e).__name__}: {shown(e)})")


def zip_entries(path, buffer):
    """{name without its first folder: (where its bytes begin, how many, whether they are packed)}, from the directory at the end.

    Raises UserError where there is no such end."""
    end = buffer.rfind(b"PK\x05\x06", max(0, len(buffer) - 22 - 0xFFFF))
    if end < 0:
        check_length(path, buffer, expected_length(path, buffer), "about ")
        raise UserError(f"{path}: cut, or not a torch.save file (a zip without its directory); download it again")
    count, at = struct.unpack_from("<10xH4xI", buffer, end)
    if buffer[max(0, end - 20):end - 16] == b"PK\x06\x07":   # zip64: the numbers that count stand elsewhere
        count, at = struct.unpack_from("<32xQ8xQ", buffer, *struct.unpack_from("<8xQ", buffer, end - 20))
    if count > MAX_NAMES:
        raise ValueError(f"{count:,} files in it")
    entries, spans = {}, []
    for _ in range(count):
        mark, method, packed_size, size, *lengths, head = struct.unpack_from("<4s6xH8xII3H8xI", buffer, at)
        name_at, extra_at, next_at = (at + 46 + sum(lengths[:i]) for i in (0, 1, 3))
        name, extra = buffer[name_at:extra_at].decode("utf-8", "replace").split("/", 1)[-1], buffer[extra_at:extra_at + lengths[1]]
        size, packed_size, head = zip64_sizes(extra, size, packed_size, head)
        start = head + 30 + sum(struct.unpack_from("<26xHH", buffer, head))   # behind the name and padding of a header of its own
        true_marks = mark == b"PK\x01\x02" and buffer[head:head + 4] == b"PK\x03\x04"
        if not true_marks or name in entries or start + packed_size > len(buffer):
            raise ValueError(f"the entry {shown(name)!r} is not what its directory says")
        entries[name], at = (start, size, method != 0 or size != packed_size), next_at
        spans.append((start, start + packed_size))
    spans.sort()
    if any(end > begin for (_, end), (begin, _) in zip(spans, spans[1:])):
        raise ValueError("its entries overlap")
    return entries


def zip64_sizes(extra, *numbers):
    """Size, packed size and place of an entry: 2^32 - 1 stands for a number that did not fit and is in the `extra` field 1."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1:
            large = iter(struct.unpack(f"<{length // 8}Q", extra[4:4 + length // 8 * 8]))
            return [next(large, n) if n == 0xFFFFFFFF else n for n in numbers]
        extra = extra[4 + length:]
    return numbers


def entry_bytes(buffer, entry):
    start, size, packed = entry
    if packed or size > MAX_HEADER:
        raise ValueError(f"an entry of {size:,} bytes{', packed' if packed else ''}, which no weight file needs")
    return buffer[start:start + size]


def expected_length(path, buffer):
    """About how many bytes a torch.save file had before it lost its end, 0 if its start does not tell.

    The pickle comes first and names every storage; around these and six small files stand headers with their names."""
    name_length, padding = struct.unpack_from("<26xHH", buffer)
    start, storages, folder = 30 + name_length + padding, {}, name_length - len("/data.pkl")
    if not buffer[30:30 + name_length].endswith(b"/data.pkl"):
        return 0

    def storage(dtype, key, count):
        storages[key] = count * dtype.itemsize
        return torch.empty(count, dtype=dtype, device="meta")
    pickle = DataPickle(buffer[start:start + MAX_HEADER], path, storage)
    pickle.load()
    return pickle.at + sum(storages.values()) + (162 + 3 * folder) * (len(storages) + 6)


def flatten(value, path):
    """{name: tensor} of whatever was pickled: a dict, a checkpoint around a `state_dict`, or nested TorchScript modules."""
    tensors, visits = {}, 0

    def walk(value, name):
        nonlocal visits
        visits += 1
        if visits > 10 * MAX_NAMES or len(name) > 1000:   # a dict that holds another twice, which holds another twice, ...
            raise ValueError("it is nested too deeply")
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
class NoInit(torch.overrides.TorchFunctionMode):
    """Passes by the random numbers that a new module begins with."""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return None if getattr(function, "__module__", "") == "torch.nn.init" else function(*args, **(kwargs or {}))


@contextlib.contextmanager
def shapes_only():
    """Modules made inside have names and shapes and no numbers: those come from a file, by load_into. Half the time of making
    them would go into random numbers that nobody sees."""
    with torch.device("meta"), NoInit():
        yield


SHOWN_ROWS = 10
LIKELY = {   # what a name that is left over says about the file that it comes from
    r"lora_[AB]": "an adapter (LoRA), not a whole model: merge it into its model first",
    r"\.(qweight|qzeros|absmax|g_idx)$": "quantised by another program: take the release in fp16 or bf16",
    r"^(model\.)?language_model\.|^multi_modal_projector": "a LLaVA rewritten for transformers: take the original release",
    r"^model\.layers\.\d+\.self_attn\.[qkv]_proj\.bias$": "a model like Qwen 2, whose attention has biases; a LLaMA's has none",
    r"^model\.layers\.\d+\.(self_attn\.[qk]_norm|\w+_feedforward_layernorm)": "a model like Qwen 3 or Gemma, which normalises where a LLaMA does not",
    r"\.experts\.|block_sparse_moe": "a mixture of experts, not a LLaMA",
    r"down_blocks|diffusion_model": "a diffusion model's UNet",
    r"^(transformer\.h|gpt_neox|h)\.\d": "a GPT of another family",
    r"^(bert|roberta)\.|encoder\.(layer|block)\.\d": "a text encoder",
    r"^(tok_embeddings|layers\.\d+\.attention)\.": "a LLaMA in Meta's layout: it needs its params.json beside it",
    r"^model\.embed_tokens|^model\.layers\.\d": "a LLaMA",
    r"^(vision_model|text_model)\.|^visual\.": "a CLIP",
    r"[bB][tT][aA]dapter|timesFPN": "a BT-Adapter branch",
    r"mm_projector": "a projector of LLaVA"}


def likely_reason(missing, unexpected, shapes):
    """In words, why the names and shapes of a file are not those of the model."""
    for pattern, reason in LIKELY.items():
        if any(re.search(pattern, name) for name in unexpected):
            return f"it looks like {reason}" if reason.startswith(("a ", "an ")) else f"it looks as if it were {reason}"
    if shapes:
        return "is it a model of another size, or its config.json that of another model?"
    if missing and not unexpected:
        return "is it only a part of a model, or one that was saved without its rest?"
    return "it looks like a model of another kind"


def load_into(module, tensors, source, optional=(), *, reason=None):
    """Gives `module` exactly the `tensors` of file `source`: same names, same shapes, nothing left over on either side.

    Tensors are adopted, not copied (they keep the dtype and the memory map of the file). Names in `optional` may be
    missing and keep their values. Raises UserError with the likely reason (or the caller's, who knows better) in its first
    line and a table of the first offenders below."""
    wanted = module.state_dict()
    missing = [k for k in wanted if k not in tensors and k not in optional]
    unexpected = [k for k in tensors if k not in wanted]
    shapes = [k for k in wanted if k in tensors and tensors[k].shape != wanted[k].shape]
    numbers = [k for k in wanted if k in tensors and tensors[k].is_floating_point() != wanted[k].is_floating_point()]
    kinds = {"missing": missing, "unexpected": unexpected, "of another size": shapes, "of another kind of number": numbers}
    if any(kinds.values()):
        counts = ", ".join(f"{len(names)} {kind}" for kind, names in kinds.items() if names)
        rows = [(kind, shown(k), describe(tensors.get(k), kind), describe(wanted.get(k), kind))
                for kind, names in kinds.items() for k in names[:SHOWN_ROWS]]
        hidden = sum(map(len, kinds.values())) - len(rows[:SHOWN_ROWS])
        head = [("", "name", "in the file", "in the model")]
        raise UserError(f"{source}: does not fit this model: {counts}; {reason or likely_reason(missing, unexpected, shapes)}\n"
                        f"{table(head + rows[:SHOWN_ROWS])}" + (f"\n  ... and {hidden:,} more" if hidden else ""))
    module.load_state_dict({**wanted, **tensors}, assign=True)
    return module


def describe(tensor, kind):
    """What a table shows of a tensor: its shape, or its dtype where that is what is wrong."""
    return "-" if tensor is None else str(tensor.dtype).removeprefix("torch.") if kind.endswith("number") else str(tuple(tensor.shape))


def table(rows):
    """Rows of texts -> lines in which the columns stand below each other."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
