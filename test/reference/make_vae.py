#!/usr/bin/env python3
"""Writes vae_*/ beside this file: small random AutoencoderKLs of three shapes, and what diffusers
(0.35.2, torch 2.8.0) computes in float64 with them and with data/tiny-flux; test_vae.c compares.
To be run again when data/tiny-flux/vae changes.

    python make_vae.py
"""
import os

import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from safetensors.torch import save_file

HERE = os.path.dirname(os.path.abspath(__file__))
CASES = {   # channels, layers, groups, latent channels, attention, quant convs, dtype, B, H, W
    "vae_a": ([4, 4, 8], 1, 4, 4, True, True, torch.float32, 2, 24, 36),
    "vae_b": ([16, 8], 2, 8, 3, False, False, torch.float16, 3, 14, 18),
    "vae_c": ([8, 8, 8, 12], 2, 4, 16, True, False, torch.bfloat16, 1, 32, 48),
}


def randomise(vae, generator):
    """Weights that keep activations near 1; logvars outside [-30, 20] here and there."""
    for name, p in vae.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim > 1:
            p.data = noise * p[0].numel() ** -0.5
        else:
            p.data = (1.0 if "norm" in name and name.endswith("weight") else 0.0) + 0.3 * noise
    last = vae.quant_conv if vae.quant_conv is not None else vae.encoder.conv_out
    c = vae.config.latent_channels
    last.bias.data[c] -= 30.0
    last.bias.data[c + 1] += 20.0


def random_vae(channels, layers, groups, latents, attention, quant):
    levels = len(channels)
    vae = AutoencoderKL(
        block_out_channels=channels, layers_per_block=layers, norm_num_groups=groups,
        latent_channels=latents, mid_block_add_attention=attention, use_quant_conv=quant,
        use_post_quant_conv=quant, down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels, scaling_factor=0.3611, shift_factor=0.1159)
    randomise(vae, torch.Generator().manual_seed(levels))
    return vae


@torch.no_grad()
def reference(name, vae, batch, height, width):
    generator = torch.Generator().manual_seed(1)
    vae = vae.double()                          # the rounded weights, exact arithmetic
    pictures = torch.rand(batch, 3, height, width, generator=generator) * 2 - 1
    posterior = vae.encode(pictures.double()).latent_dist
    z = torch.randn(posterior.mean.shape, generator=generator)
    h, w = (n // 2 * 2 for n in z.shape[2:])
    even = z[:, :, :h, :w].contiguous()
    out = dict(pictures=pictures, mean=posterior.mean, logvar=posterior.logvar, latents=z,
               decoded=vae.decode(z.double()).sample, even=even,
               tokens=FluxPipeline._pack_latents(even, batch, z.shape[1], h, w))
    os.makedirs(os.path.join(HERE, name), exist_ok=True)
    save_file({k: v.float().contiguous().clone() for k, v in out.items()},
              os.path.join(HERE, name, "reference.safetensors"))
    print(name, sum(p.numel() for p in vae.parameters()), "parameters",
          f"mean {posterior.mean.std():.3f} decoded {out['decoded'].std():.3f}",
          f"clamped {((posterior.logvar == -30) | (posterior.logvar == 20)).float().mean():.3f}")


for case, (*shape, dtype, batch, height, width) in CASES.items():
    vae = random_vae(*shape).to(dtype)
    vae.save_pretrained(os.path.join(HERE, case))
    reference(case, vae, batch, height, width)
tiny = os.path.join(HERE, "../../data/tiny-flux/vae")
if os.path.exists(tiny):
    reference("vae_tiny", AutoencoderKL.from_pretrained(tiny), 1, 32, 48)
