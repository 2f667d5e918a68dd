"""Writes a FLUX.1-dev of random bf16 weights at its full size, and measures a picture with it.

    make_full_size.py FOLDER [SIZE [STEPS]]    needs $SHORTCUT_FLUX_DIR (configs, indices, tokenizers)

Transformer 23.8 GB, T5-XXL 9.5 GB, CLIP-L and VAE: 34 GB of disk, which is checked first. The shards
are those of the real index. Prints the seconds of each part and the process's peak memory: anonymous
(what it needs) and with the mapped file's pages (which the kernel takes back as it likes).
Without SIZE only the folder is written; a folder that is there is used as it is.
"""
import json
import os
import shutil
import struct
import subprocess
import sys
import time

import numpy
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
SOURCE = os.environ.get("SHORTCUT_FLUX_DIR", "../shared/flux1-dev")


def shapes(part):
    path = os.path.join(SOURCE, part)
    with torch.device("meta"):
        if part == "transformer":
            model = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(path))
        elif part == "vae":
            model = AutoencoderKL.from_config(AutoencoderKL.load_config(path))
        elif part == "text_encoder":
            model = CLIPTextModel(CLIPTextConfig.from_pretrained(path))
        else:
            model = T5EncoderModel(T5Config.from_pretrained(path))
    out = {k: tuple(v.shape) for k, v in model.state_dict().items() if v.is_floating_point()}
    out.pop("encoder.embed_tokens.weight", None)
    return out


def write(path, tensors, noise):
    """tensors: {name: shape}; values are cut from `noise`, bf16, from a place that differs for each; norms are 1."""
    header, at, start = {}, 0, 0
    for name, shape in tensors.items():
        n = int(numpy.prod(shape))
        header[name] = dict(dtype="BF16", shape=list(shape), data_offsets=[at, at + 2 * n])
        at += 2 * n
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors.items():
            n = int(numpy.prod(shape))
            if len(shape) == 1 and name.endswith("weight"):
                f.write(numpy.full(n, 0x3f80, numpy.uint16).tobytes())
                continue
            while n > 0:
                start = (start + 7919) % 4096
                piece = noise[start:start + n]
                f.write(piece.tobytes())
                n -= len(piece)
    return at


def make(folder):
    sizes = {part: shapes(part) for part in ("transformer", "text_encoder", "text_encoder_2", "vae")}
    total = sum(2 * int(numpy.prod(s)) for part in sizes.values() for s in part.values())
    free = shutil.disk_usage(os.path.dirname(os.path.abspath(folder))).free
    print(f"{total / 1e9:.1f} GB to write, {free / 1e9:.1f} GB free", flush=True)
    if free < total + 5e9:
        sys.exit("not enough room on this disk")
    shutil.copytree(SOURCE, folder, copy_function=shutil.copyfile)
    os.system(f"chmod -R u+w '{folder}'")
    noise = (torch.randn(1 << 24, generator=torch.Generator().manual_seed(1)) * 0.02).bfloat16().view(torch.int16).numpy()
    for part, tensors in sizes.items():
        index = [f for f in os.listdir(os.path.join(folder, part)) if f.endswith(".index.json")]
        name = "diffusion_pytorch_model.safetensors" if part in ("transformer", "vae") else "model.safetensors"
        shards = {k: name for k in tensors}
        if index:
            with open(os.path.join(folder, part, index[0])) as f:
                shards = json.load(f)["weight_map"]
            assert set(shards) == set(tensors), set(shards) ^ set(tensors)
        for shard in sorted(set(shards.values())):
            n = write(os.path.join(folder, part, shard), {k: s for k, s in tensors.items() if shards[k] == shard}, noise)
            print(f"{part}/{shard}: {n / 1e9:.2f} GB", flush=True)


def measure(folder, size, steps):
    out = os.path.join(folder, "out.png")
    started = time.time()
    run = subprocess.Popen([os.path.join(ROOT, "sample"), "a lighthouse at dusk", str(steps), "--model", folder, "--no-lora", "--size", f"{size}x{size}",
                            "--out", out])
    peak = {}
    while run.poll() is None:
        try:
            with open(f"/proc/{run.pid}/status") as f:
                for line in f:
                    key, _, value = line.partition(":")
                    if key in ("RssAnon", "RssFile", "VmRSS"):
                        peak[key] = max(peak.get(key, 0), int(value.split()[0]))
        except OSError:
            pass
        time.sleep(0.2)
    print(f"exit status {run.returncode}, {time.time() - started:.1f} s, peak " + ", ".join(f"{k} {v / 1048576:.2f} GiB" for k, v in peak.items()))
    return run.returncode


if __name__ == "__main__":
    if not os.path.exists(sys.argv[1]):
        make(sys.argv[1])
    if len(sys.argv) > 2:
        sys.exit(measure(sys.argv[1], int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else 1))
