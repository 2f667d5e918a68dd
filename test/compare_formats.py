"""Compares what shortcut makes of every layout and LoRA dialect with diffusers, transformers and peft.

    compare_formats.py [tiny] [schnell] [wide]      default: tiny schnell; wide needs 12 GB of disk

Random weights, f32 arithmetic on both sides. Prints one line for each comparison; exit status 1 if
one misses its limit: 1e-5 for velocities, 2/255 for pictures from the same noise.
"""
import copy
import os
import shutil
import subprocess
import sys
import tempfile

import diffusers
import numpy
import torch
import transformers
from diffusers import FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file

from formats import (bfl_dense, bfl_factors, contiguous, dense, lora_factors, lora_file, own_state, pipeline, to_bfl, to_fp8,
                     write_all_in_one, write_diffusers, write_single_files)

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
diffusers.utils.logging.set_verbosity_error()
transformers.utils.logging.set_verbosity_error()
PROMPT, WIDTH, HEIGHT, STEPS, GUIDANCE = "a red apple on a table", 96, 64, 4, 3.5
failed = 0


def report(what, value, limit):
    global failed
    good = value <= limit
    failed += not good
    print(f"{'ok  ' if good else 'FAIL'} {what}: {value:.2g} (at most {limit:.2g})", flush=True)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def program(name, *arguments):
    run = subprocess.run([os.path.join(ROOT, name), *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode:
        sys.exit(f"{name} {' '.join(map(str, arguments))}: {run.stdout}")
    return run.stdout


class Noise:
    def __init__(self, pipe, folder):
        factor = 2 * pipe.vae_scale_factor
        self.grid = (HEIGHT // factor, WIDTH // factor)
        self.values = torch.randn(1, self.grid[0] * self.grid[1], 64, generator=torch.Generator().manual_seed(3))
        self.path = os.path.join(folder, "noise.safetensors")
        self.tokens = min(pipe.tokenizer_2.model_max_length, 512)
        save_file({"noise": self.values}, self.path)


def our_latents(model, noise, steps, folder, *more):
    picture, latents = os.path.join(folder, "ours.png"), os.path.join(folder, "ours.safetensors")
    program("sample", PROMPT, steps, "--model", model, "--size", f"{WIDTH}x{HEIGHT}", "--guidance", GUIDANCE, "--noise", noise.path,
            "--out", picture, "--latents", latents, *(more or ["--no-lora"]))
    return load_file(latents)["latents"], numpy.asarray(Image.open(picture).convert("RGB")).astype(int)


TEXTS = ["", "a", "a lighthouse at dusk, long exposure, " * 60, "красный маяк на берегу моря, закат", "夕暮れの灯台、油絵", "منارة عند الغروب",
         "\U0001f468\u200d\U0001f469\u200d\U0001f467 at the \U0001f3d6\ufe0f \u2764\ufe0f", "  tabs\tand\nlines  ", "naïve café ﬁ ½ ①"]


def texts(name, pipe, folder):
    """Context and pooled vectors of awkward prompts, at two lengths."""
    model, encode = os.path.join(folder, "model"), os.path.join(folder, "encode")
    write_single_files(pipe, model, {"x": torch.zeros(1)})
    subprocess.run([os.environ.get("CC", "cc"), "-std=c99", "-O2", "-w", os.path.join(ROOT, "test", "encode.c"), "-o", encode, "-lm"], check=True)
    for tokens in (256, 512) if name == "wide" else (16, 40):
        out = os.path.join(folder, "texts.safetensors")
        subprocess.run([encode, model, str(tokens), out], input=b"".join(t.encode() + b"\0" for t in TEXTS), check=True)
        ours, worst = load_file(out), 0
        for i, text in enumerate(TEXTS):
            with torch.no_grad():
                context, pooled, _ = pipe.encode_prompt(text, None, max_sequence_length=tokens)
            worst = max(worst, relative(ours[f"context.{i}"], context.flatten()), relative(ours[f"pooled.{i}"], pooled.flatten()))
        report(f"{name}, {len(TEXTS)} texts of {tokens} tokens", worst, 1e-5)
    shutil.rmtree(model)


def their_picture(pipe, noise):
    image = pipe(PROMPT, height=HEIGHT, width=WIDTH, num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=noise.values.clone(),
                 max_sequence_length=noise.tokens, output_type="pil").images[0]
    return numpy.asarray(image).astype(int)


def their_velocity(pipe, noise):
    with torch.no_grad():
        context, pooled, text_ids = pipe.encode_prompt(PROMPT, None, max_sequence_length=noise.tokens)
        ids = torch.zeros(*noise.grid, 3)
        ids[..., 1] += torch.arange(noise.grid[0])[:, None]
        ids[..., 2] += torch.arange(noise.grid[1])[None]
        guidance = torch.tensor([GUIDANCE]) if pipe.transformer.config.guidance_embeds else None
        return pipe.transformer(hidden_states=noise.values, encoder_hidden_states=context, pooled_projections=pooled,
                                timestep=torch.tensor([1 - 1e-5]), guidance=guidance, img_ids=ids.view(-1, 3), txt_ids=text_ids, return_dict=False)[0]


def compare_model(what, pipe, model, noise, folder, *more):
    latents, _ = our_latents(model, noise, 1, folder, *more)
    report(f"{what}: velocity", relative((noise.values - latents) / (1 - 1e-5), their_velocity(pipe, noise)), 1e-5)
    _, ours = our_latents(model, noise, STEPS, folder, *more)
    report(f"{what}: picture, of 255", numpy.abs(ours - their_picture(pipe, noise)).max(), 2)


def rounded(pipe, dtype):
    """The pipeline with all weights rounded as a file of this type has them."""
    out = copy.copy(pipe)
    for part in "transformer", "vae", "text_encoder", "text_encoder_2":
        model = copy.deepcopy(getattr(pipe, part))
        for p in model.parameters():
            p.data = p.data.to(dtype).float()
        out.register_modules(**{part: model})
    return out


def layouts(name, pipe, noise, folder):
    sd = contiguous(pipe.transformer.state_dict())
    bfl = to_bfl(sd)
    here = os.path.join(folder, "model")

    def one(what, theirs, write):
        shutil.rmtree(here, ignore_errors=True)
        compare_model(f"{name}, {what}", theirs, write() or here, noise, folder)
    one("diffusers, sharded", pipe, lambda: write_diffusers(pipe, here, shard="600MB" if name == "wide" else "200KB"))
    one("diffusers, one file each", pipe, lambda: write_diffusers(pipe, here))
    for dtype in (torch.bfloat16, torch.float16) if name != "wide" else ():
        one(f"diffusers, {dtype}", rounded(pipe, dtype), lambda d=dtype: write_diffusers(pipe, here, d))
    one("BFL's and ComfyUI's single files", pipe, lambda: write_single_files(pipe, here, bfl))
    one("all in one", pipe, lambda: write_all_in_one(pipe, here, bfl))
    for convention in None, "scale_weight", "weight_scale":
        tensors, meaning = to_fp8(bfl, convention)
        t5, t5_meaning = to_fp8(own_state(pipe.text_encoder_2), convention)
        theirs = copy.copy(pipe)
        theirs.register_modules(transformer=from_bfl(meaning, pipe.transformer, folder), text_encoder_2=copy.deepcopy(pipe.text_encoder_2))
        theirs.text_encoder_2.load_state_dict({**t5_meaning, "encoder.embed_tokens.weight": t5_meaning["shared.weight"]}, strict=False)
        one(f"fp8, scales: {convention}", theirs, lambda: write_single_files(pipe, here, tensors, t5=("t5xxl_fp8_e4m3fn", t5)))
    if name == "wide":  # diffusers' own reader knows this width only
        theirs = from_bfl(bfl, pipe.transformer, folder).state_dict()
        report("our BFL names, read by diffusers: differing tensors", sum(not torch.equal(theirs[k], v) for k, v in sd.items()), 0)


def from_bfl(bfl, model, folder):
    """A transformer with the values of BFL's tensors. diffusers' own reader knows FLUX.1-dev's width only; for others, unique numbers are run
    through to_bfl to see where each lands."""
    if model.inner_dim == 3072:
        config, path = os.path.join(folder, "config"), os.path.join(folder, "single.safetensors")
        model.save_config(config)
        save_file(contiguous(bfl), path)
        return FluxTransformer2DModel.from_single_file(path, config=config).eval()
    marks, count = {}, 0
    for k, v in model.state_dict().items():
        marks[k] = torch.arange(count, count + v.numel()).view(v.shape)
        count += v.numel()
    flat = torch.empty(count)
    for k, mark in to_bfl(marks).items():
        flat[mark.flatten()] = bfl[k].flatten().float()
    model = copy.deepcopy(model)
    model.load_state_dict({k: flat[mark] for k, mark in marks.items()})
    return model


def merged(model, folder, *loras):
    out = os.path.join(folder, "merged")
    shutil.rmtree(out, ignore_errors=True)
    text = program("shortcut", "merge", "--model", model, "--out", out, *(x for l in loras for x in ("--lora", l)))
    return load_file(os.path.join(out, "diffusion_pytorch_model.safetensors")), text


def check_merge(what, model, sd, folder, expected, *loras):
    after, text = merged(model, folder, *loras)
    error = max(relative(after[k + ".weight"] - sd[k + ".weight"], d) for k, d in expected.items())
    report(f"{what}: merged difference", error, 2e-5)
    report(f"{what}: tensors changed that should not be", sum(not torch.equal(after[k], v) for k, v in sd.items() if k[:-7] not in expected), 0)
    return text


def loras(name, pipe, noise, folder):
    sd = contiguous(pipe.transformer.state_dict())
    model = write_diffusers(pipe, os.path.join(folder, "model"))
    path = os.path.join(folder, "lora.safetensors")
    few = {k: f for k, f in lora_factors(sd, 3, 9).items() if "norm_out" not in k and "time_text" not in k}
    for dialect in "peft", "bare", "model", "old", "onetrainer", "kohya", "comfy", "comfy-down":
        fused = dialect in ("kohya", "comfy", "comfy-down")
        factors = (bfl_factors if fused else lora_factors)(sd, 5 if fused else 4, 7)
        alpha = {"kohya": 3, "comfy-down": 8, "peft": 2}.get(dialect)
        expected = dense(factors, 0.5 * (1 if alpha is None else alpha / (5 if fused else 4)))
        save_file(lora_file(factors, dialect, alpha), path)
        text = check_merge(f"{name}, LoRA {dialect}", model, sd, folder, bfl_dense(expected) if fused else expected, path + ":0.5")
        n = len(factors)
        report(f"{name}, LoRA {dialect}: applied {n}/{n} is said", int(f"applied {n}/{n}" not in text), 0)
        if dialect in ("peft", "old") or (dialect == "kohya" and name == "wide"):
            usable = {k: f for k, f in factors.items() if "blocks." in k} if fused else factors  # diffusers drops the others
            save_file(lora_file(usable, dialect), path)
            pipe.load_lora_weights(path, adapter_name="x")
            compare_model(f"{name}, LoRA {dialect}, against diffusers' loader", pipe, model, noise, folder, "--lora", path + ":1")
            pipe.unload_lora_weights()
    other = os.path.join(folder, "other.safetensors")
    factors = bfl_factors(sd, 2, 11)
    save_file(lora_file(few, "peft"), path)
    save_file(lora_file(factors, "kohya"), other)
    both = bfl_dense(dense(factors, 1.5))
    for k, d in dense(few, -0.7).items():
        both[k] = both[k] + d
    check_merge(f"{name}, two LoRAs with scales", model, sd, folder, both, path + ":-0.7", other + ":1.5")
    # Exported: the same differences from kohya's file, up to bf16 factors (exact, where they came as bf16).
    exact = {k: (a.bfloat16().float(), b.bfloat16().float()) for k, (a, b) in lora_factors(sd, 4, 7).items()}
    save_file(lora_file(exact, "peft"), path)
    program("shortcut", "merge", "--model", model, "--kohya", "--out", other, "--lora", path + ":1")
    check_merge(f"{name}, exported to kohya's names", model, sd, folder, dense(exact), other + ":1")
    if name == "wide":
        kept = {k: v for k, v in load_file(other).items() if "_blocks_" in k}
        save_file(kept, other)
        pipe.load_lora_weights(other, adapter_name="x")
        compare_model(f"{name}, exported to kohya's names, against diffusers' loader", pipe, model, noise, folder, "--lora", other + ":1")
        pipe.unload_lora_weights()


def main(names):
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            pipe = pipeline(name)
            pipe.set_progress_bar_config(disable=True)
            noise = Noise(pipe, folder)
            texts(name, pipe, folder)
            layouts(name, pipe, noise, folder)
            loras(name, pipe, noise, folder)
    print(f"{failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["tiny", "schnell"]))
