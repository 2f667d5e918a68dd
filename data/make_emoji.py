#!/usr/bin/env python3
"""Draws pictures of emoji with captions: the data the small FLUX model is trained on.

    make_emoji.py OUT --per-concept 160 --seed 1            # OUT/*.png and OUT/metadata.jsonl
    make_emoji.py OUT --per-concept 4 --split test
    make_emoji.py OUT --per-concept 1 --concepts "an onion,a pig" --coarse 0

Every caption has many different pictures (background, place, size, tilt, mirror image): if each
had only one, the flow towards it would be a straight line and there would be nothing to distil.
A share of the pictures gets a coarse caption ("a fruit") in place of its own.

The pictures come from the Noto Color Emoji font (Debian: fonts-noto-color-emoji, SIL OFL 1.1).
Picture i of a concept depends on nothing but (seed, split, concept, i).
"""
import argparse
import json
import os
import re

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HERE = os.path.dirname(os.path.abspath(__file__))
FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
EMOJI_TEST = "/usr/share/unicode/emoji/emoji-test.txt"
FONT_SIZE = 109           # the only size at which the font has bitmaps
BASE = 176                # size of the cached emoji, somewhat larger than in any picture
SPLITS = ("train", "test")

# The variety inside a caption.
FILL = 0.93               # at scale 1 the emoji's longer side is this part of the picture's
SCALE = (0.65, 1.05)
SHIFT = 0.10              # largest shift, as a part of the picture's side
TILT = 15.0               # largest rotation, degrees
FLIP = 0.5                # share of mirror images
GRADIENT = 0.4            # share of backgrounds with a soft gradient
COARSE = 0.15             # share of coarse captions


def load_concepts(path=os.path.join(HERE, "concepts.txt")):
    """List of (text, caption, coarse caption), in the file's order."""
    concepts = []
    with open(path, encoding="utf-8") as f:
        for line in f:
            if line.strip() and not line.startswith("#"):
                code, caption, coarse = line.rstrip("\n").split("\t")
                concepts.append(("".join(chr(int(c, 16)) for c in code.split()), caption, coarse))
    return concepts


def emoji_names(path=EMOJI_TEST):
    """{emoji: name} of every fully qualified emoji in Unicode's list."""
    names = {}
    with open(path, encoding="utf-8") as f:
        for line in f:
            m = re.match(r"([0-9A-F ]+?)\s*; fully-qualified\s*# \S+ E\S+ (.*)", line)
            if m:
                names["".join(chr(int(c, 16)) for c in m[1].split())] = m[2]
    return names


def check_concepts(concepts):
    """Each caption must be the emoji's Unicode name with or without an article."""
    names = emoji_names()
    for text, caption, _ in concepts:
        bare = re.sub(r"^an? ", "", caption)
        if names.get(text) != bare:
            raise SystemExit(f"concepts.txt: '{caption}': Unicode calls it '{names.get(text)}'")


def hsv_to_rgb(h, s, v):
    k = (np.array([5.0, 3.0, 1.0]) + 6.0 * h) % 6.0
    return v - v * s * np.clip(np.minimum(k, 4.0 - k), 0.0, 1.0)


class Renderer:
    def __init__(self, concepts=None, size=128):
        self.concepts = concepts or load_concepts()
        self.size = size
        self.font = ImageFont.truetype(FONT, FONT_SIZE)
        self.cache = {}

    def base(self, index):
        """The emoji, centred in a square, premultiplied alpha, some larger than in the font."""
        if index not in self.cache:
            # Drawn on black and on white, the two tell colour times alpha, and alpha, exactly.
            black, white = (Image.new("RGB", (160, 160), c) for c in ("black", "white"))
            for im in (black, white):
                ImageDraw.Draw(im).text((12, 12), self.concepts[index][0], font=self.font,
                                        embedded_color=True)
            black, white = (np.asarray(im).astype(np.int32) for im in (black, white))
            alpha = np.clip(255 - (white - black).mean(-1, keepdims=True), 0, 255)
            px = np.concatenate([black, np.rint(alpha)], -1).astype(np.uint8)
            im = Image.frombytes("RGBa", (160, 160), px.tobytes())
            ys, xs = np.nonzero(px[..., 3])
            im = im.crop((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
            longer = max(im.size)
            square = Image.new("RGBa", (longer, longer), (0, 0, 0, 0))
            square.paste(im, ((longer - im.width) // 2, (longer - im.height) // 2))
            self.cache[index] = square.resize((BASE, BASE), Image.LANCZOS)
        return self.cache[index]

    def background(self, rng):
        h, s, v = rng.uniform(0, 1), rng.uniform(0.05, 0.75), rng.uniform(0.45, 1.0)
        flat = rng.uniform() >= GRADIENT
        angle, depth = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.3)
        one = hsv_to_rgb(h, s, v)
        if flat:
            return one.astype(np.float32).reshape(1, 1, 3)
        other = hsv_to_rgb(h + rng.uniform(-0.06, 0.06), s, v - depth if v > 0.72 else v + depth)
        axis = np.linspace(-0.5, 0.5, self.size)
        ramp = np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None]
        ramp = (ramp / (abs(np.cos(angle)) + abs(np.sin(angle))) + 0.5)[..., None]
        return (one * (1 - ramp) + other * ramp).astype(np.float32)

    def picture(self, index, rng):
        """uint8 [size, size, 3]: one picture of concept `index`, drawn with `rng`."""
        n = self.size
        scale, tilt = rng.uniform(*SCALE), rng.uniform(-TILT, TILT)
        dx, dy = rng.uniform(-SHIFT, SHIFT, 2) * n
        flip = rng.uniform() < FLIP
        back = self.background(rng)

        im = self.base(index)
        if flip:
            im = im.transpose(Image.FLIP_LEFT_RIGHT)
        # Rotate on a larger canvas, then shrink the exact (fractional) box onto the picture:
        # one bicubic and one Lanczos pass give sub-pixel places without jagged edges.
        side = im.width
        box = n / (FILL * scale * n) * side      # picture's side in base pixels
        pad = int(np.ceil(0.5 * box + 0.2 * side))
        canvas = Image.new("RGBa", (2 * pad, 2 * pad), (0, 0, 0, 0))
        canvas.paste(im, (pad - side // 2, pad - side // 2))
        canvas = canvas.rotate(tilt, Image.BICUBIC)
        x0, y0 = pad - box / 2 - dx * box / n, pad - box / 2 - dy * box / n
        im = canvas.resize((n, n), Image.LANCZOS, box=(x0, y0, x0 + box, y0 + box))
        px = np.asarray(im, dtype=np.float32) / 255.0
        rgb = px[..., :3] + (1.0 - px[..., 3:]) * back
        return np.clip(np.rint(rgb * 255.0), 0, 255).astype(np.uint8)

    def sample(self, index, i, seed, split="train", coarse=COARSE):
        """(picture, caption): picture i of a concept."""
        rng = np.random.default_rng([seed, SPLITS.index(split), ord(self.concepts[index][0][0]), i])
        is_coarse = rng.uniform() < coarse
        return self.picture(index, rng), self.concepts[index][2 if is_coarse else 1]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("out")
    p.add_argument("--per-concept", type=int, default=160)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--size", type=int, default=128)
    p.add_argument("--split", choices=SPLITS, default="train")
    p.add_argument("--coarse", type=float, default=COARSE, help="share of coarse captions")
    p.add_argument("--concepts", help="captions, separated by commas; default: all")
    p.add_argument("--compress", type=int, default=1, help="PNG compression level")
    a = p.parse_args()

    r = Renderer(size=a.size)
    check_concepts(r.concepts)
    captions = [c[1] for c in r.concepts]
    wanted = [c.strip() for c in a.concepts.split(",")] if a.concepts else captions
    os.makedirs(a.out, exist_ok=True)
    with open(os.path.join(a.out, "metadata.jsonl"), "w", encoding="utf-8") as meta:
        for i in range(a.per_concept):
            for caption in wanted:
                px, prompt = r.sample(captions.index(caption), i, a.seed, a.split, a.coarse)
                name = re.sub(r"\W+", "_", re.sub(r"^an? ", "", caption)) + f"_{i:04d}.png"
                Image.fromarray(px).save(os.path.join(a.out, name), compress_level=a.compress)
                meta.write(json.dumps({"file_name": name, "prompt": prompt}) + "\n")


if __name__ == "__main__":
    main()
