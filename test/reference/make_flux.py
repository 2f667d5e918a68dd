"""Writes test/reference/flux_*: small random FLUX transformers, and what PyTorch says they compute.

Outputs, the gradient of every weight and every LoRA factor, ten AdamW steps, and the SCFM target,
the last a transcription of the method in plain PyTorch, not of our C code; the same with true CFG.
"""
import json
import os

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file

HERE = os.path.dirname(os.path.abspath(__file__))
RANK, SCALE, CFG = 3, 0.7, 2.5


def inputs(config, batch, text, h, w):
    r = lambda *s: torch.randn(*s).double()  # f32 values: the sinusoids of 1000 t feel the rounding of t
    return dict(x=r(batch, h * w, config["in_channels"]), context=r(batch, text, config["joint_attention_dim"]),
                pooled=r(batch, config["pooled_projection_dim"]), time=torch.rand(batch).double(),
                guidance=(1 + 3 * torch.rand(batch)).double(), goal=r(batch, h * w, config["in_channels"]))


def velocity(model, x, context, pooled, time, guidance, h, w):
    ids = torch.zeros(h, w, 3, dtype=torch.float64)
    ids[..., 1] += torch.arange(h)[:, None]
    ids[..., 2] += torch.arange(w)[None]
    return model(hidden_states=x, encoder_hidden_states=context, pooled_projections=pooled, timestep=time,
                 guidance=guidance if model.config.guidance_embeds else None, img_ids=ids.view(-1, 3),
                 txt_ids=torch.zeros(context.shape[1], 3, dtype=torch.float64), return_dict=False)[0]


class Lora:
    """Sets of factors on every linear layer, chosen for each sample of the batch."""
    def __init__(self, model, sets):
        self.sets, self.choice = [], None
        self.modules = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        for _ in range(sets):
            self.sets.append({n: (torch.randn(RANK, m.in_features, dtype=torch.float64) * 0.2, torch.randn(m.out_features, RANK, dtype=torch.float64) * 0.05)
                              for n, m in self.modules.items()})
        for n, m in self.modules.items():
            m.register_forward_hook(lambda m, i, o, n=n: self.add(n, i[0], o))

    def add(self, name, x, y):
        if self.choice is None:
            return y
        extra = []
        for sample, s in enumerate(self.choice):
            if s is None:
                extra.append(torch.zeros_like(y[sample]))
            else:
                a, b = self.sets[s][name]
                extra.append(SCALE * (x[sample] @ a.T) @ b.T)
        return y + torch.stack(extra)


def shifted(u, s):
    return s * u / (1 + (s - 1) * u)


def guided(model, lora, sets, scales, x, i, time, h, w):
    """v_u + scale (v_c - v_u), each of two evaluations of its own; v_u: with the one text i["no_*"]."""
    n, lora.choice = len(x), sets
    v_c = velocity(model, x, i["context"], i["pooled"], time, i["guidance"], h, w)
    v_u = velocity(model, x, i["no_context"].expand(n, -1, -1), i["no_pooled"].expand(n, -1), time, i["guidance"], h, w)
    return v_u + torch.tensor(scales, dtype=torch.float64)[:, None, None] * (v_c - v_u)


def scfm(model, lora, x0, noise, i, draws, h, w, cfg=None):
    """method.md, steps 3 to 6; a draw is (teacher?, N, j, shift). cfg: None; "folded": only the
    teacher is guided, in both halves of its case; "student": everything is."""
    t = torch.tensor([[shifted(1 - (j + k) / n, s) for k in range(3)] for _, n, j, s in draws])
    t[:, 0] = t[:, 0].clamp(max=1 - 1e-5)
    t = t.double()
    d1, d2 = (t[:, 0] - t[:, 1])[:, None, None], (t[:, 1] - t[:, 2])[:, None, None]
    t0 = t[:, 0][:, None, None]
    x = (1 - t0) * x0 + t0 * noise
    if cfg:
        case = [d[0] for d in draws]
        alone = 1 if cfg == "folded" else CFG
        first, first_scale = [None if c else 1 for c in case], [CFG if c else alone for c in case]
        second = [None if c and cfg == "folded" else 2 for c in case]
        with torch.no_grad():
            v1 = guided(model, lora, first, first_scale, x, i, t[:, 0], h, w)
            v2 = guided(model, lora, second, first_scale, x - d1 * v1, i, t[:, 1], h, w)
        return (d1 * v1 + d2 * v2) / (d1 + d2)
    with torch.no_grad():
        lora.choice = [None if teacher else 1 for teacher, *_ in draws]        # teacher, or fast
        v1 = velocity(model, x, i["context"], i["pooled"], t[:, 0], i["guidance"], h, w)
        lora.choice = [2] * len(draws)                                          # slow
        v2 = velocity(model, x - d1 * v1, i["context"], i["pooled"], t[:, 1], i["guidance"], h, w)
    return t, x, (d1 * v1 + d2 * v2) / (d1 + d2)


def make(name, seed, batch, text, h, w, **config):
    torch.manual_seed(seed)
    folder = os.path.join(HERE, name)
    os.makedirs(folder, exist_ok=True)
    model = FluxTransformer2DModel(patch_size=1, **config)
    for p in model.parameters():
        p.data = (p.data + 0.05 * torch.randn_like(p)).to(torch.bfloat16).double()
    model = model.double()
    save_file({n: p.to(torch.bfloat16).contiguous() for n, p in model.state_dict().items()},
              os.path.join(folder, "diffusion_pytorch_model.safetensors"))
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(dict(_class_name="FluxTransformer2DModel", patch_size=1, **config), f, indent=2)
    i = inputs(config, batch, text, h, w)
    args = (i["x"], i["context"], i["pooled"], i["time"], i["guidance"], h, w)
    out = {k: v for k, v in i.items()}
    out["grid"] = torch.tensor([h, w, text], dtype=torch.float64)
    v = velocity(model, *args)
    loss = ((v - i["goal"]) ** 2).mean()
    loss.backward()
    out["velocity"], out["loss"] = v, loss.reshape(1)
    for n, p in model.named_parameters():
        out["grad." + n] = p.grad.clone()
    lora = Lora(model, 3)                                                       # student, fast, slow
    for s, factors in enumerate(lora.sets):
        for n, (a, b) in factors.items():
            out[f"lora{s}.{n}.a"], out[f"lora{s}.{n}.b"] = a, b
    for a, b in lora.sets[0].values():
        a.requires_grad_(), b.requires_grad_()
    lora.choice = [0] * batch
    v = velocity(model, *args)
    ((v - i["goal"]) ** 2).mean().backward()
    out["lora_velocity"] = v
    for n, (a, b) in lora.sets[0].items():
        out[f"lora_grad.{n}.a"], out[f"lora_grad.{n}.b"] = a.grad, b.grad
    draws = [(True, 32, 6, 3.1), (False, 4, 2, 2.7), (False, 16, 0, 4.0), (True, 32, 0, 2.5)][:batch]
    x0, noise = torch.randn_like(i["x"]), torch.randn_like(i["x"])
    t, x, target = scfm(model, lora, x0, noise, i, draws, h, w)
    out.update(x0=x0, noise=noise, draws=torch.tensor([[float(d[0]), d[1], d[2], d[3]] for d in draws]), times=t, noisy=x, target=target)
    i.update(no_context=torch.randn(1, text, config["joint_attention_dim"]).double(),
             no_pooled=torch.randn(1, config["pooled_projection_dim"]).double())
    for cfg in ("folded", "student"):
        out["cfg_" + cfg] = scfm(model, lora, x0, noise, i, draws, h, w, cfg)
    for factor in (f for factors in lora.sets[0].values() for f in factors):
        factor.grad = None
    v = guided(model, lora, [0] * batch, [CFG] * batch, i["x"], i, i["time"], h, w)
    ((v - i["goal"]) ** 2).mean().backward()
    for n, (a, b) in lora.sets[0].items():
        out[f"cfg_grad.{n}.a"], out[f"cfg_grad.{n}.b"] = a.grad, b.grad
    times = [1 - 1e-5] + [shifted(1 - k / 3, 3) for k in (1, 2, 3)]
    x = noise.float().double()
    for now, then in zip(times, times[1:]):
        with torch.no_grad():
            time = torch.full((batch,), now).double()
            x = x - (now - then) * guided(model, lora, [None] * batch, [CFG] * batch, x, i, time, h, w)
    out.update(cfg_sample=x, no_context=i["no_context"], no_pooled=i["no_pooled"])
    save_file({k: v.detach().float().contiguous() for k, v in out.items()}, os.path.join(folder, "reference.safetensors"))


def adamw():
    torch.manual_seed(9)
    w = torch.nn.Parameter(torch.randn(500))
    start, grads = w.detach().clone(), torch.randn(10, 500)
    optimiser = torch.optim.AdamW([w], lr=3e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for g in grads:
        w.grad = g.clone()
        optimiser.step()
    save_file({"start": start, "grads": grads, "end": w.detach()}, os.path.join(HERE, "adamw.safetensors"))


make("flux_a", 1, 3, 5, 3, 4, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
     joint_attention_dim=24, pooled_projection_dim=20, guidance_embeds=True, axes_dims_rope=(4, 6, 6))
make("flux_b", 2, 2, 7, 2, 3, in_channels=8, num_layers=2, num_single_layers=1, attention_head_dim=8, num_attention_heads=3,
     joint_attention_dim=10, pooled_projection_dim=6, guidance_embeds=False, axes_dims_rope=(2, 4, 2))
adamw()
