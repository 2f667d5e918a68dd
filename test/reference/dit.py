"""What make_flux.py and make_sd3.py share: LoRAs, the SCFM target (a transcription of the method in plain PyTorch,
not of our C code), a sample, and the files that test/dit.h reads.

`velocity(x, context, pooled, time)` is the model; `i` has tensors by name: x, context, pooled, no_context and no_pooled
(one text for the whole batch), x0, noise, goal.
"""
import json
import os

import torch
from safetensors.torch import save_file

HERE = os.path.dirname(os.path.abspath(__file__))
SCALE = 0.7
# (teacher?, N, j, shift) of each sample
DRAWS = [(True, 32, 6, 3.1), (False, 4, 2, 2.7), (False, 16, 0, 4.0)]


class Lora:
    """Sets of factors {layer: (A, B)}, chosen for each sample of the batch: None, or a layer without: none. Those of a
    convolution are A [rank, in, 2, 2] and B [out, rank, 1, 1]."""
    def __init__(self, layers, sets):
        self.sets, self.choice = sets, None
        for n, m in layers.items():
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


def guided(velocity, lora, sets, scales, i, x, time):
    """v_u + scale (v_c - v_u), each of two evaluations of its own; v_u: with no text. Of scales 1 one is enough."""
    n, lora.choice = len(x), sets
    v_c = velocity(x, i["context"], i["pooled"], time)
    if set(scales) == {1}:
        return v_c
    v_u = velocity(x, i["no_context"].expand(n, -1, -1), i["no_pooled"].expand(n, -1), time)
    return v_u + torch.tensor(scales, dtype=torch.float64)[:, None, None] * (v_c - v_u)


@torch.no_grad()
def scfm(velocity, lora, i, draws, teacher=1, averages=1):
    """method.md, steps 3 to 6; with the CFG of the teacher and of the averages. Where only the teacher is guided, it
    answers in both halves of its case."""
    t = torch.tensor([[shifted(1 - (j + k) / n, s) for k in range(3)] for _, n, j, s in draws])
    t[:, 0] = t[:, 0].clamp(max=1 - 1e-5)
    t = t.double()
    d1, d2 = (t[:, 0] - t[:, 1])[:, None, None], (t[:, 1] - t[:, 2])[:, None, None]
    t0 = t[:, 0][:, None, None]
    x = (1 - t0) * i["x0"] + t0 * i["noise"]
    case = [d[0] for d in draws]
    scales = [teacher if c else averages for c in case]
    first = [None if c else 1 for c in case]                                    # teacher, or fast
    second = [None if c and teacher != averages else 2 for c in case]           # slow
    v1 = guided(velocity, lora, first, scales, i, x, t[:, 0])
    v2 = guided(velocity, lora, second, scales, i, x - d1 * v1, t[:, 1])
    return t, x, (d1 * v1 + d2 * v2) / (d1 + d2)


@torch.no_grad()
def sample(velocity, lora, i, steps, shift, cfg):
    times = [1 - 1e-5] + [shifted(1 - k / steps, shift) for k in range(1, steps + 1)]
    x, n = i["noise"].float().double(), len(i["noise"])
    for now, then in zip(times, times[1:]):
        x = x - (now - then) * guided(velocity, lora, [None] * n, [cfg] * n, i, x, torch.full((n,), now).double())
    return x


def targets(velocity, lora, i, draws, cfg, **guided_ones):
    """The reference's tensors of SCFM and sampling; guided_ones: scfm's arguments by the name of their target."""
    t, x, target = scfm(velocity, lora, i, draws)
    out = dict(draws=torch.tensor([[float(d[0]), *d[1:]] for d in draws]), times=t, noisy=x, target=target,
               cfg_sample=sample(velocity, lora, i, 3, 3, cfg))
    return out | {name: scfm(velocity, lora, i, draws, *scales)[2] for name, scales in guided_ones.items()}


def backward(v, i):
    loss = ((v - i["goal"]) ** 2).mean()
    loss.backward()
    return loss.reshape(1)


def save_model(name, kind, config, spread, tables=()):
    """A model of diffusers whose weights, and tables, are shaken; returns it in f64. Its file is bf16."""
    model = kind(**config)
    buffers = dict(model.named_buffers())
    weights = dict(model.named_parameters(), **{n: buffers[n] for n in tables})
    for p in weights.values():
        p.data = (p.data + spread * torch.randn_like(p)).to(torch.bfloat16).double()
    os.makedirs(os.path.join(HERE, name), exist_ok=True)
    save(name, "diffusion_pytorch_model", {n: p.to(torch.bfloat16) for n, p in weights.items()})
    with open(os.path.join(HERE, name, "config.json"), "w") as f:
        json.dump(dict(_class_name=kind.__name__, **config), f, indent=2)
    return model.double()


def save(folder, name, tensors):
    """What is bf16 or bytes stays so; the rest becomes f32."""
    keep = lambda v: v if v.dtype in (torch.uint8, torch.bfloat16) else v.float()
    path = os.path.join(HERE, folder, name + ".safetensors")
    save_file({n: keep(v.detach()).contiguous() for n, v in tensors.items()}, path)
    os.chmod(path, 0o644)
