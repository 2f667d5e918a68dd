"""Reads pictures of many kinds with the programs' reader and with Pillow (exif_transpose, convert;
alpha on white): the same within 2/255 (a JPEG's few numbers 3: another inverse DCT), or refused.

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
from PIL import Image, ImageOps

HERE = os.path.dirname(os.path.abspath(__file__))
rng = np.random.default_rng(1)
RGBA = Image.fromarray(rng.integers(0, 256, (4, 4, 4), dtype=np.uint8)).resize((40, 24), Image.BICUBIC)
RGB, GREY = RGBA.convert("RGB"), RGBA.convert("L")
APP, HEAD, KEY, RAW = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"XML:com.adobe.xmp\0", b"Raw profile type %s\0"
cases = {}  # name: bytes; names that begin with "no-" are to be refused, all others to be read


def saved(image, kind="PNG", **options):
    image.save(out := io.BytesIO(), kind, **options)
    return out.getvalue()


def chunks(png, *pairs, behind=False):
    at = png.index(b"IEND") - 4 if behind else 33
    return png[:at] + b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in pairs) + png[at:]


def segments(jpeg, *pairs):
    return jpeg[:2] + b"".join(struct.pack(">BBH", 255, m, len(d) + 2) + d for m, d in pairs) + jpeg[2:]


def tiff(value, kind=3, count=1, order="<", tag=0x112):
    form = {3: "H", 4: "I", 5: "II", 6: "b", 8: "h", 9: "i", 10: "ii", 13: "I"}.get(kind, "B")
    values = struct.pack(order + form * count, *([value, 1][:len(form)] * count))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IHHHI", 8, 1, tag, kind, count)
    return head + (values.ljust(8, b"\0") if len(values) <= 4 else struct.pack(order + "II", 26, 0) + values)


def raw_profile(block):
    return b"\nexif\n%8d\n%s\n" % (len(block), b"\n".join(block.hex().encode()[i:i + 72] for i in range(0, 2 * len(block), 72)))


def orientations():
    png, jpeg = saved(RGB), saved(RGB, "JPEG", quality=95)
    for kind in range(1, 11):
        for count, order, value in ((1, "<", 6), (1, ">", 6), (2, "<", 6), (5, ">", 6), (1, "<", 0), (1, ">", 9)):
            name, block = f"type{kind}-{count}{'be'[order == '<']}{value}", tiff(value, kind, count, order)
            cases[name + ".png"] = chunks(png, (b"eXIf", block))
            cases[name + ".jpg"] = segments(jpeg, (0xe1, APP + block))
    for o in range(10):
        for form in b'tiff:Orientation="%d"', b"<tiff:Orientation>%d</tiff:Orientation>", b"tiff:Orientation='3' tiff:Orientation=\"%d\"":
            name, text = f"xmp{o}{len(form)}", form % o
            cases[name + ".png"] = chunks(png, (b"iTXt", KEY + b"\0\0\0\0" + text))
            cases[name + "z.png"] = chunks(png, (b"iTXt", KEY + b"\1\0en\0xmp\0" + zlib.compress(text)))
            cases[name + "t.png"] = chunks(png, (b"tEXt", KEY + text), behind=True)
            cases[name + ".jpg"] = segments(jpeg, (0xe1, HEAD + text))
        for word in b"exif", b"APP1":
            cases[f"raw{word}{o}.png"] = chunks(png, (b"tEXt", RAW % word + raw_profile(APP + tiff(o))))
            cases[f"raw{word}{o}z.png"] = chunks(png, (b"zTXt", RAW % word + b"\0" + zlib.compress(raw_profile(tiff(o)))))
    exif, other, xmp = APP + tiff(6), APP + tiff(6, tag=0x111), b'tiff:Orientation="8"'
    raw, itxt = (b"tEXt", RAW % b"exif" + raw_profile(APP + tiff(3))), (b"iTXt", KEY + b"\0\0\0\0" + xmp)
    for i, pairs in enumerate([(HEAD + xmp, exif), (APP + tiff(1), HEAD + xmp), (other, HEAD + xmp), (exif, APP + tiff(3)),
                               (HEAD + xmp, HEAD + b'tiff:Orientation="3"'), (other, exif)]):
        cases[f"which{i}.jpg"] = segments(jpeg, *((0xe1, p) for p in pairs))
    for i, pairs in enumerate([((b"eXIf", exif), (b"eXIf", tiff(3))), ((b"eXIf", other), raw), ((b"eXIf", tiff(1)), itxt), (itxt, raw)]):
        cases[f"which{i}.png"] = chunks(png, *pairs)
        cases[f"behind{i}.png"] = chunks(png, *pairs, behind=True)


def kinds():
    png, jpeg, keep = saved(RGBA), saved(RGB, "JPEG", quality=95), saved(RGB, "JPEG", quality=95, keep_rgb=True)
    for n in range(12):
        cases[f"end{n}.png"] = png[:len(png) - 12 + n]
    for mode in "1", "L", "LA", "P", "RGB", "RGBA":
        cases[f"mode{mode}.png"] = saved(RGBA.convert(mode)) + b"more"
    cases["trns.png"] = saved(GREY.point(lambda v: v & 0xf0), transparency=0x80)
    cases["rgb-trns.png"] = saved(RGB.point(lambda v: v & 0x80), transparency=(128, 128, 0))
    for n in 2, 4, 16, 200:
        cases[f"palette{n}.png"] = saved(RGB.quantize(n), transparency=bytes(rng.integers(0, 256, n, dtype=np.uint8)))
    cases["apng.png"] = saved(RGB, save_all=True, append_images=[ImageOps.invert(RGB)])
    cases["gamma.png"] = chunks(saved(RGB), (b"gAMA", struct.pack(">I", 100000)), (b"cHRM", bytes(32)))
    cases["no-iphone.png"] = chunks(png[:33], (b"CgBI", b"\x50\0\x20\2")) + png[33:]
    for quality, sampling, progressive in ((q, s, p) for q in (30, 75, 95) for s in (0, 1, 2) for p in (False, True)):
        for size in (40, 24), (33, 17), (8, 8), (5, 5):
            cases[f"q{quality}s{sampling}p{progressive}{size}.jpg"] = saved(
                RGB.resize(size), "JPEG", quality=quality, subsampling=sampling, progressive=progressive)
    cmyk = saved(RGB.convert("CMYK"), "JPEG", quality=95)
    bare, keep = (x.replace(x[x.index(b"\xff\xee"):][:16], b"") for x in (cmyk, keep))
    cases.update({"cmyk.jpg": cmyk, "bare.jpg": bare, "mpo.jpg": saved(RGB, "MPO", save_all=True, append_images=[GREY.convert("RGB")]),
                  "grey.jpg": saved(GREY, "JPEG"), "restarts.jpg": saved(RGB, "JPEG", restart_marker_blocks=2), "no-end.jpg": jpeg[:-2]})
    for t in 0, 1, 2:
        for name, data in ("cmyk", bare), ("rgb", jpeg.replace(jpeg[2:20], b"")), ("no-keep" if t else "keep", keep):
            cases[f"{name}-adobe{t}.jpg"] = segments(data, (0xee, b"Adobe\0d\0\0\0\0" + bytes([t])))
    at = jpeg.index(b"\xff\xc0")
    for marker, bits in (0xc3, 8), (0xc9, 8), (0xca, 8), (0xc0, 12):
        cases[f"no-{marker:x}-{bits}.jpg"] = jpeg[:at + 1] + bytes([marker]) + jpeg[at + 2:at + 4] + bytes([bits]) + jpeg[at + 5:]


def theirs(data):
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    clear = image.mode in ("LA", "RGBA") or "transparency" in image.info
    a = np.asarray(image.convert("RGBA" if clear else "RGB"), dtype=float)
    return a[:, :, :3] * a[:, :, 3:] / 255 + 255 - a[:, :, 3:] if clear else a


def differs(name, out):
    line, no = out.readline().decode(), name.startswith("no-")
    if line.startswith("refused"):
        return not no and line.strip()
    width, height = map(int, line.split())
    got = np.frombuffer(out.read(3 * width * height), np.uint8).reshape(height, width, 3)
    if no:
        return "is to be refused"
    want = theirs(cases[name])
    off = np.abs(got - want) if got.shape == want.shape else np.full(9, np.inf)
    return (off.max() > 3 or (off > 2.5).sum() > 3) and f"{got.shape}, Pillow {want.shape}, off by {off.max():.3g}"


def main():
    orientations()
    kinds()
    with tempfile.TemporaryDirectory() as folder:
        program, wrong = os.path.join(folder, "decode"), 0
        subprocess.run([os.environ.get("CC", "cc"), "-std=c99", "-O2", "-w", os.path.join(HERE, "decode.c"), "-o", program, "-lm"], check=True)
        for name, data in cases.items():
            with open(os.path.join(folder, name), "wb") as f:
                f.write(data)
        out = io.BytesIO(subprocess.run([program] + list(cases), cwd=folder, stdout=subprocess.PIPE, check=True).stdout)
        for name in cases:
            if (what := differs(name, out)):
                wrong += 1
                print(f"  {name}: {what}")
    print(f"{len(cases)} pictures, {wrong} differ from Pillow's")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
