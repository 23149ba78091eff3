"""Pictures as PNG files: plots, bars, and sheets of frames."""
import math
import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from plumbing.cli import replaceable, write_atomic
from plumbing.video import resize_bicubic

COLOURS = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf"]
THUMBNAIL = 240   # pixels, the width of a frame on a contact sheet
MARK, OURS = b"Software\0nanoBT", PngInfo()   # by it this program knows its own sheets
OURS.add_text("Software", "nanoBT")


# ---------------------------------------------------------------------------------------------------- plots
def plot(path, panels, height=360):
    """Line plots as a PNG, one panel below another over the same x.

    panels: [(title, {label: [(x, y), ...]})]. What lies above four times the median of its panel is cut, else
    the first steps would flatten all others."""
    image = Image.new("RGB", (900, height * len(panels)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    points = [point for _, series in panels for points in series.values() for point in points]
    xs = [0, *(x for x, y in points if math.isfinite(y))]
    x0, x1 = min(xs), max(xs) or 1
    for row, (title, series) in enumerate(panels):
        left, right, top, bottom = 70, 880, row * height + 54, (row + 1) * height - 34
        draw.text((left, top - 46), title, "black", ImageFont.load_default(16))
        draw.rectangle((left, top, right, bottom), outline="#888888")
        series = {label: points for label, points in series.items() if points}
        ys = sorted(y for points in series.values() for _, y in points if math.isfinite(y))
        if not ys:
            continue
        y0, y1 = min(0, ys[0]), min(ys[-1], 4 * ys[len(ys) // 2]) if ys[len(ys) // 2] > 0 else ys[-1]
        y1 = y1 if y1 > y0 else y0 + 1
        wide, high = (right - left) / (x1 - x0), (top - bottom) / (y1 - y0)   # pixels of a unit
        for tick in nice_ticks(x0, x1):
            draw.text((left + (tick - x0) * wide, bottom + 6), f"{tick:g}", "black", font, "ma")   # centred
        for tick in nice_ticks(y0, y1):
            y = bottom + (tick - y0) * high
            draw.line((left, y, right, y), "#e4e4e4")
            draw.text((left - 8, y), f"{tick:g}", "black", font, "rm")   # ends left of the line
        label_x = left
        for colour, (label, points) in zip(COLOURS * 9, series.items()):
            line = [(left + (x - x0) * wide, bottom + (min(y, y1) - y0) * high)
                    for x, y in points if math.isfinite(y)]
            draw.line(line, colour, 2)
            for x, y in line if len(line) <= 30 else ():   # a short run, or a single point
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
            draw.line((label_x, top - 14, label_x + 18, top - 14), colour, 3)
            draw.text((label_x + 24, top - 23), label, "black", font)
            label_x += 44 + draw.textlength(label, font)
    write_atomic(path, lambda f: image.save(f, "PNG"))


def nice_ticks(low, high):
    """About five round numbers between low and high."""
    raw = (high - low) / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def bars(path, title, rows):
    """Bars from zero as a PNG, with whiskers. rows: [(label, value, lowest, highest)]."""
    font, longest = ImageFont.load_default(15), max(high for *_, high in rows) or 1
    left = 30 + round(max(font.getlength(label) for label, *_ in rows))
    image = Image.new("RGB", (900, 70 + 34 * len(rows)), "white")
    draw = ImageDraw.Draw(image)
    draw.text((20, 14), title, "black", ImageFont.load_default(16))
    for i, (label, value, low, high) in enumerate(rows):
        top = 50 + 34 * i
        value_x, low_x, high_x = (left + (900 - 110 - left) * x / longest for x in (value, low, high))
        draw.text((left - 10, top + 3), label, "black", font, "ra")   # ends left of the bar
        draw.rectangle((left, top, value_x, top + 24), "#1f77b4")
        if high > low:
            draw.line((low_x, top + 12, high_x, top + 12), "black", 2)
        draw.text((max(value_x, high_x) + 8, top + 3), f"{value:.1f}", "black", font)
    write_atomic(path, lambda f: image.save(f, "PNG"))


# ---------------------------------------------------------------------------------------------------- frames
def image_of(picture):
    """(3, H, W) uint8 -> a Pillow image."""
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())


def thumbnail(picture):
    """(3, H, W) uint8 -> the same, at most THUMBNAIL pixels wide and high."""
    height, width = picture.shape[1:]
    share = THUMBNAIL / max(height, width)
    if share >= 1:
        return picture
    return resize_bicubic(picture[None], max(1, int(height * share)), max(1, int(width * share)))[0]


def boxed(picture):
    """(3, H, W) uint8 -> (3, 180, 240), black bars around it: pictures of many shapes for one sheet."""
    image = ImageOps.pad(image_of(picture), (THUMBNAIL, THUMBNAIL * 3 // 4))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)   # (180, 240, 3) -> (3, 180, 240)


def contact_sheet(frames, times, path, names=None):
    """A PNG of all frames, each THUMBNAIL wide, with its time below, and its name if it has one.

    frames: (T, 3, H, W) uint8; times: seconds. Raises UserError where another file is in the way."""
    replaceable(path, MARK)
    width, font = THUMBNAIL, ImageFont.load_default(14)
    height = max(1, round(width * min(frames.shape[2] / frames.shape[3], 4)))   # of strips it would be GBs
    columns = math.ceil(math.sqrt(len(frames)))
    sheet = Image.new("RGB", (columns * (width + 4), -(-len(frames) // columns) * (height + 24)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (frame, seconds) in enumerate(zip(frames, times)):
        x, y = i % columns * (width + 4) + 2, i // columns * (height + 24) + 2
        label = f"{i}: {seconds:.2f} s" + (f", {ascii(names[i])[1:-1]}" if names else "")   # all the font has
        draw.text((x + 2, y + height + 2), label, "black", font)
        draw.rectangle((x + width, y, x + 2 * width, y + height + 22), "white")   # cuts a long name
        sheet.paste(image_of(frame).resize((width, height)), (x, y))
    write_atomic(path, lambda f: sheet.save(f, "PNG", pnginfo=OURS))


def explanation(path, text, edges, shares, names, frames, places=None):
    """A PNG of how much each unit of a video counts: a bar for each over the length of the video, and the six
    heaviest in time order.

    text: what stands above; edges: T + 1 seconds between which the units are; shares: T numbers; names: what
    stands below a unit's frame; frames (T, 3, H, W) uint8; places: None, or (T, side, side) numbers by which
    the patches of a frame are lit. Raises UserError where another file is in the way."""
    replaceable(path, MARK)
    width, across, font = THUMBNAIL, 6, ImageFont.load_default(14)
    height = max(1, round(width * min(frames.shape[2] / frames.shape[3], 4)))
    lines = [part for line in text.splitlines() for part in textwrap.wrap(ascii(line)[1:-1], 190)]
    right, bottom = across * (width + 4) - 10, 20 * len(lines) + 136   # of the bars
    sheet = Image.new("RGB", (right + 10, bottom + height + 56), "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((10, 8), "\n".join(lines), "black", font, spacing=6)
    wide = (right - 10) / (edges[-1] - edges[0])   # pixels of a second
    x = [10 + (edge - edges[0]) * wide for edge in edges]
    heaviest = sorted(sorted(range(len(shares)), key=shares.__getitem__)[-across:])
    for i, share in enumerate(shares):
        box = x[i], bottom - 110 * share / max(shares), max(x[i], x[i + 1] - 1), bottom
        draw.rectangle(box, "#1f77b4" if i in heaviest else "#b0b0b0")
    draw.line((10, bottom, right, bottom), "#888888")
    for tick in nice_ticks(edges[0], edges[-1]):
        draw.text((10 + (tick - edges[0]) * wide, bottom + 4), f"{tick:g}", "black", font, "ma")   # centred
    for left, i in zip(range(2, right, width + 4), heaviest):
        picture = image_of(frames[i]).resize((width, height))
        if places is not None:
            light = 0.2 + 0.8 * places[i] / places[i].max().clamp_min(1e-9)
            mask = Image.fromarray((255 * light).byte().numpy()).resize((width, height), Image.NEAREST)
            picture = Image.composite(picture, Image.new("RGB", picture.size), mask)
        sheet.paste(picture, (left, bottom + 28))
        draw.text((left + 2, bottom + height + 32), names[i], "black", font)
    write_atomic(path, lambda f: sheet.save(f, "PNG", pnginfo=OURS))
