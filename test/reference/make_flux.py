"""Writes test/reference/flux_*: small random FLUX transformers, and what PyTorch says they compute.

Outputs, the gradient of every weight and every LoRA factor, ten AdamW steps, and the SCFM target; the same with true
CFG.
"""
import torch
from diffusers import FluxTransformer2DModel

from dit import DRAWS, Lora, backward, guided, save, save_model, targets

RANK, CFG = 3, 2.5


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


def factors(modules):
    r = lambda *s: torch.randn(*s, dtype=torch.float64)
    return {n: (r(RANK, m.in_features) * 0.2, r(m.out_features, RANK) * 0.05) for n, m in modules.items()}


def make(name, seed, batch, text, h, w, **config):
    torch.manual_seed(seed)
    model = save_model(name, FluxTransformer2DModel, dict(patch_size=1, **config), 0.05)
    i = inputs(config, batch, text, h, w)
    v = lambda *args: velocity(model, *args, i["guidance"], h, w)
    asked = lambda: v(i["x"], i["context"], i["pooled"], i["time"])
    out = dict(i, grid=torch.tensor([h, w, text]), velocity=asked())
    out["loss"] = backward(out["velocity"], i)
    for n, p in model.named_parameters():
        out["grad." + n] = p.grad.clone()
    modules = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    lora = Lora(modules, [factors(modules) for _ in range(3)])                  # student, fast, slow
    for s, pairs in enumerate(lora.sets):
        out.update({f"lora{s}.{n}.{kind}": x for n, pair in pairs.items() for kind, x in zip("ab", pair)})
    student = {f"{n}.{kind}": x.requires_grad_() for n, pair in lora.sets[0].items() for kind, x in zip("ab", pair)}

    def gradients(key, v):
        backward(v, i)
        for n, x in student.items():
            out[f"{key}.{n}"], x.grad = x.grad, None

    lora.choice = [0] * batch
    out["lora_velocity"] = asked()
    gradients("lora_grad", out["lora_velocity"])
    more = dict(x0=torch.randn_like(i["x"]), noise=torch.randn_like(i["x"]),
                no_context=torch.randn(1, text, config["joint_attention_dim"]).double(),
                no_pooled=torch.randn(1, config["pooled_projection_dim"]).double())
    i.update(more), out.update(more)
    out.update(targets(v, lora, i, DRAWS[:batch], CFG, cfg_folded=(CFG, 1), cfg_student=(CFG, CFG)))
    gradients("cfg_grad", guided(v, lora, [0] * batch, [CFG] * batch, i, i["x"], i["time"]))
    save(name, "reference", out)


def adamw():
    torch.manual_seed(9)
    w = torch.nn.Parameter(torch.randn(500))
    start, grads = w.detach().clone(), torch.randn(10, 500)
    optimiser = torch.optim.AdamW([w], lr=3e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for g in grads:
        w.grad = g.clone()
        optimiser.step()
    save("", "adamw", {"start": start, "grads": grads, "end": w})


make("flux_a", 1, 3, 5, 3, 4, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
     num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=20, guidance_embeds=True,
     axes_dims_rope=(4, 6, 6))
make("flux_b", 2, 2, 7, 2, 3, in_channels=8, num_layers=2, num_single_layers=1, attention_head_dim=8,
     num_attention_heads=3, joint_attention_dim=10, pooled_projection_dim=6, guidance_embeds=False,
     axes_dims_rope=(2, 4, 2))
adamw()
