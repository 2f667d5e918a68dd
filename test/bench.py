"""make bench: the SCFM training step and 3-step sampling of tiny-flux, ours against PyTorch's.

The peers are diffusers' FluxTransformer2DModel with peft's LoRA, as it is and compiled block by
block: same threads, same sizes. All take turns, seven times, so that a busy machine slows them alike;
printed are medians, the least and the most. Also the part of our BLAS's measured sgemm peak that we
reach, beside PyTorch's peak. Needs torch, diffusers and peft (test/reference/requirements.txt).
"""
import ctypes
import ctypes.util
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
    from diffusers.models import attention_dispatch, modeling_utils
    from peft import LoraConfig
    from PIL import Image
except ImportError as missing:
    sys.exit(f"error: make bench compares with PyTorch: {missing}; pip install -r test/reference/requirements.txt")

MODEL, BATCH = "data/tiny-flux", 8
RANK = 64 if not os.path.exists(f"{MODEL}/recipe.json") else json.load(open(f"{MODEL}/recipe.json"))["train"]["rank"]
TOKENS, TEXT = 64, 16


def seconds(work, count=1):
    """A function that does the work and returns the seconds it took, each time."""
    def run():
        start = time.perf_counter()
        for _ in range(count):
            work()
        return (time.perf_counter() - start) / count
    return run


def in_turns(works, rounds=7):
    """Name -> seconds in each round. What fails in the two rounds before is named and left out."""
    for name, work in list(works.items()):
        try:
            work(), work()
        except Exception as error:  # a compiler that is missing, torch's own limits
            if name.startswith("ours"):
                raise
            print(f"{name}: failed: {(str(error) or repr(error)).splitlines()[0]}", flush=True)
            del works[name]
    times = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(work())
    return times


def spread(values, form):
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def report(what, times, flop, peak):
    print(f"{what}, median (least to most):")
    for name, mine in times.items():
        ratios = [b / a for a, b in zip(times["ours"], mine)]
        ratio = "" if name == "ours" else f", {spread(ratios, '.2f')} times ours"
        print(f"    {name:17} {spread([1e3 * t for t in mine], '.1f')} ms{ratio}")
    print(f"    ours reaches {100 * flop / statistics.median(times['ours']) / peak:.0f}% of the sgemm peak", flush=True)


def sgemm_peak(n=2048):
    """FLOP/s of our BLAS, and of PyTorch's where OpenBLAS is not found."""
    a, b, c = (torch.randn(n, n) for _ in range(3))
    works = {"PyTorch's BLAS": seconds(lambda: torch.mm(a, b, out=c))}
    library = ctypes.util.find_library("openblas")
    if library:
        blas = ctypes.CDLL(library)
        blas.openblas_set_num_threads(THREADS)
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in (a, b, c)]
        one, zero, row_major, plain = ctypes.c_float(1), ctypes.c_float(0), 101, 111
        works["ours (OpenBLAS)"] = seconds(lambda: blas.cblas_sgemm(
            row_major, plain, plain, n, n, n, one, pointers[0], n, pointers[1], n, zero, pointers[2], n))
    times = in_turns(works)
    print(f"{THREADS} threads; sgemm, {n} cubed, GFLOP/s, median (least to most):")
    for name, mine in times.items():
        print(f"    {name:17} {spread([2e-9 * n ** 3 / t for t in mine], '.0f')}", flush=True)
    return 2 * n ** 3 / statistics.median(times[list(times)[-1]])


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
    def __init__(self, compiled=False):
        self.base = FluxTransformer2DModel.from_pretrained(f"{MODEL}/transformer", torch_dtype=torch.float32)
        self.vae = AutoencoderKL.from_pretrained(f"{MODEL}/vae", torch_dtype=torch.float32)
        if compiled:  # as in bench_cuda.py
            attention_dispatch.is_torch_version = modeling_utils.is_torch_version = lambda *_: True
            torch._dynamo.config.fail_on_recompile_limit_hit = True  # else it goes on as eager
            self.base.compile_repeated_blocks(dynamic=False)
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


def ours_pictures(folder, count):
    subprocess.run(["./sample", "a red apple", "3", "--no-lora", "--count", str(count), "--threads", str(THREADS), "--out", f"{folder}/x.png"],
                   capture_output=True, check=True)


def ours_sample(folder):
    """Seconds of one more picture in the same process."""
    return (seconds(lambda: ours_pictures(folder, 41))() - seconds(lambda: ours_pictures(folder, 1))()) / 40


def main():
    torch.set_num_threads(THREADS)
    peak = sgemm_peak()
    peers = {"PyTorch": Peer(), "PyTorch, compiled": Peer(compiled=True)}
    base, vae = peers["PyTorch"].base, peers["PyTorch"].vae
    # Pictures go to memory where that is a folder: ours wait until a disk has them, PIL's do not.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        times = in_turns({"ours": lambda: ours_train_step(folder)} | {name: seconds(peer.train_step) for name, peer in peers.items()})
        # Two passes for the target, the student's, and its way back (gradients of the inputs only);
        # LoRA's own products are not counted.
        report(f"SCFM training step, batch {BATCH}, rank {RANK}", times, 4 * flop_of_a_pass(base.config, BATCH), peak)
        for peer in peers.values():
            peer.base.disable_adapters()
        times = in_turns({"ours": lambda: ours_sample(folder)} |
                         {name: seconds(lambda peer=peer: peer.sample(f"{folder}/y.png"), 10) for name, peer in peers.items()})
        with torch.no_grad():
            flop = 3 * flop_of_a_pass(base.config, 1) + flop_of_decoding(vae)
        report("3 steps, decoding and PNG, batch 1", times, flop, peak)
        first = [seconds(lambda: ours_pictures(folder, 1))() for _ in range(7)]
        print(f"    ours, first picture with loading: {spread(first, '.2f')} s")


if __name__ == "__main__":
    main()
