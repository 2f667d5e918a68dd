"""Loads our LoRAs with ComfyUI's own code, on the CPU, and compares its FLUX and SD3.5 with ./sample.

    python test/compare_comfyui.py FOLDER       # of ComfyUI (a clone); in the project's folder, after make

Needs the packages in test/reference/requirements.txt and ComfyUI's. A LoRA that ./train makes here, as
it is and in kohya's names, must change tiny-flux's velocity as in ./sample, and its names, with FLUX.1-dev's
numbers of blocks, must fit every matrix of ComfyUI's FLUX. The same with a random Stable Diffusion 3.5
(formats.py), and the numbers of blocks of Large and Medium. Exit status 1 if a comparison misses its limit
or ComfyUI complains.
"""
import logging
import os
import re
import subprocess
import sys
import tempfile

if len(sys.argv) != 2 or not os.path.isdir(os.path.join(sys.argv[1], "comfy")):
    sys.exit(__doc__.split("\n\n")[1])
sys.path.insert(0, sys.argv[1])
sys.argv[1:] = ["--cpu", "--force-fp32"]    # ComfyUI reads them
import comfy.options
comfy.options.enable_args_parsing()
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import comfyui_version
import torch
from safetensors.torch import load_file, save_file

from formats import SD3_CONFIGS, sd3_pipeline, to_stability, write_diffusers

MODEL, PROMPT, GUIDANCE, START, LIMIT = "data/tiny-flux", "a red apple", 1.5, 1 - 1e-5, 1e-5
failed, complaints = 0, []


class Complaints(logging.Handler):          # "lora key not loaded: ..." is only a warning there
    def emit(self, record):
        complaints.append(record.getMessage())


def report(what, value, limit):
    global failed
    good = value <= limit and not complaints
    failed += not good
    print(f"{'ok  ' if good else 'FAIL'} {what}: {value:.2g} (at most {limit:.2g})", *complaints[:3], flush=True)
    complaints.clear()


def run(*command, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, **options)
    if done.returncode:
        sys.exit(f"{command[0]}: {done.stderr.decode().strip()}")


def tiny_weights():
    weights = load_file(f"{MODEL}/transformer/diffusion_pytorch_model.safetensors")
    return comfy.model_detection.convert_diffusers_mmdit({k: v.float() for k, v in weights.items()}, "")


def flux(device, dtype, **numbers):
    """ComfyUI's FLUX, with the numbers that it does not read off the weights, or other ones."""
    config = comfy.model_detection.detect_unet_config(tiny_weights(), "")
    config.update(numbers)
    config = comfy.supported_models.Flux(config)
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "", device=device)
    return comfy.model_patcher.ModelPatcher(model.eval(), torch.device("cpu"), torch.device("cpu"))


def tiny_flux():
    patcher = flux("cpu", torch.float32, axes_dim=[8, 12, 12], num_heads=6, hidden_size=192, context_in_dim=128, vec_in_dim=64)
    patcher.model.load_model_weights(tiny_weights(), "")
    return patcher


def matrices_of(patcher):
    return {k for k, v in patcher.model.state_dict().items() if k.endswith(".weight") and v.ndim == 2}


def packed(x):      # [1,16,16,16] -> [1,64,64]
    return x.view(1, 16, 8, 2, 8, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 64, 64).contiguous()


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def velocities(folder):
    """Theirs and ours of one noise and prompt, with LoRAs."""
    run("make", "-s", "build/encode")
    run("build/encode", MODEL, 16, f"{folder}/text.safetensors", input=PROMPT.encode() + b"\0")
    text = load_file(f"{folder}/text.safetensors")
    context, pooled = text["context.0"].view(1, 16, -1), text["pooled.0"].view(1, -1)
    noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(3))
    save_file({"noise": packed(noise)}, f"{folder}/noise.safetensors")

    def theirs(patcher):
        comfy.model_management.unload_all_models()
        comfy.model_management.load_models_gpu([patcher])
        with torch.no_grad():
            x0 = patcher.model.apply_model(noise, torch.tensor([START]), c_crossattn=context, y=pooled,
                                           guidance=torch.tensor([GUIDANCE]))
        comfy.model_management.unload_all_models()      # takes the LoRA out again
        return packed((noise - x0) / START)

    def ours(*lora):
        run("./sample", PROMPT, 1, "--model", MODEL, "--device", "cpu", "--guidance", GUIDANCE, "--noise",
            f"{folder}/noise.safetensors", "--latents", f"{folder}/latents.safetensors", "--out", f"{folder}/picture.png",
            *(lora or ["--no-lora"]))
        return (packed(noise) - load_file(f"{folder}/latents.safetensors")["latents"]) / START

    return theirs, ours


def compare_tiny(folder):
    lora, kohya = f"{folder}/lora.safetensors", f"{folder}/kohya.safetensors"
    run("./train", "data/10pairs", "--device", "cpu", "--stop-after", 12, "--rank", 8, "--alpha", 24, "--lr", 1e-3,
        "--preview", 0, "--out", lora, "--run", f"{folder}/run")
    run("./shortcut", "merge", "--model", MODEL, "--lora", f"{lora}:1", "--kohya", "--out", kohya)
    base, (theirs, ours) = tiny_flux(), velocities(folder)
    matrices = matrices_of(base)
    bare = ours()
    report("tiny-flux without a LoRA: velocity", relative(theirs(base), bare), LIMIT)
    for name, path, strength in ("diffusers' names", lora, 1), ("diffusers' names", lora, 1.25), ("kohya's names", kohya, 1):
        patched, _ = comfy.sd.load_lora_for_models(base, None, comfy.utils.load_torch_file(path, safe_load=True), strength, 0)
        report(f"{name}: matrices it leaves out", len(matrices ^ set(patched.patches)), 0)
        changed = ours("--lora", f"{lora}:{strength}")
        report(f"{name}, strength {strength}: velocity, which it moves by {relative(changed, bare):.2g}",
               relative(theirs(patched), changed), LIMIT)
    return lora


def compare_names(lora):
    """The same modules in FLUX.1-dev's 19 and 38 blocks, of rank 1: ComfyUI's model has no data here, only shapes."""
    patcher = flux("meta", torch.bfloat16, depth=19, depth_single_blocks=38, axes_dim=[16, 56, 56], num_heads=24,
                   hidden_size=3072, context_in_dim=4096, vec_in_dim=768)
    blocks = {"transformer_blocks": 19, "single_transformer_blocks": 38}
    names = set()
    for name in load_file(lora):
        kind = re.match(r"transformer\.(\w+_blocks)\.\d+\.", name)
        names |= {re.sub(r"\.\d+\.", f".{i}.", name, count=1) for i in range(blocks[kind[1]])} if kind else {name}
    patched, _ = comfy.sd.load_lora_for_models(patcher, None, {name: torch.zeros(1, 1) for name in names}, 1, 0)
    matrices = matrices_of(patcher)
    report(f"FLUX.1-dev, {len(names) // 2} pairs of factors: of its {len(matrices)} matrices left out",
           len(matrices ^ set(patched.patches)), 0)
    report("FLUX.1-dev: pairs not loaded", len(names) // 2 - sum(len(p) for p in patched.patches.values()), 0)


# ---- Stable Diffusion 3.5 ----

def sd3(weights, device, dtype, **numbers):
    config = comfy.model_detection.detect_unet_config(weights, "")
    config.update(numbers)
    config = comfy.supported_models.SD3(config)
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "", device=device)
    return comfy.model_patcher.ModelPatcher(model.eval(), torch.device("cpu"), torch.device("cpu"))


def compare_sd3(folder):
    """The small one that is like Medium: its velocity, bare and with a LoRA of ./train in two dialects."""
    pipe, (h, w) = sd3_pipeline("medium"), SD3_CONFIGS["medium"]["grid"]
    model, weights = write_diffusers(pipe, f"{folder}/sd3"), to_stability(pipe.transformer.state_dict())
    lora, kohya, pixels = f"{folder}/sd3.safetensors", f"{folder}/sd3-kohya.safetensors", 2 * pipe.vae_scale_factor
    run("./train", "data/10pairs", "--model", model, "--device", "cpu", "--steps", 4, "--batch", 2, "--rank", 4, "--alpha", 6, "--lr", 3e-3, "--final-lr", 1,
        "--resolution", 8 * pixels, "--preview", 0, "--no-cache", "--out", lora, "--run", f"{folder}/sd3-run")
    run("./shortcut", "merge", "--model", model, "--lora", f"{lora}:1", "--kohya", "--out", kohya)
    run("build/encode", model, 0, f"{folder}/text.safetensors", input=PROMPT.encode() + b"\0")
    text, noise = load_file(f"{folder}/text.safetensors"), torch.randn(1, 16, 2 * h, 2 * w, generator=torch.Generator().manual_seed(3))
    context, pooled = text["context.0"].view(1, -1, pipe.transformer.config.joint_attention_dim), text["pooled.0"].view(1, -1)
    tokens = lambda x: x.view(1, 16, h, 2, w, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, h * w, 64).contiguous()
    save_file({"noise": tokens(noise)}, f"{folder}/noise.safetensors")

    def ours(*more):
        run("./sample", PROMPT, 1, "--model", model, "--device", "cpu", "--size", f"{w * pixels}x{h * pixels}", "--cfg", 0, "--noise",
            f"{folder}/noise.safetensors", "--latents", f"{folder}/latents.safetensors", "--out", f"{folder}/picture.png", *more)
        return (tokens(noise) - load_file(f"{folder}/latents.safetensors")["latents"]) / START

    def theirs(patcher):
        comfy.model_management.unload_all_models()
        comfy.model_management.load_models_gpu([patcher])
        with torch.no_grad():
            x0 = patcher.model.apply_model(noise, torch.tensor([START]), c_crossattn=context, y=pooled)
        comfy.model_management.unload_all_models()
        return tokens((noise - x0) / START)

    base, bare = sd3(weights, "cpu", torch.float32), ours("--no-lora")
    base.model.load_model_weights({k: v.clone() for k, v in weights.items()}, "")
    report("SD3.5, small, without a LoRA: velocity", relative(theirs(base), bare), LIMIT)
    for name, path in ("diffusers' names", lora), ("kohya's names", kohya):
        patched, _ = comfy.sd.load_lora_for_models(base, None, comfy.utils.load_torch_file(path, safe_load=True), 1, 0)
        changed = ours("--lora", f"{path}:1")
        report(f"SD3.5, small, {name}: velocity, which it moves by {relative(changed, bare):.2g}", relative(theirs(patched), changed), LIMIT)
    return weights, lora


def compare_sd3_names(weights, lora):
    """The same modules in Large's and Medium's blocks; a third of the matrices no LoRA of ours has."""
    for name, depth, side, dual in ("Large", 38, 192, 0), ("Medium", 24, 384, 13):
        width = 64 * depth
        patcher = sd3(weights, "meta", torch.bfloat16, depth=depth, adm_in_channels=2048, num_patches=side * side, pos_embed_max_size=side,
                      context_embedder_config=dict(target="torch.nn.Linear", params=dict(in_features=4096, out_features=width)),
                      x_block_self_attn_layers=list(range(dual)))
        names = set()
        for key in load_file(lora):
            last = depth - 1 if "to_add_out" not in key else depth - 2
            names |= {re.sub(r"(transformer_blocks)\.\d+\.", rf"\1.{i}.", key) for i in range(last + 1)} if "_blocks." in key else {key}
        patched, _ = comfy.sd.load_lora_for_models(patcher, None, {key: torch.zeros(1, 1) for key in names}, 1, 0)
        report(f"SD3.5 {name}, {len(names) // 2} pairs of factors: pairs not loaded",
               len(names) // 2 - sum(len(p) for p in patched.patches.values()), 0)
        wanted = {k for k, v in patcher.model.state_dict().items() if k.endswith(".weight") and v.ndim in (2, 4)
                  and not re.search(r"attn2|context_block\.(mlp|adaLN)", k)}
        report(f"SD3.5 {name}: of its {len(wanted)} matrices that the official recipe trains left out", len(wanted ^ set(patched.patches)), 0)


if __name__ == "__main__":
    logging.getLogger().handlers = [Complaints(logging.WARNING)]
    print("ComfyUI", comfyui_version.__version__)
    with tempfile.TemporaryDirectory() as temporary:
        compare_names(compare_tiny(temporary))
        compare_sd3_names(*compare_sd3(temporary))
    sys.exit(1 if failed else 0)
