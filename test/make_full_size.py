"""Writes a FLUX.1-dev, or a Stable Diffusion 3.5, of random bf16 weights at its full size, and measures a picture with it.

    make_full_size.py FOLDER [SIZE [STEPS]] [large|medium]    needs $SHORTCUT_FLUX_DIR (configs, indices, tokenizers)

FLUX: transformer 23.8 GB, T5-XXL 9.5 GB, CLIP-L and VAE: 34 GB of disk, which is checked first. The shards
are those of the real index. large, medium: SD3.5's, with FLUX's tokenizers, 28 and 17 GB. Prints the
seconds of each part and the process's peak memory: anonymous (what it needs) and with the mapped file's
pages (which the kernel takes back as it likes). Without SIZE only the folder is written; a folder that is
there is used as it is.
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
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
SOURCE = os.environ.get("SHORTCUT_FLUX_DIR", "../shared/flux1-dev")
SD3 = {"large": (38, 192, 0), "medium": (24, 384, 13)}  # blocks, side of the table of positions, blocks with a second attention


def config(folder, part, **changes):
    """config.json of a part, changed."""
    path = os.path.join(folder, part, "scheduler_config.json" if part == "scheduler" else "tokenizer_config.json" if "tokenizer" in part else "config.json")
    out = {}
    if os.path.exists(path):
        with open(path) as f:
            out = json.load(f)
    if changes:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as f:
            json.dump({**out, **changes}, f, indent=2)
    return out


def skeleton(folder, model):
    """All but the weights."""
    shutil.copytree(SOURCE, folder, copy_function=shutil.copyfile)
    os.system(f"chmod -R u+w '{folder}'")
    if not model:
        return
    blocks, side, dual = SD3[model]
    path = lambda part: os.path.join(folder, part)
    shutil.rmtree(path("transformer"))
    for part in "text_encoder", "tokenizer":
        shutil.move(path(part + "_2"), path(part + "_3"))
        shutil.copytree(path(part), path(part + "_2"))
    config(folder, "tokenizer_2", pad_token="!")
    with open(os.path.join(path("tokenizer_2"), "special_tokens_map.json")) as f:
        special = json.load(f)
    with open(os.path.join(path("tokenizer_2"), "special_tokens_map.json"), "w") as f:
        json.dump({**special, "pad_token": "!"}, f)
    config(folder, "text_encoder", architectures=["CLIPTextModelWithProjection"])
    config(folder, "text_encoder_2", architectures=["CLIPTextModelWithProjection"], hidden_act="gelu", hidden_size=1280, intermediate_size=5120,
           num_attention_heads=20, num_hidden_layers=32, projection_dim=1280)
    config(folder, "transformer", _class_name="SD3Transformer2DModel", sample_size=128, patch_size=2, in_channels=16, out_channels=16,
           num_layers=blocks, num_attention_heads=blocks, attention_head_dim=64, joint_attention_dim=4096, caption_projection_dim=64 * blocks,
           pooled_projection_dim=2048, pos_embed_max_size=side, dual_attention_layers=list(range(dual)), qk_norm="rms_norm")
    config(folder, "vae", scaling_factor=1.5305, shift_factor=0.0609)
    config(folder, "scheduler", shift=3.0, use_dynamic_shifting=False)
    clip, t5 = ["transformers", "CLIPTextModelWithProjection"], ["transformers", "T5EncoderModel"]
    words = ["transformers", "CLIPTokenizer"]
    with open(path("model_index.json"), "w") as f:
        json.dump(dict(_class_name="StableDiffusion3Pipeline", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"], text_encoder=clip,
                       text_encoder_2=clip, text_encoder_3=t5, tokenizer=words, tokenizer_2=words, tokenizer_3=["transformers", "T5TokenizerFast"],
                       transformer=["diffusers", "SD3Transformer2DModel"], vae=["diffusers", "AutoencoderKL"]), f, indent=2)


def shapes(folder, part):
    path, c = os.path.join(folder, part), config(folder, part)
    with torch.device("meta"):
        if part == "transformer":
            kind = {"FluxTransformer2DModel": FluxTransformer2DModel, "SD3Transformer2DModel": SD3Transformer2DModel}[c["_class_name"]]
            model = kind.from_config(kind.load_config(path))
        elif part == "vae":
            model = AutoencoderKL.from_config(AutoencoderKL.load_config(path))
        elif c["model_type"] == "t5":
            model = T5EncoderModel(T5Config.from_pretrained(path))
        else:
            kind = CLIPTextModelWithProjection if c["architectures"] == ["CLIPTextModelWithProjection"] else CLIPTextModel
            model = kind(CLIPTextConfig.from_pretrained(path))
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


def make(folder, model):
    skeleton(folder, model)
    sizes = {part: shapes(folder, part) for part in sorted(os.listdir(folder)) if os.path.exists(os.path.join(folder, part, "config.json"))}
    total = sum(2 * int(numpy.prod(s)) for part in sizes.values() for s in part.values())
    free = shutil.disk_usage(os.path.dirname(os.path.abspath(folder))).free
    print(f"{total / 1e9:.1f} GB to write, {free / 1e9:.1f} GB free", flush=True)
    if free < total + 5e9:
        shutil.rmtree(folder)
        sys.exit("not enough room on this disk")
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
    arguments = [a for a in sys.argv[1:] if a not in SD3]
    if not os.path.exists(arguments[0]):
        make(arguments[0], next((a for a in sys.argv if a in SD3), None))
    if len(arguments) > 1:
        sys.exit(measure(arguments[0], int(arguments[1]), arguments[2] if len(arguments) > 2 else 1))
