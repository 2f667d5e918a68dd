"""Second half of `make bench-cuda`: tiny-flux on the GPU through ./train, and, where PyTorch,
diffusers and peft are installed, FLUX.1-dev's training step and sampling there, as build/bench_cuda
does them.

python3 test/bench_cuda.py [tiny-flux] [eager] [compiled]      without a name: all three
python3 test/bench_cuda.py --tiny      a small model on any device, to try this script
"""
import csv
import filecmp
import statistics
import subprocess
import sys
import tempfile
import time

BATCH, GRID, TEXT = 8, 32, 256          # 512 x 512 pixels


def tiny_flux():
    """Time of ./train data/10pairs, whether it repeats bit for bit, the first losses on both."""
    folder = tempfile.mkdtemp()

    def train(name, *options):
        out = f"{folder}/{name}.safetensors"
        command = ["./train", "data/10pairs", "--out", out, "--run", f"{folder}/{name}",
                   "--preview", "0", *options]
        start = time.time()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError((done.stderr.strip() or f"exit {done.returncode}").splitlines()[-1])
        losses = [float(row["loss"]) for row in csv.DictReader(open(f"{folder}/{name}/loss.csv"))]
        return out, time.time() - start, losses

    first, seconds, _ = train("first", "--device", "cuda")
    second, _, _ = train("second", "--device", "cuda")
    print(f"tiny-flux: ./train data/10pairs took {seconds:.1f} s; repeated, the LoRA is",
          "the same" if filecmp.cmp(first, second, shallow=False) else "NOT the same")
    _, _, gpu = train("gpu", "--device", "cuda", "--stop-after", "20")
    _, _, cpu = train("cpu", "--device", "cpu", "--stop-after", "20")
    print("first 20 losses, GPU against CPU: largest relative difference",
          f"{max(abs(a - b) / b for a, b in zip(gpu, cpu)):.1e}")


def median_time(torch, run, repeats=5):
    times = []
    for i in range(repeats + 2):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.time()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if i >= 2:
            times.append(time.time() - start)
    return statistics.median(times)


def make_model(torch, tiny):
    from diffusers import FluxTransformer2DModel
    from peft import LoraConfig

    small = dict(num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
                 joint_attention_dim=24, pooled_projection_dim=20,
                 axes_dims_rope=(4, 6, 6)) if tiny else {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = FluxTransformer2DModel(guidance_embeds=True, **small)
    torch.set_default_dtype(torch.float32)
    model.requires_grad_(False)
    linears = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for name in ("student", "fast", "slow"):
        model.add_adapter(LoraConfig(r=64, lora_alpha=64, target_modules=linears),
                          adapter_name=name)
    return model, device


def inputs(torch, model, device, batch, grid, text):
    config = model.config
    normal = lambda *shape: torch.randn(*shape, device=device, dtype=torch.bfloat16)
    ids = torch.zeros(grid * grid, 3, device=device)
    ids[:, 1] = torch.arange(grid * grid, device=device) // grid
    ids[:, 2] = torch.arange(grid * grid, device=device) % grid
    one = torch.full((batch,), 0.7, device=device, dtype=torch.bfloat16)
    return dict(hidden_states=normal(batch, grid * grid, config.in_channels),
                encoder_hidden_states=normal(batch, text, config.joint_attention_dim),
                pooled_projections=normal(batch, config.pooled_projection_dim), timestep=one,
                guidance=3 * one, img_ids=ids, txt_ids=torch.zeros(text, 3, device=device),
                return_dict=False)


def training_step(torch, model, x, optimiser):
    """Two target passes without gradient, one student pass with it, AdamW (no averages)."""
    with torch.no_grad():
        model.set_adapter("fast")
        v1 = model(**x)[0]
        model.set_adapter("slow")
        v2 = model(**{**x, "hidden_states": x["hidden_states"] - 0.1 * v1})[0]
    model.set_adapter("student")
    loss = torch.nn.functional.mse_loss(model(**x)[0].float(), (0.5 * (v1 + v2)).float())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimiser.param_groups[0]["params"], 10)
    optimiser.step()
    optimiser.zero_grad()


def measure(torch, name, model, device, tiny):
    batch, grid, text = (2, 4, 8) if tiny else (BATCH, GRID, TEXT)
    if name == "compiled":  # block by block, as diffusers advises: as a whole takes many minutes
        model.compile_repeated_blocks(dynamic=False)
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # else it goes on as eager
    with torch.no_grad():
        model.disable_adapters()
        x = inputs(torch, model, device, 1, 2 * grid, 2 * text)
        seconds = median_time(torch, lambda: [model(**x) for _ in range(3)])
    print(f"PyTorch {name}: 3 steps at 1024x1024, transformer only: {seconds:.3f} s", flush=True)
    torch.compiler.reset()  # versions for sampling count toward the limit of 8
    model.enable_adapters()
    model.enable_gradient_checkpointing()
    model.train()
    x = inputs(torch, model, device, batch, grid, text)
    model.set_adapter("student")
    student = [p for n, p in model.named_parameters() if "student" in n]
    optimiser = torch.optim.AdamW(student, lr=2e-5, fused=device == "cuda")
    seconds = median_time(torch, lambda: training_step(torch, model, x, optimiser))
    print(f"PyTorch {name}: SCFM step, 512x512, batch {batch}, rank 64, every block checkpointed, "
          f"LoRA and its optimiser in bf16: {seconds:.3f} s", flush=True)


failed = []


def attempt(what, work, *arguments):
    """What hinders it is printed, and the rest is done."""
    try:
        work(*arguments)
    except Exception as error:  # a program that failed, memory, a compiler, torch's own limits
        skipped = isinstance(error, ImportError) or "no GPU" in str(error)
        print(f"{what}: {'skipped' if skipped else 'failed'}:",
              (str(error) or repr(error)).splitlines()[0], flush=True)
        if not skipped:
            failed.append(what)


def pytorch(ways, tiny):
    import torch
    import peft  # noqa: F401
    from diffusers.models import attention_dispatch, modeling_utils

    if not tiny and not torch.cuda.is_available():
        raise RuntimeError("no GPU")
    # They ask in every block whether torch is 2.5 (1.11) or newer: it is, and torch.compile cannot
    # follow the question into the package `packaging`.
    attention_dispatch.is_torch_version = modeling_utils.is_torch_version = lambda *_: True
    model, device = make_model(torch, tiny)
    for name in ways:
        attempt(f"PyTorch {name}", measure, torch, name, model, device, tiny)


if __name__ == "__main__":
    tiny, chosen = sys.argv[1:] == ["--tiny"], sys.argv[1:] or ["tiny-flux", "eager", "compiled"]
    unknown = set() if tiny else set(chosen) - {"tiny-flux", "eager", "compiled"}
    if unknown:
        sys.exit(f"error: '{min(unknown)}' is not tiny-flux, eager or compiled")
    ways = ["eager", "compiled"] if tiny else [name for name in chosen if name != "tiny-flux"]
    if "tiny-flux" in chosen:
        attempt("tiny-flux", tiny_flux)
    if ways:
        attempt("PyTorch", pytorch, ways, tiny)
    sys.exit(bool(failed))
