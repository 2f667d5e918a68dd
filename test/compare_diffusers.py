"""Pictures of ./sample against diffusers' FluxPipeline, from the same noise, with and without a LoRA.

    python test/compare_diffusers.py            # in the project's folder, after make

Needs the packages in test/reference/requirements.txt. Every pixel must agree within 2 of 255. The
LoRA is one that ./train makes here in a few steps at a high rate, loaded by diffusers' own
load_lora_weights. Prints the largest difference of each picture; exits 1 if one is too large.
"""
import os
import subprocess
import sys
import tempfile

import numpy as np
import torch
import diffusers
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

MODEL, TEXT_TOKENS, ALLOWED = "data/tiny-flux", 16, 2
CASES = [  # prompt, steps, guidance, shift, true CFG, negative prompt
    ("a red apple", 3, 2.0, 4.0, 0, None),
    ("an elephant", 8, 3.5, 3.0, 0, None),
    ("a Snowman, in the  RAIN \u2603 caf\u00e9", 4, 1.0, 1.0, 0, None),
    ("", 2, 5.0, 2.0, 0, None),
    ("a rocket", 4, 1.5, 3.0, 2.5, "a guitar"),
]


def ours(folder, case, noise, lora):
    prompt, steps, guidance, shift, cfg, negative = case
    files = {name: os.path.join(folder, name) for name in ("noise.safetensors", "latents.safetensors", "ours.png")}
    save_file({"noise": noise}, files["noise.safetensors"])
    subprocess.run(["./sample", prompt, str(steps), "--model", MODEL, "--guidance", str(guidance), "--shift", str(shift),
                    "--noise", files["noise.safetensors"], "--latents", files["latents.safetensors"],
                    "--out", files["ours.png"], "--device", "cpu"]
                   + (["--cfg", str(cfg), "--negative", negative] if cfg else [])
                   + (["--lora", f"{lora}:1"] if lora else ["--no-lora"]), check=True, capture_output=True)
    return (np.asarray(Image.open(files["ours.png"]).convert("RGB")).astype(int),
            load_file(files["latents.safetensors"])["latents"])


def theirs(pipe, case, noise):
    prompt, steps, guidance, shift, cfg, negative = case
    pipe.scheduler.set_shift(shift)
    arguments = dict(prompt=prompt, num_inference_steps=steps, guidance_scale=guidance, latents=noise.clone(),
                     height=128, width=128, max_sequence_length=TEXT_TOKENS)
    if cfg:
        arguments.update(true_cfg_scale=cfg, negative_prompt=negative)
    latents = pipe(**arguments, output_type="latent").images
    picture = pipe(**arguments, output_type="np").images[0]
    return np.rint(picture * 255).astype(int), latents


def main():
    torch.set_num_threads(2)
    diffusers.logging.set_verbosity_error()
    pipe = FluxPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        lora = os.path.join(folder, "lora.safetensors")
        subprocess.run(["./train", "data/10pairs", "--model", MODEL, "--steps", "12", "--lr", "2e-3", "--final-lr", "1", "--preview",
                        "0", "--run", os.path.join(folder, "run"), "--out", lora, "--device", "cpu"], check=True, capture_output=True)
        for with_lora in (False, True):
            if with_lora:
                pipe.load_lora_weights(lora)
            for i, case in enumerate(CASES):
                noise = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(7 + i))
                (a, la), (b, lb) = ours(folder, case, noise, lora if with_lora else None), theirs(pipe, case, noise)
                pixels, latents = np.abs(a - b).max(), float((la - lb).norm() / lb.norm())
                failed += pixels > ALLOWED
                print(f"{'LoRA' if with_lora else 'base'} {case}: pixels differ by at most {pixels}, latents by {latents:.1e}")
    print(f"{2 * len(CASES) - failed} passed, {failed} failed")
    return int(failed > 0)  # numpy.bool_ is no exit status


if __name__ == "__main__":
    sys.exit(main())
