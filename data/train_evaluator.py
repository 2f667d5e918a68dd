#!/usr/bin/env python3
"""Trains the evaluator: a small classifier of the concepts that judges drawn pictures.

    train_evaluator.py --out evaluator --vae tiny-flux/vae

How often it recognises the prompt stands in for CLIP's score, and its 64 features give the Frechet
distance that stands in for FID. It sees real pictures only, half of them through the VAE, so it
knows nothing of the models it judges. `config.json` describes every layer; in short

    128x128 RGB in [-1, 1] -> mean of 2x2 -> 4 levels of [conv 3x3 stride 2, group norm, SiLU,
    conv 3x3, group norm, SiLU] -> mean over pixels -> linear, SiLU (64 features) -> linear (logits)
"""
import argparse
import json
import os
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import time

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from make_emoji import load_concepts
from train_vae import render_all, to_float

HERE = os.path.dirname(os.path.abspath(__file__))
CHANNELS = (32, 64, 96, 128)
FEATURES, GROUPS, EPS = 64, 8, 1e-5


class Evaluator(nn.Module):
    def __init__(self, classes, channels=CHANNELS):
        super().__init__()
        c = 3
        for i, d in enumerate(channels):
            setattr(self, f"down{i}", nn.Conv2d(c, d, 3, stride=2, padding=1))
            setattr(self, f"down{i}_norm", nn.GroupNorm(GROUPS, d, eps=EPS))
            setattr(self, f"conv{i}", nn.Conv2d(d, d, 3, padding=1))
            setattr(self, f"conv{i}_norm", nn.GroupNorm(GROUPS, d, eps=EPS))
            c = d
        self.levels = len(channels)
        self.features = nn.Linear(c, FEATURES)
        self.logits = nn.Linear(FEATURES, classes)

    def forward(self, x):
        """x [B, 3, 128, 128] in [-1, 1] -> (features [B, 64], logits [B, classes])"""
        x = F.avg_pool2d(x, 2)
        for i in range(self.levels):
            for name in (f"down{i}", f"conv{i}"):
                x = F.silu(getattr(self, name + "_norm")(getattr(self, name)(x)))
        f = F.silu(self.features(x.mean((2, 3))))
        return f, self.logits(f)


def config(concepts):
    layers = [{"op": "avg_pool", "kernel": 2, "stride": 2}]
    for i, c in enumerate(CHANNELS):
        for name, stride in ((f"down{i}", 2), (f"conv{i}", 1)):
            layers += [{"op": "conv3x3", "name": name, "stride": stride, "padding": 1, "out": c},
                       {"op": "group_norm", "name": name + "_norm", "groups": GROUPS, "eps": EPS},
                       {"op": "silu"}]
    layers += [{"op": "mean_over_pixels"}, {"op": "linear", "name": "features", "out": FEATURES},
               {"op": "silu"}, {"op": "linear", "name": "logits", "out": len(concepts)}]
    return {"_class_name": "EmojiEvaluator", "sample_size": 128, "in_channels": 3,
            "channels": list(CHANNELS), "norm_num_groups": GROUPS, "norm_eps": EPS,
            "feature_dim": FEATURES, "num_classes": len(concepts),
            "captions": [c[1] for c in concepts], "layers": layers}


@torch.no_grad()
def through_vae(px, folder, device, noise):
    """uint8 pictures after encoding (with the posterior's noise times `noise`) and decoding."""
    from diffusers import AutoencoderKL
    vae = AutoencoderKL.from_pretrained(folder).to(device).eval()
    out = []
    for part in px.split(16):
        with torch.autocast(device.split(":")[0], torch.bfloat16):
            q = vae.encode(to_float(part).to(device)).latent_dist
            y = vae.decode(q.mean + noise * q.std * torch.randn_like(q.mean)).sample
        out.append(((y.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(out)


def augment(x):
    """Mild changes of contrast, brightness and sharpness, and noise: pictures drawn by a model
    differ from real ones in such ways, and should still be recognised."""
    n = len(x)
    one = lambda low, high: torch.empty(n, 1, 1, 1, device=x.device).uniform_(low, high)
    shift = torch.randint(-6, 7, (2,)).tolist()
    x = torch.roll(F.pad(x, (6, 6, 6, 6), mode="replicate"), shift, (2, 3))[..., 6:-6, 6:-6]
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    x = torch.lerp(x, soft, one(-0.3, 1.0))
    x = x * one(0.8, 1.15) + one(-0.1, 0.1)
    return (x + one(0, 0.12) * torch.randn_like(x)).clamp(-1, 1)


@torch.no_grad()
def accuracy(net, px, labels, device):
    net.eval()
    right = sum((net(to_float(p).to(device))[1].argmax(1).cpu() == l).sum().item()
                for p, l in zip(px.split(64), labels.split(64)))
    net.train()
    return right / len(px)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--out", default=os.path.join(HERE, "evaluator"))
    p.add_argument("--vae", default=os.path.join(HERE, "tiny-flux", "vae"))
    p.add_argument("--steps", type=int, default=1500)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--per-concept", type=int, default=60)
    p.add_argument("--through-vae", type=int, default=12, help="of these, reconstructed by the VAE")
    p.add_argument("--test-per-concept", type=int, default=8)
    p.add_argument("--seed", type=int, default=11)
    p.add_argument("--device", default="cpu")
    p.add_argument("--threads", type=int, default=2)
    a = p.parse_args()

    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    concepts = load_concepts()
    label = lambda n: torch.arange(len(concepts)).repeat_interleave(n)
    train = render_all(a.per_concept, a.seed, jobs=a.threads)
    test = render_all(a.test_per_concept, a.seed, "test", jobs=a.threads)
    labels, test_labels = label(a.per_concept), label(a.test_per_concept)
    some = (torch.arange(len(train)) % a.per_concept) < a.through_vae
    train_vae = through_vae(train[some], a.vae, a.device, noise=2.0)
    test_vae = through_vae(test, a.vae, a.device, noise=0.0)
    labels_vae = label(a.through_vae)
    print(f"{len(train)} pictures, {len(train_vae)} of them through the VAE too", flush=True)

    net = Evaluator(len(concepts)).to(a.device)
    print(f"{sum(q.numel() for q in net.parameters()):,} parameters", flush=True)
    decay = [q for q in net.parameters() if q.ndim > 1]
    plain = [q for q in net.parameters() if q.ndim == 1]
    optimiser = torch.optim.AdamW([dict(params=decay, weight_decay=0.05),
                                   dict(params=plain, weight_decay=0.0)], lr=a.lr)
    start = time.time()
    for step in range(1, a.steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = a.lr * min(1.0, step / 100) * (1.0 - step / a.steps)
        half = a.batch // 2
        i, j = torch.randint(len(train), (a.batch - half,)), torch.randint(len(train_vae), (half,))
        x = augment(to_float(torch.cat([train[i], train_vae[j]])).to(a.device))
        y = torch.cat([labels[i], labels_vae[j]]).to(a.device)
        loss = F.cross_entropy(net(x)[1], y, label_smoothing=0.05)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        if step % 200 == 0:
            print(f"step {step}  {(time.time() - start) / 60:.1f} min  loss {loss.item():.3f}  "
                  f"test accuracy {accuracy(net, test[::4], test_labels[::4], a.device):.3f}",
                  flush=True)

    result = {"real": accuracy(net, test, test_labels, a.device),
              "through_vae": accuracy(net, test_vae, test_labels, a.device)}
    print("test accuracy:", {k: round(v, 4) for k, v in result.items()})
    os.makedirs(a.out, exist_ok=True)
    save_file({k: v.cpu().contiguous() for k, v in net.state_dict().items()},
              os.path.join(a.out, "model.safetensors"), metadata={"format": "pt"})
    with open(os.path.join(a.out, "config.json"), "w", encoding="utf-8") as f:
        f.write(json.dumps(config(concepts) | {"test_accuracy": result}, indent=2) + "\n")


def load_evaluator(folder):
    """An Evaluator from its folder, and its captions in logit order."""
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
        c = json.load(f)
    net = Evaluator(c["num_classes"], tuple(c["channels"]))
    net.load_state_dict(load_file(os.path.join(folder, "model.safetensors")))
    return net.eval(), c["captions"]


if __name__ == "__main__":
    main()
