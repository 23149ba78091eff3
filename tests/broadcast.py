"""MPEG-TS written bit by bit: pictures of two fields, times for some packets only, a track without packets.
Not a test itself."""
import struct

WIDTH, HEIGHT = 32, 32
PID, SILENT = 0x201, 0x202   # of the pictures; of a track that is listed and has no packet


def unsigned(bits, value):
    return format(value, f"0{bits}b")


def golomb(*values):
    """Exp-Golomb codes, H.264 9.1."""
    return "".join(format(v + 1, "b").zfill(2 * (v + 1).bit_length() - 1) for v in values)


def nal(head, bits):
    """A NAL unit of H.264 (7.3.1), with its start code; 0x03 keeps two zeros from looking like one."""
    bits += "1"
    bits += "0" * (-len(bits) % 8)
    unit = bytearray()
    for byte in int(bits, 2).to_bytes(len(bits) // 8, "big"):
        if unit[-2:] == b"\0\0" and byte <= 3:
            unit.append(3)
        unit.append(byte)
    return b"\0\0\0\1" + bytes([head]) + unit


def parameters():
    """Sequence and picture parameter sets (7.3.2): main profile, fields or frames, 25 frames a second."""
    sequence = unsigned(8, 77) + unsigned(8, 0) + unsigned(8, 30) + golomb(0, 0, 0, 4, 2) + "0"
    sequence += golomb(WIDTH // 16 - 1, HEIGHT // 32 - 1) + "0010" + "1"
    timing = "1" + unsigned(32, 1) + unsigned(32, 50) + "1"
    sequence += "0000" + timing + "000" + "1" + "1" + golomb(0, 0, 10, 10, 0, 1)   # nothing is put in order
    picture = golomb(0, 0) + "00" + golomb(0, 0, 0) + "000" + golomb(0, 0, 0) + "100"
    return nal(0x67, sequence) + nal(0x68, picture)


def coded(k, group, field=None):
    """Picture k, or one field of it (0 top, 1 bottom), as one slice of raw macroblocks (I_PCM): luma is
    16 + 5 k in the even rows, 18 + 5 k in the odd ones."""
    nth, key = k % group, k % group == 0 and field != 1
    bits = golomb(0, 7, 0) + unsigned(4, int(nth > 0)) + ("0" if field is None else f"1{field}")
    bits += (golomb(k // group % 2) if key else "") + unsigned(8, 2 * nth + (field or 0))
    bits += ("00" if key else "0" if nth == 0 else "") + golomb(0, 1)
    rows = [16 + 5 * k + 2 * (row % 2 if field is None else field) for row in range(16)]
    samples = "".join(unsigned(8, value) * 16 for value in rows) + unsigned(8, 128) * 128
    for _ in range(WIDTH // 16 * HEIGHT // (16 if field is None else 32)):
        bits += golomb(25)
        bits += "0" * (-len(bits) % 8) + samples
    unit = nal((nth == 0) << 5 | (5 if key else 1), bits)
    return b"\0\0\0\1\x09\xf0" + (parameters() if key else b"") + unit


def checksum(data):
    """CRC-32 of MPEG (ISO 13818-1, Annex A)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ 0x04C11DB7 if crc >> 31 else crc << 1) & 0xFFFFFFFF
    return struct.pack(">I", crc)


class Stream:
    """Writes packets of 188 bytes (ISO 13818-1, 2.4.3)."""
    def __init__(self, path):
        self.file, self.counters = open(path, "wb"), {}

    def packets(self, pid, payload):
        for begin in range(0, len(payload), 184):
            part = payload[begin:begin + 184]
            count = self.counters[pid] = (self.counters.get(pid, -1) + 1) % 16
            room = 184 - len(part)
            filling = (bytes([max(room - 1, 0)]) + b"\0" + b"\xff" * (room - 2))[:room]
            head = struct.pack(">BHB", 0x47, (begin == 0) << 14 | pid, (0x30 if room else 0x10) | count)
            self.file.write(head + filling + part)

    def table(self, pid, kind, body):
        section = struct.pack(">BHH", kind, 0xB000 | len(body) + 9, 1) + b"\xc1\0\0" + body
        self.packets(pid, (b"\0" + section + checksum(section)).ljust(184, b"\xff"))

    def picture(self, data, tick):
        """A PES packet (2.4.3.6), with the time at which it is shown, 90000 ticks a second, or without."""
        stamp = b"" if tick is None else struct.pack(
            ">BHH", 0x21 | tick >> 29 & 14, tick >> 14 & 0xFFFE | 1, tick << 1 & 0xFFFE | 1)
        self.packets(PID, b"\0\0\1\xe0\0\0\x84" + bytes([0x80 if stamp else 0, len(stamp)]) + stamp + data)


def broadcast(path, pictures=30, group=10, kind="fields", every=1, silent=False, start=90000):
    """A film of 25 pictures a second, a keyframe every `group`. kind: "frames"; "fields": a PES packet holds
    both fields, so that the second has no time; "timed fields": each has its own packet and time; "mixed":
    two pictures of three are timed fields. every: only every so-many-th picture has a time. silent: a first
    track of pictures is listed that has no packet."""
    stream = Stream(path)
    for k in range(pictures):
        if k % group == 0:
            tracks = [SILENT] * silent + [PID]
            stream.table(0, 0, struct.pack(">HH", 1, 0xE200))
            stream.table(0x200, 2, struct.pack(">HH", 0xE000 | PID, 0xF000) + b"".join(
                struct.pack(">BHH", 27, 0xE000 | pid, 0xF000) for pid in tracks))
        tick = start + 3600 * k if k % every == 0 else None
        if kind == "frames" or kind == "mixed" and k % 3 == 2:
            stream.picture(coded(k, group), tick)
        elif kind == "fields":
            stream.picture(coded(k, group, 0) + coded(k, group, 1), tick)
        else:
            stream.picture(coded(k, group, 0), tick)
            stream.picture(coded(k, group, 1), tick and tick + 1800)
    stream.file.close()
    return str(path)
