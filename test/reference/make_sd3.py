"""Writes test/reference/sd3_*: small random Stable Diffusion 3.5 transformers, and what PyTorch says they compute.

sd3_a is like Large, sd3_b like Medium, with a second attention in its first blocks. Outputs; of the gradient
of every weight its norm and its product with cos(0), cos(1), ..; every LoRA factor's gradient whole; the
SCFM target with and without true CFG; a sample; and a LoRA file on every layer, those too that are not trained.
Latents and velocities are packed as FLUX's are: a token's channels are channel, row, column. Factors lie one
after the other, A before B, in the order of `modules`.
"""
import re

import torch
from diffusers import SD3Transformer2DModel

from dit import DRAWS, SCALE, Lora, backward, save, save_model, targets

RANK, CFG = 2, 4.5
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
        out[n] = (one((RANK, *shape[1:]), shape[1:].numel() ** -0.5),
                  one((shape[0], RANK) + (1, 1) * (m.weight.ndim == 4), spread))
    return out


def flat(values):
    return torch.cat([x.flatten() for pair in values for x in pair])


def make(name, seed, batch, text, h, w, **config):
    torch.manual_seed(seed)
    config = dict(sample_size=16, patch_size=2, out_channels=config["in_channels"], qk_norm="rms_norm",
                  caption_projection_dim=config["num_attention_heads"] * config["attention_head_dim"], **config)
    table = "pos_embed.pos_embed"                   # it is read, not computed: it is not its sinusoids
    model = save_model(name, SD3Transformer2DModel, config, 0.15, [table])
    weights = dict(model.named_parameters(), **{table: model.pos_embed.pos_embed.requires_grad_()})
    r = lambda *s: torch.randn(*s).double()     # f32 values: the sinusoids of 1000 t feel the rounding of t
    latents, context = (batch, h * w, 4 * config["in_channels"]), (text, config["joint_attention_dim"])
    pooled = config["pooled_projection_dim"]
    i = dict(x=r(*latents), context=r(batch, *context), pooled=r(batch, pooled), time=torch.rand(batch).double(),
             goal=r(*latents), x0=r(*latents), noise=r(*latents), no_context=r(1, *context), no_pooled=r(1, pooled))
    out = dict(i, grid=torch.tensor([h, w, text, RANK, SCALE, CFG]))
    v = lambda *args: velocity(model, *args, h, w)
    asked = lambda: v(i["x"], i["context"], i["pooled"], i["time"])
    modules = layers(model)
    trained = {n: m for n, m in modules.items() if not NOT_TRAINED.search(n)}
    sets = [factors(trained) for _ in range(3)]     # student, fast, slow
    lora = Lora(modules, [*sets, factors(modules)])
    out["velocity"] = asked()
    out["loss"] = backward(out["velocity"], i)
    for n, p in weights.items():
        product = (p.grad.flatten() * torch.arange(p.numel()).double().cos()).sum()
        out["grad." + n] = torch.stack([p.grad.norm(), product])
        p.requires_grad_(False)
    out["modules"] = torch.tensor(list("".join(n + "\0" for n in trained).encode()), dtype=torch.uint8)
    for s, values in enumerate(sets):
        out[f"lora{s}"] = flat(values.values()).to(torch.bfloat16)
    for x in (x for pair in sets[0].values() for x in pair):
        x.requires_grad_()
    lora.choice = [0] * batch
    out["lora_velocity"] = asked()
    backward(out["lora_velocity"], i)
    out["lora_grad"] = flat((a.grad, b.grad) for a, b in sets[0].values())
    for x in (x for pair in sets[0].values() for x in pair):
        x.requires_grad_(False)
    out.update(targets(v, lora, i, DRAWS[:batch], CFG, cfg_target=(CFG, CFG)))
    lora.choice = [3] * batch
    out["loaded_velocity"] = asked()
    file = {f"transformer.{n}.lora_{kind}.weight": x.to(torch.bfloat16)
            for n, pair in lora.sets[3].items() for kind, x in zip("AB", pair)}
    save(name, "lora", file | {f"transformer.{n}.alpha": torch.tensor(SCALE * RANK) for n in modules})
    save(name, "reference", out)
    change = lambda a, b: (a - b).norm().item() / b.norm().item()
    print(f"{name}: a LoRA changes the velocity by {change(out['lora_velocity'], out['velocity']):.2f}, its file by "
          f"{change(out['loaded_velocity'], out['velocity']):.2f}; smallest norms of gradients "
          f"{sorted((v[0].item(), k) for k, v in out.items() if k.startswith('grad.'))[:4]}")


if __name__ == "__main__":
    # Grids that are not in the middle of the table: 12 - 3 and 9 - 2 are odd.
    make("sd3_a", 1, 2, 5, 3, 4, in_channels=16, num_layers=3, attention_head_dim=8, num_attention_heads=2,
         joint_attention_dim=10, pooled_projection_dim=6, pos_embed_max_size=12, dual_attention_layers=())
    make("sd3_b", 2, 2, 7, 5, 2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
         joint_attention_dim=9, pooled_projection_dim=5, pos_embed_max_size=9, dual_attention_layers=(0, 1))
