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
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from formats import (bfl_factors, contiguous, dense, lora_factors, lora_file, omi_file, own_state, pipeline, scaled, split, to_bfl, to_fp8, together,
                     write_all_in_one, write_diffusers, write_single_files, xlabs_factors)

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
    model = os.path.join(folder, "model")
    write_single_files(pipe, model, {"x": torch.zeros(1)})
    subprocess.run(["make", "-s", "-C", ROOT, "build/encode"], check=True)
    for tokens in (256, 512) if name == "wide" else (40, 256, 512):
        out = os.path.join(folder, "texts.safetensors")
        subprocess.run([os.path.join(ROOT, "build", "encode"), model, str(tokens), out], input=b"".join(t.encode() + b"\0" for t in TEXTS), check=True)
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
    for part in "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3":
        model = copy.deepcopy(getattr(pipe, part, None))
        for p in [*model.parameters(), *model.buffers()] if model is not None else ():
            p.data = p.data.to(dtype).float() if p.is_floating_point() else p.data
        if model is not None:
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


def check_merge(what, model, sd, folder, factors, *loras):
    """What merging adds to each weight is the product of these factors; all else stays as it is. Returns what was printed."""
    out = os.path.join(folder, "merged")
    shutil.rmtree(out, ignore_errors=True)
    text = program("shortcut", "merge", "--model", model, "--out", out, *(x for l in loras for x in ("--lora", l)))
    error, changed = 0, 0
    with safe_open(os.path.join(out, "diffusion_pytorch_model.safetensors"), "pt") as after:
        for k, v in sd.items():
            if k[:-7] in factors and k.endswith(".weight"):
                error = max(error, relative((after.get_tensor(k) - v).flatten(1), dense(factors[k[:-7]])))
            elif k in factors:  # what is added to a bias
                error = max(error, relative(after.get_tensor(k) - v, factors[k]))
            else:
                changed += not torch.equal(after.get_tensor(k), v)
    shutil.rmtree(out)
    report(f"{what}: merged difference", error, 2e-5)
    report(f"{what}: tensors changed that should not be", changed, 0)
    return text


def differences(transformer, adapter):
    """Of each layer, as peft adds it."""
    return {n: m.get_delta_weight(adapter) for n, m in transformer.named_modules() if adapter in getattr(m, "lora_A", {})}


FUSED = "kohya", "comfy", "comfy-down"


def understood(dialect, factors, wide):
    """The layers that diffusers reads right (0.35; checked by check_understood). Of BFL's, it names those outside of the blocks without its
    own prefix and then leaves them out, and refuses the file if they have alphas; it knows linear1 at FLUX.1-dev's width only. Of OneTrainer's
    it reads attention and what is outside of the blocks."""
    if dialect in FUSED:
        return {k: f for k, f in factors.items() if "blocks." in k and (wide or "linear1" not in k)}
    if dialect == "onetrainer":
        return {k: f for k, f in factors.items() if "attn." in k or "blocks." not in k}
    return factors


def check_understood(name, pipe, path):
    """That `understood` leaves out no layer which diffusers would take from a kohya file, and that it takes the others as they are."""
    factors = {k: f for k, f in bfl_factors(pipe.transformer.state_dict(), 5, 7).items() if name == "wide" or "linear1" not in k}
    save_file(lora_file(factors, "kohya"), path)
    pipe.load_lora_weights(path, adapter_name="x")
    theirs, usable = differences(pipe.transformer, "x"), split(understood("kohya", factors, name == "wide"))
    pipe.unload_lora_weights()
    report(f"{name}, LoRA kohya: layers read by diffusers other than those of the blocks", len(set(theirs) ^ set(usable)), 0)
    report(f"{name}, LoRA kohya: diffusers' differences of those", max(relative(theirs[k], dense(f)) for k, f in usable.items()), 1e-5)


def against_diffusers(what, pipe, model, noise, folder, ours, theirs):
    pipe.load_lora_weights(theirs, adapter_name="x")
    compare_model(f"{what}, against diffusers' loader", pipe, model, noise, folder, "--lora", ours + ":1")
    pipe.unload_lora_weights()


def dialects(name, pipe, sd, model, noise, folder):
    path, other = os.path.join(folder, "lora.safetensors"), os.path.join(folder, "other.safetensors")
    for dialect in ("peft", "xlabs", *FUSED) if name == "wide" else ("peft", "bare", "model", "old", "onetrainer", "omi", "lycoris", "xlabs",
                                                                                  *FUSED):
        fused = dialect == "xlabs" or dialect in FUSED
        rank, what = 5 if fused else 4, f"{name}, LoRA {dialect}"
        factors = (xlabs_factors if dialect == "xlabs" else bfl_factors if fused else lora_factors)(sd, rank, 7)
        alpha = {"kohya": 3, "comfy-down": 8, "peft": 2, "onetrainer": 6, "omi": 6}.get(dialect)
        expected = scaled(factors, 0.5 * (1 if alpha is None else alpha / rank))
        save_file(omi_file(sd, factors, alpha) if dialect == "omi" else lora_file(factors, dialect, alpha), path)
        text = check_merge(what, model, sd, folder, split(expected) if fused else expected, path + ":0.5")
        report(f"{what}: applied {len(factors)}/{len(factors)} is said", int(f"applied {len(factors)}/{len(factors)}" not in text), 0)
        usable = understood(dialect, factors, name == "wide")
        save_file(omi_file(sd, usable, alpha) if dialect == "omi" else lora_file(usable, dialect, alpha), path)
        # These names diffusers does not know at all: it gets the same factors under others.
        names = {"comfy": "kohya", "bare": "peft", "model": "peft", "omi": "peft", "lycoris": "peft"}
        save_file(lora_file(usable, names.get(dialect, dialect), alpha), other)
        against_diffusers(what, pipe, model, noise, folder, path, other)


def configs(name, pipe, sd, model, noise, folder):
    """PEFT's folder with adapter_config.json, and both of diffusers' files, which hold that in their metadata."""
    for rslora, bias in (False, False), (True, False), (False, True):
        names = [k[:-7] for k, v in sd.items() if v.ndim == 2]
        config = LoraConfig(r=4, lora_alpha=6, target_modules=names, use_rslora=rslora, lora_bias=bias, init_lora_weights=False,
                            rank_pattern={"attn.to_q": 2, "^proj_out": 3}, alpha_pattern={"^proj_out": 5, "attn.to_k": 9, "net.2": 1})
        torch.manual_seed(5)
        peft = get_peft_model(copy.deepcopy(pipe.transformer), config)
        for key, x in peft.named_parameters():
            if "lora_B" in key:
                x.data *= 0.1  # PEFT's own are so large that they multiply the rounding of f32 a hundredfold
        folders = [os.path.join(folder, x) for x in ("PEFTs_folder", "diffusers_adapter", "diffusers_weights")]
        peft.save_pretrained(folders[0])
        transformer = peft.get_base_model()
        transformer.peft_config = peft.peft_config
        transformer.save_lora_adapter(folders[1], adapter_name="default")
        pipe.save_lora_weights(folders[2], get_peft_model_state_dict(transformer, adapter_name="default"),
                               transformer_lora_adapter_metadata=peft.peft_config["default"].to_dict())
        expected = {k: (torch.eye(d.shape[1]), d) for k, d in differences(transformer, "default").items()}
        for n, m in transformer.named_modules():
            if bias and "default" in getattr(m, "lora_B", {}):
                expected[n + ".bias"] = m.scaling["default"] * m.lora_B["default"].bias.data
        for f in folders:
            what = f"{name}, LoRA in {os.path.basename(f)}{', rsLoRA' if rslora else ', with biases' if bias else ''}"
            check_merge(what, model, sd, folder, expected, f + ":1")
        against_diffusers(what, pipe, model, noise, folder, folders[2], folders[2])


def loras(name, pipe, noise, folder):
    sd = pipe.transformer.state_dict()
    model = write_diffusers(pipe, os.path.join(folder, "model"))
    path, other = os.path.join(folder, "lora.safetensors"), os.path.join(folder, "other.safetensors")
    check_understood(name, pipe, path)
    dialects(name, pipe, sd, model, noise, folder)
    if name != "wide":
        configs(name, pipe, sd, model, noise, folder)
    few = {k: f for k, f in lora_factors(sd, 3, 9).items() if "norm_out" not in k and "time_text" not in k}
    factors = bfl_factors(sd, 2, 11)
    save_file(lora_file(few, "peft"), path)
    save_file(lora_file(factors, "kohya"), other)
    check_merge(f"{name}, two LoRAs with scales", model, sd, folder, together(scaled(few, -0.7), split(scaled(factors, 1.5))), path + ":-0.7", other + ":1.5")
    # Exported: the same differences from kohya's file, up to bf16 factors (exact, where they came as bf16).
    exact = {k: (a.bfloat16().float(), b.bfloat16().float()) for k, (a, b) in lora_factors(sd, 4, 7).items()}
    save_file(lora_file(exact, "peft"), path)
    program("shortcut", "merge", "--model", model, "--kohya", "--out", other, "--lora", path + ":1")
    check_merge(f"{name}, exported to kohya's names", model, sd, folder, exact, other + ":1")
    save_file({k: v for k, v in load_file(other).items() if "_blocks_" in k and (name == "wide" or "linear1" not in k)}, other)
    against_diffusers(f"{name}, exported to kohya's names", pipe, model, noise, folder, other, other)


def main(names):
    if "wide" in names and not os.environ.get("SHORTCUT_FLUX_DIR"):
        sys.exit("wide needs FLUX.1-dev's tokenizers: set SHORTCUT_FLUX_DIR to its folder")
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
