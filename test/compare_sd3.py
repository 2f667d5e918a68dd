"""Compares our Stable Diffusion 3.5 with diffusers, transformers and peft.

    compare_sd3.py [large] [medium] [odd] [wide]      default: all; wide needs 3 GB of disk and memory

Random weights (formats.py), f32 arithmetic on both sides: text encoders and velocities within 1e-5, LoRA
gradients (there in f64) within 1e-4, pictures from the same noise and times within 2/255, with and without
true CFG; a LoRA that ./train makes, in diffusers; LoRAs in the names of PEFT, kohya and Stability;
Stability's single files. Prints one line for each comparison; exit status 1 if one misses its limit.
"""
import copy
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile

import diffusers
import numpy
import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from PIL import Image
from safetensors.torch import load_file, save_file

import compare_formats
from compare_formats import ROOT, TEXTS, check_merge, differences, program, relative, report, rounded
from formats import (SD3_CONFIGS, dense, lora_file, scaled, sd3_factors, sd3_layers, sd3_pipeline, split_sd3, to_fp8, to_stability, write_diffusers,
                     write_sd3_file)

PROMPT, NEGATIVE, STEPS, SHIFT, CFG = "a red apple on a table", "an owl", 4, 3, 4.5
NOT_TRAINED = re.compile(r"norm1_context|ff_context|attn2")  # by the official recipe


def times(steps):
    """Ours, before the shift that diffusers' scheduler gives to times that it is handed."""
    t = 1 - 1e-5
    return [t / (SHIFT - (SHIFT - 1) * t)] + [1 - i / steps for i in range(1, steps)]


class Drawing:
    """One noise, drawn by both."""
    def __init__(self, name, pipe, folder):
        self.pipe, self.folder = pipe, folder
        self.h, self.w = SD3_CONFIGS[name]["grid"]
        self.size = [2 * pipe.vae_scale_factor * x for x in (self.w, self.h)]
        self.noise = torch.randn(1, 16, 2 * self.h, 2 * self.w, generator=torch.Generator().manual_seed(3))
        self.path = os.path.join(folder, "noise.safetensors")
        self.tokens = min(pipe.tokenizer_3.model_max_length, 256)
        save_file({"noise": self.packed(self.noise)}, self.path)

    def packed(self, x):
        return x.view(1, 16, self.h, 2, self.w, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, self.h * self.w, 64).contiguous()

    def ours(self, model, steps, cfg, *more):
        picture, latents = os.path.join(self.folder, "ours.png"), os.path.join(self.folder, "ours.safetensors")
        program("sample", PROMPT, steps, "--model", model, "--device", "cpu", "--size", "x".join(map(str, self.size)), "--noise", self.path, "--out",
                picture, "--latents", latents, *(["--cfg", cfg, "--negative", NEGATIVE] if cfg else ["--cfg", 0]), *(more or ["--no-lora"]))
        return load_file(latents)["latents"], numpy.asarray(Image.open(picture).convert("RGB")).astype(int)

    @torch.no_grad()
    def theirs(self, pipe, steps, cfg):
        image = pipe(PROMPT, negative_prompt=NEGATIVE, guidance_scale=cfg or 1, sigmas=times(steps), num_inference_steps=steps, latents=self.noise.clone(),
                     width=self.size[0], height=self.size[1], max_sequence_length=self.tokens, output_type="pil").images[0]
        return numpy.asarray(image).astype(int)

    @torch.no_grad()
    def velocity(self, pipe):
        context, _, pooled, _ = pipe.encode_prompt(PROMPT, None, None, do_classifier_free_guidance=False, max_sequence_length=self.tokens)
        time = torch.tensor([1 - 1e-5]) * 1000
        return self.packed(pipe.transformer(self.noise, context, pooled, time, return_dict=False)[0])

    def compare(self, what, model, *more, pipe=None, cfgs=(CFG,)):
        pipe = pipe or self.pipe
        latents, _ = self.ours(model, 1, 0, *more)
        report(f"{what}: velocity", relative((self.packed(self.noise) - latents) / (1 - 1e-5), self.velocity(pipe)), 1e-5)
        for cfg in cfgs:
            _, picture = self.ours(model, STEPS, cfg, *more)
            report(f"{what}: picture with CFG {cfg}, of 255", numpy.abs(picture - self.theirs(pipe, STEPS, cfg)).max(), 2)


@torch.no_grad()
def texts(name, pipe, model, tokens, folder):
    """All rows of awkward prompts, CLIP's and T5's apart: the latter are many times as large."""
    subprocess.run(["make", "-s", "-C", ROOT, "build/encode"], check=True)
    out = os.path.join(folder, "texts.safetensors")
    subprocess.run([os.path.join(ROOT, "build", "encode"), model, "0", out], input=b"".join(t.encode() + b"\0" for t in TEXTS), check=True)
    ours, worst, clip = load_file(out), [0, 0, 0], pipe.tokenizer_max_length
    for i, text in enumerate(TEXTS):
        context, _, pooled, _ = pipe.encode_prompt(text, None, None, do_classifier_free_guidance=False, max_sequence_length=tokens)
        mine = ours[f"context.{i}"].view_as(context)
        for k, (a, b) in enumerate(((mine[:, :clip], context[:, :clip]), (mine[:, clip:], context[:, clip:]), (ours[f"pooled.{i}"], pooled.flatten()))):
            worst[k] = max(worst[k], relative(a, b))
    for part, error in zip(("CLIP's tokens", "T5's tokens", "pooled"), worst):
        report(f"{name}, {len(TEXTS)} texts, {part}", error, 1e-5)


def gradients(name, pipe, model, drawing, folder):
    """Of every factor that is trained, for two samples; each against the floor of 1e-6 of all."""
    torch.manual_seed(5)
    c, (h, w), text = pipe.transformer.config, (drawing.h, drawing.w), 11
    x = dict(x=torch.randn(2, h * w, 64), goal=torch.randn(2, h * w, 64), context=torch.randn(2, text, c.joint_attention_dim),
             pooled=torch.randn(2, c.pooled_projection_dim), time=torch.rand(2), grid=torch.tensor([h, w]).float())
    transformer = copy.deepcopy(pipe.transformer).double().requires_grad_(False)
    weights = dict(transformer.named_parameters())
    factors = sd3_factors({k: v for k, v in weights.items() if not NOT_TRAINED.search(k)}, 3, 13, spread=0.1)
    pairs = {n: [f.double().requires_grad_() for f in pair] for n, pair in factors.items()}
    for n, (a, b) in pairs.items():
        k = n + ".weight"
        weights[k] = weights[k] + (b.flatten(1) @ a.flatten(1)).view_as(weights[k])
    latents = x["x"].double().view(2, h, w, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 16, 2 * h, 2 * w)
    v = torch.func.functional_call(transformer, weights, (latents, x["context"].double(), x["pooled"].double(), 1000 * x["time"].double()),
                                   dict(return_dict=False))[0]
    v = v.view(2, 16, h, 2, w, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, h * w, 64)
    ((v - x["goal"]) ** 2).mean().backward()
    paths = [os.path.join(folder, f) for f in ("in.safetensors", "out.safetensors")]
    save_file({**x, **{f"{n}.{kind}": f.contiguous() for n, pair in factors.items() for kind, f in zip("ab", pair)}}, paths[0])
    subprocess.run(["make", "-s", "-C", ROOT, "build/gradients"], check=True)
    subprocess.run([os.path.join(ROOT, "build", "gradients"), os.path.join(model, "transformer"), *paths], check=True)
    ours, theirs = load_file(paths[1]), {f"{n}.{kind}": f.grad for n, pair in pairs.items() for kind, f in zip("ab", pair)}
    floor = 1e-6 * sum(g.norm() ** 2 for g in theirs.values()) ** 0.5
    errors = [(((ours[k].flatten() - g.flatten()).norm() / (g.norm() + floor)).item(), k) for k, g in theirs.items()]
    report(f"{name}, two samples with a LoRA: velocity", relative(ours["velocity"].view_as(v), v.detach()), 1e-5)
    report(f"{name}, gradients of {len(errors)} factors, worst of {max(errors)[1]}", max(errors)[0], 1e-4)


class Complaints(logging.Handler):
    """Of a LoRA's keys; that there are none for the text encoders is none."""
    def __init__(self):
        super().__init__(logging.WARNING)
        self.said = []

    def emit(self, record):
        if "No LoRA keys associated to CLIP" not in record.getMessage():
            self.said.append(record.getMessage())


def loaded(what, pipe, path):
    """path's LoRA in diffusers: each of its layers, and no complaint."""
    said = Complaints()
    diffusers.utils.logging.set_verbosity_warning()
    diffusers.utils.logging.disable_default_handler()
    diffusers.utils.logging.add_handler(said)
    pipe.load_lora_weights(path, adapter_name="x")
    diffusers.utils.logging.remove_handler(said)
    diffusers.utils.logging.set_verbosity_error()
    tensors, theirs = load_file(path), differences(pipe.transformer, "x")
    ours = {k[len("transformer."):-len(".lora_A.weight")]: (x, tensors[k.replace("lora_A", "lora_B")]) for k, x in tensors.items() if "lora_A" in k}
    report(f"{what}: what diffusers says of its keys", len(said.said), 0)
    report(f"{what}: layers that are not the file's", len(set(ours) ^ set(theirs)) + abs(len(tensors) - 2 * len(ours)), 0)
    report(f"{what}: differences", max(relative(theirs[k].flatten(1), dense(f)) for k, f in ours.items()), 1e-5)
    for message in said.said:
        print(message)
    return ours


def trained(name, pipe, model, drawing, folder):
    lora, exported = os.path.join(folder, "trained.safetensors"), os.path.join(folder, "exported.safetensors")
    side = 4 if name == "wide" else 8
    program("train", os.path.join(ROOT, "data/10pairs"), "--model", model, "--device", "cpu", "--steps", 4, "--batch", 2, "--rank", 3, "--alpha", 6,
            "--lr", 3e-3, "--final-lr", 1, "--resolution", 2 * side * pipe.vae_scale_factor, "--cfg", CFG, "--cfg-student", "--preview", 0, "--no-cache",
            "--run", os.path.join(folder, "run"), "--out", lora)
    recipe = {n for n, m in pipe.transformer.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)) and not NOT_TRAINED.search(n)}
    factors = loaded(f"{name}, our LoRA in diffusers", pipe, lora)
    report(f"{name}, our LoRA: layers that are not the official recipe's", len(recipe ^ set(factors)), 0)
    bare, with_lora = drawing.ours(model, 1, 0)[0], drawing.ours(model, 1, 0, "--lora", lora + ":1")[0]
    report(f"{name}, our LoRA: that it changes nothing", float(relative(with_lora, bare) < 1e-3), 0)
    drawing.compare(f"{name}, our LoRA in diffusers", model, "--lora", lora + ":1")
    pipe.unload_lora_weights()
    program("shortcut", "merge", "--model", model, "--kohya", "--out", exported, "--lora", lora + ":1")
    sd = pipe.transformer.state_dict()
    names = {"lora_unet_" + new.replace(".", "_") for new, _, _ in sd3_layers(sd)}
    report(f"{name}, exported to kohya's names: others", len({k.split(".")[0] for k in load_file(exported)} - names), 0)
    check_merge(f"{name}, exported to kohya's names", model, sd, folder, factors, exported + ":1")


def dialects(name, pipe, model, drawing, folder):
    sd = pipe.transformer.state_dict()
    path, other = os.path.join(folder, "lora.safetensors"), os.path.join(folder, "other.safetensors")
    stability = to_stability(sd)
    for dialect in "peft", "bare", "kohya", "comfy", "comfy-down":
        fused = dialect in ("kohya", "comfy", "comfy-down")
        factors, what = sd3_factors(stability if fused else sd, 5, 7), f"{name}, LoRA {dialect}"
        alpha = {"peft": 2, "kohya": 3, "comfy-down": 8}.get(dialect)
        expected = scaled(split_sd3(sd, factors) if fused else factors, 1 if alpha is None else alpha / 5)
        save_file(lora_file(factors, dialect, alpha), path)
        said = check_merge(what, model, sd, folder, scaled(expected, 0.5), path + ":0.5")
        report(f"{what}: applied {len(factors)}/{len(factors)} is said", int(f"applied {len(factors)}/{len(factors)}" not in said), 0)
        save_file(lora_file(expected, "peft"), other)  # the one dialect that diffusers reads for SD3
        loaded(what, pipe, other)
        drawing.compare(what, model, "--lora", path + ":1")
        pipe.unload_lora_weights()


def single_files(name, pipe, drawing, folder):
    sd = pipe.transformer.state_dict()
    theirs = convert_sd3_transformer_checkpoint_to_diffusers(dict(to_stability(sd)))
    report(f"{name}, our Stability names, read by diffusers: differing tensors", sum(not torch.equal(theirs.get(k, v[:0]), v) for k, v in sd.items()), 0)
    for all_in_one in True, False:
        for dtype in torch.float32, torch.float16, torch.bfloat16:
            here = os.path.join(folder, "files")
            shutil.rmtree(here, ignore_errors=True)
            path = write_sd3_file(pipe, here, all_in_one, dtype)
            drawing.compare(f"{name}, {'all in one' if all_in_one else 'files beside each other'}, {dtype}", path, pipe=rounded(pipe, dtype))
    for convention in None, "scale_weight", "weight_scale":
        tensors, meaning = to_fp8(to_stability(sd), convention)
        other = copy.copy(pipe)
        other.register_modules(transformer=copy.deepcopy(pipe.transformer))
        other.transformer.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(meaning))
        shutil.rmtree(here)
        drawing.compare(f"{name}, all in one, fp8, scales: {convention}", write_sd3_file(pipe, here, True, transformer=tensors), pipe=other)
    shutil.rmtree(here)


def main(names):
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            pipe = sd3_pipeline(name)
            pipe.set_progress_bar_config(disable=True)
            drawing = Drawing(name, pipe, folder)
            pipe.scheduler.set_timesteps(STEPS, sigmas=times(STEPS))
            ours = [1 - 1e-5] + [SHIFT * u / (1 + (SHIFT - 1) * u) for u in (1 - i / STEPS for i in range(1, STEPS + 1))]
            report(f"{name}: the scheduler's times", (pipe.scheduler.sigmas - torch.tensor(ours)).abs().max().item(), 1e-6)
            model = write_diffusers(pipe, os.path.join(folder, "model"))
            texts(name, pipe, model, drawing.tokens, folder)
            drawing.compare(f"{name}, diffusers", model, cfgs=(0, CFG))
            gradients(name, pipe, model, drawing, folder)
            trained(name, pipe, model, drawing, folder)
            if name != "wide":
                dialects(name, pipe, model, drawing, folder)
            if name in ("large", "medium"):  # CLIPs of 64 channels a head, and bigG told by its layers
                single_files(name, pipe, drawing, folder)
    print(f"{compare_formats.failed} failed")
    return int(compare_formats.failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(SD3_CONFIGS)))
