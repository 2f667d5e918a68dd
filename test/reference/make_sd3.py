"""Writes test/reference/sd3_*: small random Stable Diffusion 3.5 transformers, and what PyTorch says they compute.

sd3_a is like Large, sd3_b like Medium, with a second attention in its first blocks. Outputs; of the gradient
of every weight its norm and its product with cos(0), cos(1), ..; every LoRA factor's gradient whole; the
SCFM target with and without true CFG, a transcription of the method in plain PyTorch as in make_flux.py; a
sample; and a LoRA file on every layer, those too that are not trained. Latents and velocities are packed as
FLUX's are: a token's channels are channel, row, column. Factors lie one after the other, A before B, in the
order of `modules`.
"""
import json
import os
import re

import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import save_file

HERE = os.path.dirname(os.path.abspath(__file__))
RANK, SCALE, CFG = 2, 0.7, 4.5
NOT_TRAINED = re.compile(r"norm1_context|ff_context|attn2")  # by the official recipe


def packed(x):
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpacked(x, h, w):
    b, _, c = x.shape
    return x.view(b, h, w, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, 2 * h, 2 * w)


def velocity(model, x, context, pooled, time, h, w):
    return packed(model(hidden_states=unpacked(x, h, w), encoder_hidden_states=context, pooled_projections=pooled,
                        timestep=1000 * time, return_dict=False)[0])


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}


def factors(modules, spread=0.1):
    """{name: (A, B)}, in bf16; of the convolution A [rank, in, 2, 2] and B [out, rank, 1, 1], as PEFT has them."""
    one = lambda shape, s: (s * torch.randn(shape)).to(torch.bfloat16).double()
    out = {}
    for n, m in modules.items():
        shape = m.weight.shape
        out[n] = one((RANK, *shape[1:]), shape[1:].numel() ** -0.5), one((shape[0], RANK) + (1, 1) * (m.weight.ndim == 4), spread)
    return out


class Lora:
    """Sets of factors, chosen for each sample of the batch; those on other layers than the first's are none."""
    def __init__(self, model, sets):
        self.sets, self.choice = sets, None
        for n, m in layers(model).items():
            m.register_forward_hook(lambda m, i, o, n=n: self.add(m, n, i[0], o))

    def add(self, m, name, x, y):
        if self.choice is None:
            return y
        extra = []
        for sample, s in enumerate(self.choice):
            if s is None or name not in self.sets[s]:
                extra.append(torch.zeros_like(y[sample]))
                continue
            a, b = self.sets[s][name]
            if m.weight.ndim == 4:
                extra.append(SCALE * torch.conv2d(torch.conv2d(x[sample:sample + 1], a, stride=2), b)[0])
            else:
                extra.append(SCALE * (x[sample] @ a.T) @ b.T)
        return y + torch.stack(extra)


def shifted(u, s):
    return s * u / (1 + (s - 1) * u)


def guided(model, lora, sets, i, x, time, cfg, h, w):
    n, lora.choice = len(x), sets
    v = velocity(model, x, i["context"], i["pooled"], time, h, w)
    if cfg == 1:
        return v
    v_u = velocity(model, x, i["no_context"].expand(n, -1, -1), i["no_pooled"].expand(n, -1), time, h, w)
    return v_u + cfg * (v - v_u)


@torch.no_grad()
def scfm(model, lora, i, draws, cfg, h, w):
    """method.md, steps 3 to 6; a draw is (teacher?, N, j, shift); all that is asked is guided."""
    t = torch.tensor([[shifted(1 - (j + k) / n, s) for k in range(3)] for _, n, j, s in draws])
    t[:, 0] = t[:, 0].clamp(max=1 - 1e-5)
    t = t.double()
    d1, d2 = (t[:, 0] - t[:, 1])[:, None, None], (t[:, 1] - t[:, 2])[:, None, None]
    t0 = t[:, 0][:, None, None]
    x = (1 - t0) * i["x0"] + t0 * i["noise"]
    v1 = guided(model, lora, [None if d[0] else 1 for d in draws], i, x, t[:, 0], cfg, h, w)     # teacher, or fast
    v2 = guided(model, lora, [2] * len(draws), i, x - d1 * v1, t[:, 1], cfg, h, w)               # slow
    return t, x, (d1 * v1 + d2 * v2) / (d1 + d2)


@torch.no_grad()
def sample(model, lora, i, steps, shift, h, w):
    times = [1 - 1e-5] + [shifted(1 - k / steps, shift) for k in range(1, steps + 1)]
    x = i["noise"].float().double()
    for now, then in zip(times, times[1:]):
        x = x - (now - then) * guided(model, lora, [None] * len(x), i, x, torch.full((len(x),), now).double(), CFG, h, w)
    return x


def flat(values):
    return torch.cat([x.flatten() for pair in values for x in pair])


def make(name, seed, batch, text, h, w, **config):
    torch.manual_seed(seed)
    folder = os.path.join(HERE, name)
    os.makedirs(folder, exist_ok=True)
    config = dict(sample_size=16, patch_size=2, out_channels=config["in_channels"], qk_norm="rms_norm",
                  caption_projection_dim=config["num_attention_heads"] * config["attention_head_dim"], **config)
    model = SD3Transformer2DModel(**config)
    for p in [*model.parameters(), model.pos_embed.pos_embed]:     # the table is read, not computed: it is not its sinusoids
        p.data = (p.data + 0.15 * torch.randn_like(p)).to(torch.bfloat16).double()
    model = model.double()
    weights = dict(model.named_parameters(), **{"pos_embed.pos_embed": model.pos_embed.pos_embed.requires_grad_()})
    save_file({n: p.detach().to(torch.bfloat16).contiguous() for n, p in weights.items()},
              os.path.join(folder, "diffusion_pytorch_model.safetensors"))
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(dict(_class_name="SD3Transformer2DModel", **config), f, indent=2)
    r = lambda *s: torch.randn(*s).double()     # f32 values: the sinusoids of 1000 t feel the rounding of t
    latents, context, pooled = (batch, h * w, 4 * config["in_channels"]), (text, config["joint_attention_dim"]), config["pooled_projection_dim"]
    i = dict(x=r(*latents), context=r(batch, *context), pooled=r(batch, pooled), time=torch.rand(batch).double(), goal=r(*latents),
             x0=r(*latents), noise=r(*latents), no_context=r(1, *context), no_pooled=r(1, pooled))
    out = dict(i, grid=torch.tensor([h, w, text, RANK, SCALE, CFG]))

    def asked(loss=False):
        v = velocity(model, i["x"], i["context"], i["pooled"], i["time"], h, w)
        if loss:
            loss = ((v - i["goal"]) ** 2).mean()
            loss.backward()
            out["loss"] = loss.reshape(1)
        return v

    modules = layers(model)
    trained = {n: m for n, m in modules.items() if not NOT_TRAINED.search(n)}
    sets = [factors(trained) for _ in range(3)]     # student, fast, slow
    lora = Lora(model, [*sets, factors(modules)])
    out["velocity"] = asked(loss=True)
    for n, p in weights.items():
        out["grad." + n] = torch.stack([p.grad.norm(), (p.grad.flatten() * torch.arange(p.numel()).double().cos()).sum()])
        p.requires_grad_(False)
    out["modules"] = torch.tensor(list("".join(n + "\0" for n in trained).encode()), dtype=torch.uint8)
    for s, values in enumerate(sets):
        out[f"lora{s}"] = flat(values.values()).to(torch.bfloat16)
    for x in (x for pair in sets[0].values() for x in pair):
        x.requires_grad_()
    bare, lora.choice = out["loss"], [0] * batch
    out["lora_velocity"] = asked(loss=True)
    out["loss"] = bare
    out["lora_grad"] = flat((a.grad, b.grad) for a, b in sets[0].values())
    for x in (x for pair in sets[0].values() for x in pair):
        x.requires_grad_(False)
    draws = [(True, 32, 6, 3.1), (False, 4, 2, 2.7), (False, 16, 0, 4.0)][:batch]
    out["draws"] = torch.tensor([[float(d[0]), *d[1:]] for d in draws])
    out["times"], out["noisy"], out["target"] = scfm(model, lora, i, draws, 1, h, w)
    out["cfg_target"] = scfm(model, lora, i, draws, CFG, h, w)[2]
    out["cfg_sample"] = sample(model, lora, i, 3, 3, h, w)
    lora.choice = [3] * batch
    out["loaded_velocity"] = asked()
    save_file({f"transformer.{n}.lora_{kind}.weight": x.to(torch.bfloat16).contiguous() for n, pair in lora.sets[3].items()
               for kind, x in zip("AB", pair)} | {f"transformer.{n}.alpha": torch.tensor(SCALE * RANK) for n in modules},
              os.path.join(folder, "lora.safetensors"))
    keep = lambda v: v.detach().contiguous() if v.dtype in (torch.uint8, torch.bfloat16) else v.detach().float().contiguous()
    save_file({k: keep(v) for k, v in out.items()}, os.path.join(folder, "reference.safetensors"))
    for f in os.listdir(folder):
        os.chmod(os.path.join(folder, f), 0o644)
    change = lambda a, b: (a - b).norm().item() / b.norm().item()
    print(f"{name}: a LoRA changes the velocity by {change(out['lora_velocity'], out['velocity']):.2f}, its file by "
          f"{change(out['loaded_velocity'], out['velocity']):.2f}; smallest norms of gradients "
          f"{sorted((v[0].item(), k) for k, v in out.items() if k.startswith('grad.'))[:4]}")


if __name__ == "__main__":
    # Grids that are not in the middle of the table: 12 - 3 and 9 - 2 are odd.
    make("sd3_a", 1, 2, 5, 3, 4, in_channels=16, num_layers=3, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=10,
         pooled_projection_dim=6, pos_embed_max_size=12, dual_attention_layers=())
    make("sd3_b", 2, 2, 7, 5, 2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=9,
         pooled_projection_dim=5, pos_embed_max_size=9, dual_attention_layers=(0, 1))
