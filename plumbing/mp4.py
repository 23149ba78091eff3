"""The tables of an MP4 (ISO 14496-12), held against its bytes before libav makes room for what they claim."""
import collections
import re
import struct

import numpy as np

MAX_TABLE = 1 << 26   # bytes of one table: sizes of 16 million frames
# Boxes in boxes, which begin with their size and name. libav takes a table wherever it finds one; so these
# are the boxes that it looks into, not only those in which a table belongs.
NESTS = set(b"moov free hoov cmov trak edts mdia minf dinf stbl udta meta ilst tref sinf schi wave mvex moof "
            b"traf".split())
TABLES = {   # name: bytes of an entry, unless read_table says otherwise
    b"stts": 8, b"ctts": 8, b"stsc": 12, b"stco": 4, b"co64": 8, b"stss": 4, b"stps": 4, b"sidx": 12,
    b"stsz": 4, b"stz2": 1, b"elst": 12, b"trun": 0}


def boxes(read, begin, end, depth=0):
    """The boxes between two places of an MP4, outer ones first. Yields (name, where it begins, where its
    content does, its end as claimed)."""
    while begin + 8 <= end:
        size, name, large = struct.unpack(">I4sQ", read(begin, 16).ljust(16, b"\0"))
        inside = begin + (16 if size == 1 else 8)
        after = begin + (large if size == 1 else size or end - begin)
        if inside > min(after, end):
            return
        yield name, begin, inside, after
        if name in NESTS and depth < 12:   # libav goes no deeper
            # QuickTime's meta has no version before its boxes
            skipped = read(inside, 64).find(b"hdlr") - 4 if name == b"meta" else 0
            yield from boxes(read, inside + max(skipped, 0), min(after, end), depth + 1)
        begin = after


def check_tables(read, size):
    """Raises ValueError for an MP4 of `size` bytes whose tables claim what cannot be; what is no MP4 passes.
    read(place, n): up to n bytes from a place on.

    libav makes room for every sample that they claim, before one can ask it how many that is: gigabytes,
    for a file of 30 kB. The rule is that a file has a byte for each entry of libav's index. That holds for
    empty samples too: their sizes are in a table. But no sizes are added up: a file that was cut has less
    than it claims, and can be read as far as it goes."""
    tracks = [collections.defaultdict(list)]   # of each: {name of a table: what was read}
    starts, leads = set(), []                  # of all boxes; of fragments, by an index
    for name, start, begin, end in boxes(read, 0, size):
        starts.add(start)
        if name == b"trak":
            tracks.append(collections.defaultdict(list))
        elif name == b"hdlr":
            tracks[-1][name].append(read(begin + 8, 4))
        elif name in (b"stsd", b"iprp", b"iref"):   # libav looks into these too
            if re.search(b"|".join([b"hdlr", *TABLES]), read(begin, min(end - begin, MAX_TABLE))):
                raise ValueError(f"a table of samples in a box {name.decode()}")
        elif name == b"cmvd":   # QuickTime of the nineties: deflated boxes
            raise ValueError("its header is compressed")
        elif name == b"sidx":   # how long fragments are that follow one another, after so many other bytes
            gap, rows = read_table(read, name, begin, end)
            leads += [end + gap, *(end + gap + np.cumsum(rows[:-1, 0] % 2 ** 31))]
        elif name in TABLES:
            tracks[-1][name].append(read_table(read, name, begin, end))
    if any(place < size and place not in starts for place in leads):   # libav would look for boxes there
        raise ValueError("its index leads to places where nothing begins")
    if (claimed := sum(map(index_entries, tracks))) > size:
        raise ValueError(f"{claimed:.0f} samples are claimed to be in its {size} bytes")


def read_table(read, name, begin, end):
    """A table -> how many entries it has. Of stts, ctts, stsc: the entries, floats (n, 2 or 3). Of sidx: an
    offset, the entries."""
    flags, count, second = struct.unpack(">III", read(begin, 12).ljust(12, b"\0"))
    rows, width, version = begin + 8, TABLES[name], flags >> 24
    if name in (b"stsz", b"stz2"):   # a size for all samples, or the bits of each; then the count
        width, count = (count & 255) / 8 if name == b"stz2" else 0 if count else 4, second
    elif name == b"elst":
        width = 20 if version == 1 else 12
    elif name == b"trun":   # what is not in it has a default
        width = 4 * (flags >> 8 & 15).bit_count()
    elif name == b"sidx":
        rows, layout = (begin + 32, ">Q2xH") if version else (begin + 24, ">4xI2xH")
        gap, count = struct.unpack(layout, read(rows - 12, 12).ljust(12, b"\0"))
    if count * width > min(end - begin - 8, MAX_TABLE):
        raise ValueError(f"its table {name.decode()} has no room for the {count} entries that it claims")
    if name == b"elst":
        return (end - begin - 8) // width   # libav does not believe the count
    if name not in (b"stts", b"ctts", b"stsc", b"sidx"):
        return count
    table = read(rows, count * width)
    table = np.frombuffer(table[:len(table) // width * width], ">u4").reshape(-1, width // 4).astype(float)
    return (gap, table) if name == b"sidx" else table


def index_entries(track):
    """How many entries libav's index of a track will have, at most: edits repeat those of the film."""
    times, offsets, chunks = (np.concatenate([np.zeros((0, TABLES[name] // 4)), *track[name]])
                              for name in (b"stts", b"ctts", b"stsc"))
    samples = max(sum(track[b"stsz"] + track[b"stz2"]), times[:, 0].sum(), offsets[:, 0].sum())
    # QuickTime counts the samples of sound as they will be once decompressed. libav puts 160 or more of a
    # chunk into one entry.
    only_sound = b"soun" in track[b"hdlr"] and not {b"vide", b"subp", b"clcp"} & set(track[b"hdlr"])
    if only_sound and times[:, 1].tolist() == [1]:
        spans = np.diff(chunks[:, 0], append=sum(track[b"stco"] + track[b"co64"]) + 1).clip(0)   # of chunks
        samples = (spans * np.ceil(chunks[:, 1] / 160)).sum()
    return samples * max(sum(track[b"elst"]), 1) + sum(track[b"trun"])
