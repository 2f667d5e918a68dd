"""Reads pictures of many kinds with the programs' reader and with Pillow (exif_transpose, convert;
alpha on white): pixels within 2/255 (a JPEG's now and then 3: another inverse DCT), or a refusal that is expected.

    compare_pictures.py
"""
import io
import os
import struct
import subprocess
import sys
import tempfile
import zlib

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

HERE = os.path.dirname(os.path.abspath(__file__))
rng = np.random.default_rng(1)
small = Image.fromarray(rng.integers(0, 256, (4, 4, 4), dtype=np.uint8))
RGBA = small.resize((40, 24), Image.BICUBIC)
RGB, GREY = RGBA.convert("RGB"), RGBA.convert("L")
cases = {}  # name: (bytes, may it be refused?)


def saved(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def add(name, data, refused=False):
    cases[name] = data, refused


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(png, *chunks, behind=False):
    at = png.index(b"IEND") - 4 if behind else 33
    return png[:at] + b"".join(chunk(*c) for c in chunks) + png[at:]


def segment(marker, data):
    return bytes([255, marker]) + struct.pack(">H", len(data) + 2) + data


def with_segments(jpeg, *segments, junk=b""):
    return jpeg[:2] + junk + b"".join(segment(*s) for s in segments) + jpeg[2:]


def tiff(value, kind=3, count=1, order="<", tag=0x112, size=None):
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IHHHI", 8, 1, tag, kind, count)
    form = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 5: "II", 10: "ii", 13: "I", 2: "B", 7: "B"}[kind]
    values = struct.pack(order + form * count, *([value, 1] if kind in (5, 10) else [value]) * count)
    if len(values) <= 4:
        return head + values.ljust(4, b"\0") + bytes(4)
    return head + struct.pack(order + "I", 26) + bytes(4) + values


def xmp(text):
    return f"<x:xmpmeta><rdf:Description {text}</x:xmpmeta>".encode()


def profile(block, name="exif"):
    return f"\n{name}\n{len(block):8}\n".encode() + b"\n".join(
        block.hex().encode()[i:i + 72] for i in range(0, 2 * len(block), 72)) + b"\n"


def orientation_cases():
    png, jpeg, app = saved(RGB, "PNG"), saved(RGB, "JPEG", quality=95), b"Exif\0\0"
    attribute, element = b'tiff:Orientation="%d"', b"<tiff:Orientation>%d</tiff:Orientation>"
    key, head = b"XML:com.adobe.xmp\0", b"http://ns.adobe.com/xap/1.0/\0"
    for kind in 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 13:
        for count in 1, 2, 5:
            for order in "<>":
                for value in 6, 0, 9:
                    block = tiff(value, kind, count, order)
                    name = f"type{kind}x{count}{'le' if order == '<' else 'be'}{value}"
                    add(name + ".png", with_chunks(png, (b"eXIf", block)))
                    add(name + ".jpg", with_segments(jpeg, (0xe1, app + block)))
    for o in range(10):
        for form in attribute, element:
            text = xmp((form % o).decode())
            name = f"xmp{o}{'a' if form is attribute else 'e'}"
            add(name + ".png", with_chunks(png, (b"iTXt", key + b"\0\0\0\0" + text)))
            add(name + "z.png", with_chunks(png, (b"iTXt", key + b"\1\0en\0xmp\0" + zlib.compress(text))))
            add(name + "t.png", with_chunks(png, (b"tEXt", key + text), behind=True))
            add(name + ".jpg", with_segments(jpeg, (0xe1, head + text)))
        raw = profile(app + tiff(o))
        for word in "exif", "APP1":
            add(f"raw{word}{o}.png", with_chunks(png, (b"tEXt", b"Raw profile type %s\0" % word.encode() + raw)))
            add(f"raw{word}{o}z.png", with_chunks(png, (b"zTXt", b"Raw profile type %s\0\0" % word.encode() + zlib.compress(raw)), behind=True))
    six, three, one = tiff(6), tiff(3), tiff(1)
    x8 = xmp('tiff:Orientation="8"')
    add("both.jpg", with_segments(jpeg, (0xe1, head + x8), (0xe1, app + six)))
    add("both1.jpg", with_segments(jpeg, (0xe1, app + one), (0xe1, head + x8)))
    add("other-tag.jpg", with_segments(jpeg, (0xe1, app + tiff(6, tag=0x111)), (0xe1, head + x8)))
    add("two-exif.jpg", with_segments(jpeg, (0xe1, app + six), (0xe1, app + three)))
    add("two-xmp.jpg", with_segments(jpeg, (0xe1, head + x8), (0xe1, head + xmp('tiff:Orientation="3"'))))
    add("junk.jpg", with_segments(jpeg, (0xe1, app + six), junk=b"\xff\xff\xff"))
    add("prefix.png", with_chunks(png, (b"eXIf", app + six)))
    add("late.png", with_chunks(png, (b"eXIf", six), behind=True))
    add("two.png", with_chunks(png, (b"eXIf", six), (b"eXIf", three)))
    add("exif-raw.png", with_chunks(png, (b"eXIf", tiff(6, tag=0x111)), (b"tEXt", b"Raw profile type exif\0" + profile(app + three))))
    add("exif-xmp.png", with_chunks(png, (b"eXIf", one), (b"iTXt", key + b"\0\0\0\0" + x8)))
    add("raw-xmp.png", with_chunks(png, (b"iTXt", key + b"\0\0\0\0" + x8), (b"tEXt", b"Raw profile type exif\0" + profile(app + three))))
    add("quote.png", with_chunks(png, (b"iTXt", key + b"\0\0\0\0" + xmp("tiff:Orientation='8' tiff:Orientation=\"x tiff:Orientation=\"3\""))))


def png_cases():
    png = saved(RGBA, "PNG")
    end = png.index(b"IEND") - 4
    for n in range(12):
        add(f"end{n}.png", png[:end + n])
    add("behind.png", png + b"more")
    add("cgbi.png", png[:8] + chunk(b"CgBI", b"\x50\0\x20\2") + png[8:], True)
    for mode in "1", "L", "LA", "P", "RGB", "RGBA":
        add(f"mode{mode}.png", saved(RGBA.convert(mode), "PNG"))
    add("grey-trns.png", saved(GREY.point(lambda v: v & 0xf0), "PNG", transparency=0x80))
    add("rgb-trns.png", saved(RGB.point(lambda v: v & 0x80), "PNG", transparency=(128, 128, 0)))
    for colours in 2, 4, 16, 200:
        p = RGB.quantize(colours)
        add(f"palette{colours}.png", saved(p, "PNG"))
        add(f"palette{colours}t.png", saved(p, "PNG", transparency=bytes(rng.integers(0, 256, colours, dtype=np.uint8))))
        add(f"palette{colours}o.png", saved(p, "PNG", transparency=1))
    add("gamma.png", with_chunks(saved(RGB, "PNG"), (b"gAMA", struct.pack(">I", 100000)), (b"cHRM", bytes(32))))
    add("apng.png", saved(RGB, "PNG", save_all=True, append_images=[ImageOps.invert(RGB)]))
    add("apng-default.png", saved(RGB, "PNG", save_all=True, default_image=True, append_images=[ImageOps.invert(RGB)]))


def interlaced(pixels, depth, colour):
    """pixels [H, W, C] as an Adam7 PNG."""
    height, width, channels = pixels.shape
    out = b""
    for x, y, dx, dy in (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2):
        for row in pixels[y::dy, x::dx]:
            if row.size:
                out += b"\0" + (row.astype(">u2").tobytes() if depth == 16 else row.astype("u1").tobytes() if depth == 8
                                else np.packbits(row.astype(bool)).tobytes())
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 1))
            + chunk(b"IDAT", zlib.compress(out)) + chunk(b"IEND", b""))


def more_png_cases():
    a = np.asarray(RGBA)
    for size in (24, 40), (1, 1), (3, 5), (9, 2):
        part = a[:size[0], :size[1]]
        add(f"adam7rgb{size}.png", interlaced(part[:, :, :3], 8, 2))
        add(f"adam7rgba{size}.png", interlaced(part, 8, 6))
        add(f"adam7deep{size}.png", interlaced(part[:, :, :3].astype(int) * 257 // 1, 16, 2))
        add(f"adam7la{size}.png", interlaced(part[:, :, 2:], 8, 4))
        add(f"adam7bits{size}.png", interlaced(part[:, :, :1] > 128, 1, 0))


def jpeg_cases():
    for quality in 30, 75, 95:
        for sampling in 0, 1, 2:
            for progressive in False, True:
                for size in (40, 24), (33, 17), (8, 8), (5, 5):
                    add(f"q{quality}s{str(sampling).replace(':', '')}{'p' * progressive}{size[0]}x{size[1]}.jpg",
                        saved(RGB.resize(size), "JPEG", quality=quality, subsampling=sampling, progressive=progressive))
    grey, rgb = saved(GREY, "JPEG", quality=95), saved(RGB, "JPEG", quality=95)
    add("grey.jpg", grey)
    add("keep-rgb.jpg", saved(RGB, "JPEG", quality=95, keep_rgb=True))
    add("restarts.jpg", saved(RGB, "JPEG", quality=95, restart_marker_blocks=2))
    cmyk = saved(RGB.convert("CMYK"), "JPEG", quality=95)
    at = cmyk.index(b"\xff\xee")
    bare = cmyk[:at] + cmyk[at + 16:]
    add("cmyk.jpg", cmyk)
    add("cmyk-bare.jpg", bare)
    for transform in 0, 1, 2:
        for name, data in ("cmyk", bare), ("rgb", rgb), ("keep", saved(RGB, "JPEG", quality=95, keep_rgb=True)):
            cut = data.replace(data[data.index(b"\xff\xe0"):data.index(b"\xff\xe0") + 18], b"") if b"JFIF" in data else data
            if b"Adobe" in cut:
                i = cut.index(b"\xff\xee")
                cut = cut[:i] + cut[i + 16:]
            adobe = 0xee, b"Adobe\0d\0\0\0\0" + bytes([transform])
            add(f"{name}-adobe{transform}.jpg", with_segments(cut, adobe), name == "keep" and transform > 0)
            add(f"{name}-jfif-adobe{transform}.jpg", with_segments(cut, (0xe0, b"JFIF\0\1\1\0\0\1\0\1\0\0"), adobe), name == "keep")
            add(f"{name}-plain.jpg", cut)
    add("mpo.jpg", saved(RGB, "MPO", save_all=True, append_images=[ImageOps.invert(RGB)], quality=95))
    add("behind.jpg", rgb + b"more")
    add("no-end.jpg", rgb[:-2], True)
    sof = rgb.index(b"\xff\xc0")
    for marker in 0xc3, 0xc9, 0xca:
        add(f"sof{marker:x}.jpg", rgb[:sof + 1] + bytes([marker]) + rgb[sof + 2:], True)
    add("12bits.jpg", rgb[:sof + 4] + b"\x0c" + rgb[sof + 5:], True)
    add("icc.jpg", saved(RGB, "JPEG", quality=95, icc_profile=b"no profile at all"))


def theirs(data):
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode in ("LA", "RGBA", "PA") or "transparency" in image.info:
        a = np.asarray(image.convert("RGBA"), dtype=float)
        return a[:, :, :3] * a[:, :, 3:] / 255 + 255 - a[:, :, 3:]
    return np.asarray(image.convert("RGB"), dtype=float)


def ours(out):
    line = out.readline().decode()
    if line.startswith("refused"):
        return line
    width, height = map(int, line.split())
    return np.frombuffer(out.read(3 * width * height), dtype=np.uint8).reshape(height, width, 3)


def main():
    for make in orientation_cases, png_cases, more_png_cases, jpeg_cases:
        make()
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, name) for name in cases]
        for path, (data, _) in zip(paths, cases.values()):
            with open(path, "wb") as f:
                f.write(data)
        program = os.path.join(folder, "decode")
        subprocess.run([os.environ.get("CC", "cc"), "-std=c99", "-O2", "-w", os.path.join(HERE, "decode.c"), "-o", program,
                        "-lm"], check=True)
        out = io.BytesIO(subprocess.run([program] + paths, stdout=subprocess.PIPE, check=True).stdout)
        wrong = refused = 0
        for name, (data, may) in cases.items():
            got = ours(out)
            try:
                want = theirs(data)
            except Exception as e:
                want = f"Pillow: {type(e).__name__} {e}"
            if isinstance(got, str) or isinstance(want, str):
                both = isinstance(got, str) and isinstance(want, str)
                refused += 1
                if not (may or both): wrong += 1
                if not (may and isinstance(got, str)) : print(f"{name}: {got if isinstance(got, str) else 'ours: read'} | {want if isinstance(want, str) else 'Pillow: read'}".replace("\n", ""))
            elif got.shape != want.shape or np.abs(got - want).max() > 3 or (np.abs(got - want) > 2.5).sum() > 3:
                wrong += 1
                print(f"{name}: {got.shape}, Pillow {want.shape}" + (f", off by {np.abs(got - want).max():.0f} (mean {np.abs(got - want).mean():.2f})" if got.shape == want.shape else ""))
    print(len(cases), "pictures;", refused, "refused;", wrong, "wrong")
    return wrong


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
