#!/usr/bin/env python3
"""Trains the small AutoencoderKL of data/tiny-flux: 128x128 pixels to 16x16x16 latents and back.

    train_vae.py --out tiny-flux/vae --minutes 20

It is diffusers' AutoencoderKL in FLUX's form (f = 8, 16 channels, no quant convs, attention in the
middle), only narrow. The loss is L1 at three scales, L1 of the picture's gradients (sharp edges)
and a KL term strong enough to leave visible noise in the latents: a decoder that has learned to
live with noise forgives the small errors of a small diffusion model. In the first half of the time
the KL term is weak, so that the pictures come first.
Matrices and convolutions are trained with Muon (orthogonalised momentum), the rest with Adam.
"""
import argparse
import os
os.environ.setdefault("OMP_WAIT_POLICY", "passive")     # before torch: spinning threads stall each
import time                                             # other when the machine is shared
from multiprocessing import Pool

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from make_emoji import Renderer

HERE = os.path.dirname(os.path.abspath(__file__))
CONFIG = dict(
    in_channels=3, out_channels=3, latent_channels=16, sample_size=128, act_fn="silu",
    block_out_channels=[16, 32, 64, 96], layers_per_block=1, norm_num_groups=8,
    down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    mid_block_add_attention=True, use_quant_conv=False, use_post_quant_conv=False,
    force_upcast=True, scaling_factor=1.0, shift_factor=0.0)


# ---- pictures ---------------------------------------------------------------------------------

def _render(job):
    concept, count, seed, split = job
    r = Renderer()
    return np.stack([r.sample(concept, i, seed, split)[0] for i in range(count)])


def render_all(per_concept, seed=1, split="train", jobs=2):
    """uint8 tensor [concepts * per_concept, 3, 128, 128], concept by concept."""
    with Pool(jobs) as pool:
        work = [(c, per_concept, seed, split) for c in range(len(Renderer().concepts))]
        px = np.concatenate(pool.map(_render, work))
    return torch.from_numpy(px).permute(0, 3, 1, 2).contiguous()


def to_float(px):
    return px.float() / 127.5 - 1.0


# ---- optimiser --------------------------------------------------------------------------------

def orthogonalise(g, steps=5):
    """Newton-Schulz iteration towards the nearest (semi-)orthogonal matrix."""
    x = g / (g.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                buf = self.state[p].setdefault("m", torch.zeros_like(p))
                buf.lerp_(p.grad, 1 - group["momentum"])
                g = p.grad.lerp(buf, group["momentum"]).flatten(1)
                # 0.2 sqrt(longer side): the update's RMS is then that of Adam's.
                p.add_(orthogonalise(g).view_as(p), alpha=-0.2 * max(g.shape) ** 0.5 * group["lr"])


def make_optimisers(vae, lr, muon=True):
    matrices = [p for n, p in vae.named_parameters()
                if muon and p.ndim >= 2 and "conv_in" not in n and "conv_out" not in n]
    ids = {id(p) for p in matrices}
    rest = [p for p in vae.parameters() if id(p) not in ids]
    adam = torch.optim.Adam(rest, lr=lr, betas=(0.9, 0.98))
    return [adam] + ([Muon(matrices, lr=lr)] if matrices else [])


# ---- loss -------------------------------------------------------------------------------------

def gradients(x):
    return x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]


def picture_loss(y, x):
    loss = 0.0
    for level in range(3):
        loss = loss + (1.0, 0.5, 0.5)[level] * (y - x).abs().mean()
        if level < 2:
            for a, b in zip(gradients(y), gradients(x)):
                loss = loss + (1.0, 0.5)[level] * (a - b).abs().mean()
        y, x = F.avg_pool2d(y, 2), F.avg_pool2d(x, 2)
    return loss


@torch.no_grad()
def measure(vae, px, noise=0.0):
    """PSNR in dB of reconstructions (mean over pictures), and the posterior's mean and logvar."""
    vae.eval()
    dtype = next(vae.parameters()).dtype
    db, means, logvars = [], [], []
    for part in px.split(16):
        x = to_float(part).to(vae.device)
        q = vae.encode(x.to(dtype)).latent_dist
        z = q.mean + noise * q.std * torch.randn_like(q.mean)
        y = vae.decode(z).sample.float().clamp(-1, 1)
        db.append(-10 * ((y - x) / 2).square().mean((1, 2, 3)).log10())
        means.append(q.mean.float().cpu())
        logvars.append(q.logvar.float().cpu())
    vae.train()
    return torch.cat(db).mean().item(), torch.cat(means), torch.cat(logvars)


def latent_summary(mean, logvar):
    std = mean.std()
    noise = (0.5 * logvar).exp()
    return f"latent std {std:.3f}, posterior std / latent std {(noise.mean() / std):.3f}"


# ---- training ---------------------------------------------------------------------------------

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--out", default=os.path.join(HERE, "tiny-flux", "vae"))
    p.add_argument("--minutes", type=float, default=20.0, help="training time; the rate falls to 0")
    p.add_argument("--steps", type=int, help="instead of --minutes")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--kl", type=float, default=1.5e-2, help="weight of KL in the second half")
    p.add_argument("--kl-start", type=float, default=1e-3, help="and in the first")
    p.add_argument("--ema", type=float, default=0.995)
    p.add_argument("--adam", action="store_true", help="Adam for all weights")
    p.add_argument("--per-concept", type=int, default=100)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--device", default="cpu")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--compile", action="store_true", help="torch.compile (needs a C++ compiler)")
    p.add_argument("--checkpoint", help="file to save to every 2 minutes, and to resume from")
    p.add_argument("--cache", help="file to keep the rendered pictures in (uint8 .npy)")
    a = p.parse_args()

    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    if a.cache and os.path.exists(a.cache):
        train = torch.from_numpy(np.load(a.cache))
    else:
        train = render_all(a.per_concept, a.seed, jobs=a.threads)
        if a.cache:
            np.save(a.cache, train.numpy())
    test = render_all(2, a.seed, "test", jobs=a.threads)

    vae = AutoencoderKL(**CONFIG).to(a.device)
    ema = AutoencoderKL(**CONFIG).to(a.device)
    ema.load_state_dict(vae.state_dict())
    optimisers = make_optimisers(vae, a.lr, muon=not a.adam)
    print(f"{sum(q.numel() for q in vae.parameters()):,} parameters, "
          f"{sum(q.numel() for q in vae.decoder.parameters()):,} of them the decoder's", flush=True)

    step, spent = 0, 0.0
    if a.checkpoint and os.path.exists(a.checkpoint):
        state = torch.load(a.checkpoint, map_location=a.device, weights_only=True)
        vae.load_state_dict(state["vae"])
        ema.load_state_dict(state["ema"])
        for o, s in zip(optimisers, state["optimisers"]):
            o.load_state_dict(s)
        step, spent = state["step"], state["spent"]

    def loss_of(x, noise):
        with torch.autocast(a.device.split(":")[0], torch.bfloat16):
            mean, logvar = vae.encoder(x).float().chunk(2, dim=1)
            logvar = logvar.clamp(-30.0, 20.0)
            y = vae.decoder(mean + (0.5 * logvar).exp() * noise)
        rec = picture_loss(y.float(), x)
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        return rec, kl

    if a.compile:
        loss_of = torch.compile(loss_of)

    last = saved = time.time()
    while True:
        done = step / a.steps if a.steps else spent / (60.0 * a.minutes)
        if done >= 1.0:
            break
        rate = a.lr * min(1.0, (step + 1) / 100) * (1.0 - done)
        for o in optimisers:
            for group in o.param_groups:
                group["lr"] = rate
        x = to_float(train[torch.randint(len(train), (a.batch,))]).to(a.device)
        noise = torch.randn(a.batch, CONFIG["latent_channels"], 16, 16, device=a.device)
        rec, kl = loss_of(x, noise)
        (rec + (a.kl_start if done < 0.5 else a.kl) * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for o in optimisers:
            o.step()
            o.zero_grad(set_to_none=True)
        step += 1
        with torch.no_grad():
            d = min(a.ema, (1 + step) / (10 + step))
            for q, r in zip(ema.parameters(), vae.parameters()):
                q.lerp_(r, 1 - d)
        now = time.time()
        spent, last = spent + now - last, now

        if step % 100 == 0:
            text = f"step {step}  {spent / 60:.1f} min  loss {rec.item():.4f}  kl {kl.item():.3f}"
            if step % 300 == 0:
                db, mean, logvar = measure(ema, test)
                text += f"  PSNR {db:.2f} dB  " + latent_summary(mean, logvar)
            print(text, flush=True)
            if a.checkpoint and now - saved > 120:
                torch.save(dict(vae=vae.state_dict(), ema=ema.state_dict(), step=step, spent=spent,
                                optimisers=[o.state_dict() for o in optimisers]),
                           a.checkpoint + ".tmp")
                os.replace(a.checkpoint + ".tmp", a.checkpoint)
                saved = now
            last = time.time()          # looking does not count as training time

    finish(ema, train, test, a.out)


def finish(vae, train, test, out):
    """Latent statistics into the config, weights to bf16, the folder written and measured."""
    _, mean, logvar = measure(vae, train[:: max(1, len(train) // 1024)])
    vae.register_to_config(shift_factor=round(mean.mean().item(), 4),
                           # of what encoding draws: the means' variance and the noise's
                           scaling_factor=round(
                               (mean.var() + logvar.exp().mean()).rsqrt().item(), 4))
    vae = vae.to(torch.bfloat16)
    vae.save_pretrained(out)
    os.chmod(os.path.join(out, "diffusion_pytorch_model.safetensors"), 0o644)
    vae = AutoencoderKL.from_pretrained(out).to(vae.device)     # float32 arithmetic, bf16 weights
    db, _, _ = measure(vae, test)
    noisy, _, _ = measure(vae, test, noise=1.0)
    print(f"final: PSNR {db:.2f} dB, from noisy latents {noisy:.2f} dB, "
          + latent_summary(mean, logvar))
    print(f"shift_factor {vae.config.shift_factor}, scaling_factor {vae.config.scaling_factor}")
    print("std of each channel:", [round(s, 2) for s in mean.std((0, 2, 3)).tolist()])
    print("posterior std of each:", [round(s, 2) for s in
                                     (0.5 * logvar).exp().mean((0, 2, 3)).tolist()])


if __name__ == "__main__":
    main()
