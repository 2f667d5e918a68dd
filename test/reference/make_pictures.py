#!/usr/bin/env python3
"""Writes pictures/ beside this file: small PNGs and JPEGs of every kind; reference.safetensors has
what Pillow (13.0) and numpy make of them, [3, H, W] in [-1, 1]; test_pictures.c compares.

    python make_pictures.py
"""
import os
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps
from safetensors.numpy import save_file

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "pictures")
os.makedirs(HERE, exist_ok=True)
rng = np.random.default_rng(1)
expected = {}


def smooth(height, width, channels):
    small = Image.fromarray(rng.integers(0, 256, (3, 3, 4), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.BICUBIC))[:, :, :channels].squeeze()


def keep(name, values, alpha=None):
    """values in [0, 1], [H, W] or [H, W, 3]; alpha is composited on white."""
    values = values if values.ndim == 3 else np.stack([values] * 3, -1)
    if alpha is not None:
        values = values * alpha[:, :, None] + 1 - alpha[:, :, None]
    expected[name] = np.ascontiguousarray((2 * values - 1).transpose(2, 0, 1), dtype=np.float32)


def save(name, image, **options):
    image.save(os.path.join(HERE, name), **options)


def png16(name, pixels):
    """Pillow cannot write 16-bit colour: [H, W, channels] uint16."""
    def chunk(kind, data):
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    with open(os.path.join(HERE, name), "wb") as f:
        f.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(
            ">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b""))


# PNG: every kind of pixel
a = smooth(7, 9, 4)
save("rgb.png", Image.fromarray(a[:, :, :3]))
keep("rgb.png", a[:, :, :3] / 255)
save("rgba.png", Image.fromarray(a))
keep("rgba.png", a[:, :, :3] / 255, a[:, :, 3] / 255)
save("grey.png", Image.fromarray(a[:, :, 0]))
keep("grey.png", a[:, :, 0] / 255)
save("grey_alpha.png", Image.fromarray(a[:, :, :2], "LA"))
keep("grey_alpha.png", a[:, :, 0] / 255, a[:, :, 1] / 255)
save("bits.png", Image.fromarray(a[:, :, 0] > 128))
keep("bits.png", (a[:, :, 0] > 128).astype(float))
palette = Image.fromarray(a[:, :, :3]).quantize(8)
save("palette.png", palette, transparency=bytes([0, 128] + [255] * 6))
b = np.asarray(Image.open(os.path.join(HERE, "palette.png")).convert("RGBA")) / 255
keep("palette.png", b[:, :, :3], b[:, :, 3])
for channels in (1, 3, 4):
    deep = rng.integers(0, 65536, (5, 6, channels), dtype=np.uint16)
    png16(f"deep{channels}.png", deep)
    keep(f"deep{channels}.png", deep[:, :, :3].squeeze() / 65535,
         deep[:, :, 3] / 65535 if channels == 4 else None)
save("one.png", Image.fromarray(a[:1, :1, :3]))
keep("one.png", a[:1, :1, :3] / 255)

# Orientation: the eight of EXIF, in JPEG; one in PNG
for orientation in range(1, 9):
    image = Image.fromarray(smooth(8, 16, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ([f"exif{orientation}.jpg"] + ["exif.png"] * (orientation == 6)):
        options = {} if name.endswith("png") else dict(quality=90, subsampling=0)
        save(name, image, exif=exif, **options)
        back = ImageOps.exif_transpose(Image.open(os.path.join(HERE, name)))
        keep(name, np.asarray(back) / 255)

# JPEG kinds
image = Image.fromarray(smooth(20, 30, 3))
for name, mode, options in (("progressive.jpg", "RGB", dict(progressive=True, subsampling=0)),
                            ("grey.jpg", "L", {}), ("subsampled.jpg", "RGB", dict(subsampling=2))):
    save(name, image.convert(mode), quality=90, **options)
    keep(name, np.asarray(Image.open(os.path.join(HERE, name))) / 255)

# Scaling to cover, cutting the middle: Pillow's bicubic on floats
source = rng.random((3, 23, 37), dtype=np.float32) * 2 - 1
expected["source"] = source
for width, height in ((37, 23), (16, 16), (8, 24), (46, 12), (5, 4), (1, 1), (3, 60)):
    scale = max(width / 37, height / 23)
    box = ((37 - width / scale) / 2, (23 - height / scale) / 2,
           (37 + width / scale) / 2, (23 + height / scale) / 2)
    out = [np.asarray(Image.fromarray(c, "F").resize((width, height), Image.BICUBIC, box=box))
           for c in source]
    expected[f"fit_{width}x{height}"] = np.ascontiguousarray(np.clip(np.stack(out), -1, 1))

save_file(expected, os.path.join(HERE, "reference.safetensors"))
