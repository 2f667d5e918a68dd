"""make bench: the SCFM training step and 3-step sampling of tiny-flux, ours against PyTorch's.

The peer is diffusers' FluxTransformer2DModel with peft's LoRA, same threads, same sizes, same run.
Also the part of the machine's measured sgemm peak that our training step reaches.
Needs torch, diffusers and peft (test/reference/requirements.txt).
"""
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

THREADS = int(os.environ.get("THREADS", os.cpu_count()))
os.environ["OMP_NUM_THREADS"] = str(THREADS)
try:
    import torch
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from peft import LoraConfig
    from PIL import Image
except ImportError as missing:
    sys.exit(f"error: make bench compares with PyTorch: {missing}; pip install -r test/reference/requirements.txt")

MODEL, BATCH = "data/tiny-flux", 8
RANK = 64 if not os.path.exists(f"{MODEL}/recipe.json") else json.load(open(f"{MODEL}/recipe.json"))["train"]["rank"]
TOKENS, TEXT = 64, 16


def median_time(work, repeats=7):
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def sgemm_peak():
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    return 2 * 2048 ** 3 / median_time(lambda: a @ b)


def flop_of_a_pass(config, batch):
    """Products of one forward pass without LoRA."""
    c, t = config.num_attention_heads * config.attention_head_dim, TOKENS + TEXT
    per_token = config.num_layers * 12 * c * c + config.num_single_layers * 12 * c * c
    attention = (config.num_layers + config.num_single_layers) * 2 * t * c
    modulation = (config.num_layers * 12 + config.num_single_layers * 3) * c * c
    return 2 * batch * (t * (per_token + attention) + modulation)


def flop_of_decoding(vae):
    """Convolutions of the decoder for one picture, and its attention's linear layers."""
    total = 0

    def add(module, _, out):
        nonlocal total
        total += 2 * out.numel() * module.weight[0].numel()

    hooks = [m.register_forward_hook(add) for m in vae.decoder.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    vae.decode(torch.zeros(1, 16, 16, 16))
    for hook in hooks:
        hook.remove()
    return total


class Peer:
    def __init__(self):
        self.base = FluxTransformer2DModel.from_pretrained(f"{MODEL}/transformer", torch_dtype=torch.float32)
        self.vae = AutoencoderKL.from_pretrained(f"{MODEL}/vae", torch_dtype=torch.float32)
        targets = [n for n, m in self.base.named_modules() if isinstance(m, torch.nn.Linear)]
        for name in ("student", "fast", "slow"):
            self.base.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, init_lora_weights="gaussian"), name)
        self.base.set_adapter("student")
        self.trained = [p for n, p in self.base.named_parameters() if ".student." in n]
        for n, p in self.base.named_parameters():
            p.requires_grad_(".student." in n)
        self.averages = [[p for n, p in self.base.named_parameters() if f".{s}." in n] for s in ("fast", "slow")]
        self.optimiser = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=1e-4, fused=True)
        c = self.base.config
        self.x, self.context = torch.randn(BATCH, TOKENS, c.in_channels), torch.randn(BATCH, TEXT, c.joint_attention_dim)
        self.pooled, self.time = torch.randn(BATCH, c.pooled_projection_dim), torch.rand(BATCH)
        self.image_ids = torch.stack(torch.meshgrid(torch.arange(1.), torch.arange(8.), torch.arange(8.), indexing="ij"), -1).view(-1, 3)

    def velocity(self, x, n=BATCH):
        return self.base(hidden_states=x, encoder_hidden_states=self.context[:n], pooled_projections=self.pooled[:n], timestep=self.time[:n],
                         guidance=self.time[:n], img_ids=self.image_ids, txt_ids=torch.zeros(TEXT, 3), return_dict=False)[0]

    def train_step(self):
        """As the official trainer: the batch is split between teacher (no LoRA) and fast average; then slow; then the student."""
        with torch.no_grad():
            part = int(0.4 * BATCH)
            self.base.disable_adapters()
            first = [self.velocity(self.x[:part], part)]
            self.base.enable_adapters()
            self.base.set_adapter("fast")
            first.append(self.velocity(self.x[part:], BATCH - part))
            v1 = torch.cat(first)
            self.base.set_adapter("slow")
            target = (v1 + self.velocity(self.x - 0.1 * v1)) / 2
        self.base.set_adapter("student")
        for p in self.trained:
            p.requires_grad_(True)
        loss = torch.nn.functional.mse_loss(self.velocity(self.x), target)
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 10)
        self.optimiser.step()
        with torch.no_grad():
            for average, decay in zip(self.averages, (0.99, 0.999)):
                torch._foreach_lerp_(average, self.trained, 1 - decay)

    @torch.no_grad()
    def sample(self, path):
        x = self.x[:1]
        for _ in range(3):
            x = x - 0.3 * self.velocity(x, 1)
        latents = x.view(1, 8, 8, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(1, 16, 16, 16)
        rgb = (self.vae.decode(latents).sample[0] * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        Image.fromarray(rgb.permute(1, 2, 0).numpy()).save(path)


def ours_train_step(folder):
    out = subprocess.run(["./train", "data/10pairs", "--dry-run", "--rank", str(RANK), "--batch", str(BATCH), "--threads", str(THREADS), "--run", folder],
                         capture_output=True, text=True, check=True).stdout
    return float(re.search(r"one step: ([\d.]+) s", out)[1])


def ours_sample(folder):
    """Seconds of one more picture in the same process."""
    times = []
    for count in (1, 41):
        start = time.perf_counter()
        subprocess.run(["./sample", "a red apple", "3", "--no-lora", "--count", str(count), "--threads", str(THREADS), "--out", f"{folder}/x.png"],
                       capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    return (times[1] - times[0]) / 40, times[0]


def main():
    torch.set_num_threads(THREADS)
    peer = Peer()
    # Pictures go to memory where that is a folder: ours wait until a disk has them, PIL's do not.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        peak = sgemm_peak()
        ours, theirs = ours_train_step(folder), median_time(peer.train_step)
        # Two passes for the target, the student's, and its way back (gradients of the inputs only).
        work = 4 * flop_of_a_pass(peer.base.config, BATCH)
        print(f"{THREADS} threads, sgemm peak {peak / 1e9:.0f} GFLOP/s (2048 cubed, torch)")
        print(f"SCFM training step, batch {BATCH}, rank {RANK}: ours {ours * 1e3:.0f} ms, PyTorch {theirs * 1e3:.0f} ms, ratio {theirs / ours:.2f}; "
              f"ours reaches at least {100 * work / ours / peak:.0f}% of the peak (LoRA's own products not counted)")
        peer.base.disable_adapters()
        (ours, first), theirs = ours_sample(folder), median_time(lambda: peer.sample(f"{folder}/y.png"), 21)
        with torch.no_grad():
            work = 3 * flop_of_a_pass(peer.base.config, 1) + flop_of_decoding(peer.vae)
        print(f"3 steps, decoding and PNG, batch 1: ours {ours * 1e3:.1f} ms, PyTorch {theirs * 1e3:.1f} ms, ratio {theirs / ours:.2f}; "
              f"ours reaches {100 * work / ours / peak:.0f}% of the peak; first picture with loading {first:.2f} s")


if __name__ == "__main__":
    main()
