"""FLUX.1's VAE at its true widths and sizes: ours, whole and within little memory, against diffusers'.

    compare_vae.py [SIDE [LARGE]]    default: 1024 2048; needs 20 GiB of memory

Random weights, f32. At SIDE everything is compared with diffusers' untiled result; at LARGE, where
that would not fit, ours within 8 GiB with ours within 4. Limits: 1/255 of the range of a picture
(colours go from -1 to 1) and 1e-5 for latents. Exit status 1 if one is missed.
"""
import os
import subprocess
import sys
import tempfile

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from formats import random_weights

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
failed = 0


def ours(folder, side, memory):
    out = os.path.join(folder, "ours.safetensors")
    print(subprocess.run([f"{ROOT}/build/vae_at_size", f"{folder}/vae", str(side), str(memory), out], check=True, text=True, capture_output=True).stdout,
          end="", flush=True)
    return load_file(out)


def report(what, x, mean, decoded):
    global failed
    pixels = (x["decoded"] - decoded).abs().max().item() * 127.5
    latents = ((x["mean"] - mean).norm() / mean.norm()).item()
    failed += pixels > 1 or latents > 1e-5
    print(f"{what}: latents {latents:.1e}, decoded picture at most {pixels:.1e} of 255", flush=True)


def main():
    side, large = ([int(x) for x in sys.argv[1:]] + [1024, 2048][len(sys.argv) - 1:])[:2]
    subprocess.run(["make", "-s", "-C", ROOT, "build/vae_at_size"], check=True)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        torch.manual_seed(1)
        vae = AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, block_out_channels=[128, 256, 512, 512],
                            layers_per_block=2, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, sample_size=1024,
                            scaling_factor=0.3611, shift_factor=0.1159)
        random_weights(vae)
        vae.save_pretrained(f"{folder}/vae")
        x = ours(folder, side, 0)
        mean, decoded = vae.encode(x["picture"]).latent_dist.mean, vae.decode(x["latents"]).sample
        del vae
        report(f"{side}, whole, and diffusers", x, mean, decoded)
        report(f"{side}, within 1 GiB, and diffusers", ours(folder, side, 1024), mean, decoded)
        x = ours(folder, large, 8192)
        report(f"{large}, within 4 GiB and 8", ours(folder, large, 4096), x["mean"], x["decoded"])
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
