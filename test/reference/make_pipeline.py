#!/usr/bin/env python3
"""Writes pipeline_*/ beside this file: small random pipelines of FLUX and of Stable Diffusion 3.5 in
diffusers' layout, and what diffusers and transformers compute with them: text encoders, all Euler
steps, the picture, and the same with a LoRA. Also text_tiny.safetensors for the text encoders of
data/tiny-flux, to be made again when those change. test_pipeline.c compares.

    python make_pipeline.py [pipeline_a] [pipeline_b] [pipeline_sd3] [text_tiny]    default: all

Versions: requirements.txt. Weights are bf16; the transformer and the VAE compute in f64 (diffusers rounds times and
latents to f32 between steps).
"""
import json
import math
import os
import shutil
import sys

import torch
from diffusers import (AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel,
                       SD3Transformer2DModel, StableDiffusion3Pipeline)
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizerFast, T5Config,
                          T5EncoderModel, T5TokenizerFast)
from transformers.models.clip.tokenization_clip import bytes_to_unicode

HERE = os.path.dirname(os.path.abspath(__file__))
PROMPTS = ["a red apple on a table", "", "Zwölf Äpfel, 12 apples & 3 🍎!", "the the the", "a " * 60, "?"]
RANK, SCALE = 2, 0.8
CASES = {
    "pipeline_a": dict(
        seed=1, steps=4, shift=3.0, guidance=3.5, h=3, w=2, tokens=12, dynamic=False,
        clip=dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
                  max_position_embeddings=16, hidden_act="quick_gelu", eos_token_id=2),
        t5=dict(d_model=20, num_layers=2, num_heads=3, d_kv=8, d_ff=36, relative_attention_num_buckets=8,
                relative_attention_max_distance=12, feed_forward_proj="gated-gelu"),
        flux=dict(num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
                  guidance_embeds=True, axes_dims_rope=(4, 6, 6)),
        vae=dict(channels=(8, 12), latents=4, groups=4)),
    "pipeline_b": dict(
        seed=2, steps=3, shift=1.0, guidance=0.0, h=2, w=5, tokens=21, dynamic=True,
        clip=dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
                  max_position_embeddings=11, hidden_act="gelu", eos_token_id=None),
        t5=dict(d_model=12, num_layers=3, num_heads=2, d_kv=4, d_ff=20, relative_attention_num_buckets=32,
                relative_attention_max_distance=128, feed_forward_proj="silu"),
        flux=dict(num_layers=2, num_single_layers=1, attention_head_dim=8, num_attention_heads=3,
                  guidance_embeds=False, axes_dims_rope=(2, 4, 2)),
        vae=dict(channels=(4, 4, 8), latents=2, groups=2)),
}
# T5 is wider than both CLIPs together: the rest of their tokens is zero.
SD3 = dict(
    seed=3, steps=4, shift=3.0, cfg=4.5, negative=3, h=3, w=2, tokens=20,
    clip=dict(hidden_size=12, projection_dim=12, num_hidden_layers=3, num_attention_heads=2, intermediate_size=20,
              max_position_embeddings=16, hidden_act="quick_gelu", eos_token_id=2),
    clip_2=dict(hidden_size=16, projection_dim=16, num_hidden_layers=4, num_attention_heads=4, intermediate_size=24,
                max_position_embeddings=16, hidden_act="gelu", eos_token_id=2),
    t5=dict(d_model=32, num_layers=2, num_heads=2, d_kv=8, d_ff=28, relative_attention_num_buckets=8,
            relative_attention_max_distance=12, feed_forward_proj="gated-gelu"),
    sd3=dict(num_layers=2, attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16, pos_embed_max_size=8,
             dual_attention_layers=(0,), qk_norm="rms_norm", sample_size=16),
    vae=dict(channels=(8, 12), latents=4, groups=4))


def clip_tokenizer(folder, length, **more):
    letters = list(bytes_to_unicode().values())
    pairs = ["t h", "th e</w>", "a p", "ap p", "l e</w>", "app le</w>", "r e", "re d</w>", "o n</w>"]
    words = letters + [c + "</w>" for c in letters] + [p.replace(" ", "") for p in pairs]
    words += ["<|startoftext|>", "<|endoftext|>"]
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "vocab.json"), "w", encoding="utf-8") as f:
        json.dump({w: i for i, w in enumerate(words)}, f, ensure_ascii=False)
    with open(os.path.join(folder, "merges.txt"), "w", encoding="utf-8") as f:
        f.write("#version: 0.2\n" + "\n".join(pairs) + "\n")
    return CLIPTokenizerFast(os.path.join(folder, "vocab.json"), os.path.join(folder, "merges.txt"),
                             model_max_length=length, **more)


def t5_tokenizer(length):
    words = ["<pad>", "</s>", "<unk>", "\u2581", "\u2581a", "\u2581the", "\u2581apple", "red", "able", "on", "ö"]
    words += sorted(set("abcdefghijklmnoprstuvw,.!&0123") - set("a")) + ["a"]
    scores = [0.0, 0.0, 0.0] + [-2 - 0.37 * i for i in range(len(words) - 3)]
    t = Tokenizer(models.Unigram(list(zip(words, scores)), unk_id=2))
    t.normalizer = normalizers.Sequence([normalizers.Strip(left=False, right=True),
                                         normalizers.Replace(Regex(" {2,}"), "\u2581")])
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    t.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=t, model_max_length=length, extra_ids=0)


def random_weights(module, generator):
    """Activations near 1; bf16, so that ours and theirs are the same."""
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim > 1:
            p.data = noise * (0.5 if "embed" in name or "shared" in name else p[0].numel() ** -0.5)
        else:
            p.data = (1.0 if "norm" in name and name.endswith("weight") else 0.0) + 0.2 * noise
        p.data = p.data.to(torch.bfloat16)
    return module.eval()


def autoencoder(v, **more):
    levels = len(v["channels"])
    return AutoencoderKL(
        block_out_channels=v["channels"], layers_per_block=1, norm_num_groups=v["groups"], latent_channels=v["latents"],
        use_quant_conv=False, use_post_quant_conv=False, down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels, **more)


def build(folder, c):
    g = torch.Generator().manual_seed(c["seed"])
    clip_words = clip_tokenizer(os.path.join(folder, "tokenizer"), c["clip"]["max_position_embeddings"])
    t5_words = t5_tokenizer(c["tokens"])
    clip = dict(c["clip"], vocab_size=len(clip_words), bos_token_id=clip_words.bos_token_id)
    if clip["eos_token_id"] is None:
        clip["eos_token_id"] = clip_words.eos_token_id
    vae = autoencoder(c["vae"], scaling_factor=0.3611, shift_factor=0.1159)
    flux = FluxTransformer2DModel(patch_size=1, in_channels=4 * c["vae"]["latents"], joint_attention_dim=c["t5"]["d_model"],
                                  pooled_projection_dim=clip["hidden_size"], **c["flux"])
    scheduler = FlowMatchEulerDiscreteScheduler(shift=c["shift"], use_dynamic_shifting=c["dynamic"], base_shift=0.5,
                                                max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096)
    t5 = T5EncoderModel(T5Config(vocab_size=len(t5_words), **c["t5"]))
    parts = [random_weights(m, g) for m in (CLIPTextModel(CLIPTextConfig(**clip)), t5, flux, vae)]
    pipe = FluxPipeline(scheduler, parts[3], parts[0], clip_words, parts[1], t5_words, parts[2])
    return saved(pipe, folder)


def build_sd3(folder, c):
    g = torch.Generator().manual_seed(c["seed"])
    words = [clip_tokenizer(os.path.join(folder, "tokenizer"), 16),
             clip_tokenizer(os.path.join(folder, "tokenizer_2"), 16, pad_token="!"), t5_tokenizer(c["tokens"])]
    clips = [CLIPTextModelWithProjection(CLIPTextConfig(**config, vocab_size=len(words[0]), bos_token_id=words[0].bos_token_id))
             for config in (c["clip"], c["clip_2"])]
    t5 = T5EncoderModel(T5Config(vocab_size=len(words[2]), **c["t5"]))
    latents = c["vae"]["latents"]
    sd3 = SD3Transformer2DModel(in_channels=latents, out_channels=latents, joint_attention_dim=c["t5"]["d_model"],
                                pooled_projection_dim=c["clip"]["projection_dim"] + c["clip_2"]["projection_dim"], **c["sd3"])
    vae = autoencoder(c["vae"], scaling_factor=1.5305, shift_factor=0.0609)
    for m in (*clips, t5, sd3, vae):
        random_weights(m, g)
    table = sd3.pos_embed.pos_embed     # is read, not computed: here it is not its sinusoids
    table.data = (table + 0.3 * torch.randn(table.shape, generator=g)).to(torch.bfloat16)
    return saved(StableDiffusion3Pipeline(sd3, FlowMatchEulerDiscreteScheduler(shift=c["shift"]), vae, clips[0], words[0], clips[1],
                                          words[1], t5, words[2]), folder)


def saved(pipe, folder):
    pipe.save_pretrained(folder)
    for part in os.listdir(folder):
        if part == "tokenizer" or part == "tokenizer_2" and hasattr(pipe, "tokenizer_3"):
            os.remove(os.path.join(folder, part, "tokenizer.json"))  # vocab.json and merges.txt say it all
        for name in ("model.safetensors", "diffusion_pytorch_model.safetensors"):
            if os.path.exists(os.path.join(folder, part, name)):
                os.chmod(os.path.join(folder, part, name), 0o644)
    return pipe


@torch.no_grad()
def encode(clip, t5, clip_words, t5_words, tokens):
    """Both encoders for all prompts, as FluxPipeline asks them, in f32 (their masks allow no f64)."""
    contexts, pooled, ids = [], [], []
    for prompt in PROMPTS:
        a = clip_words(prompt, padding="max_length", max_length=clip_words.model_max_length, truncation=True,
                       return_tensors="pt").input_ids
        b = t5_words(prompt, padding="max_length", max_length=tokens, truncation=True, return_tensors="pt").input_ids
        pooled.append(clip.float()(a).pooler_output[0])
        contexts.append(t5.float()(b)[0][0])
        ids.append(torch.cat([a[0], b[0]]))
    return dict(context=torch.stack(contexts), pooled=torch.stack(pooled), ids=torch.stack(ids))


def text_bytes():
    return torch.tensor(list(b"".join(p.encode() + b"\0" for p in PROMPTS)), dtype=torch.uint8)


def save(path, tensors):
    save_file({k: (v.float() if v.is_floating_point() else v).contiguous() for k, v in tensors.items()}, path)
    os.chmod(path, 0o644)


def lora_file(pipe, path, generator):
    """Factors on every linear layer, and on SD3's convolution, alpha = SCALE * rank folded into B."""
    out = {}
    for name, m in pipe.transformer.named_modules():
        if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)):
            shape, one = m.weight.shape, (1,) * (m.weight.ndim - 2)
            out[f"transformer.{name}.lora_A.weight"] = torch.randn(RANK, *shape[1:], generator=generator) * 0.3
            out[f"transformer.{name}.lora_B.weight"] = SCALE * torch.randn(shape[0], RANK, *one, generator=generator) * 0.3
    save(path, out)


def sigmas(steps, shift):
    """Before the shift; the paper's sampler, and ours, starts at 1 - 1e-5, and 1e-5 is 0.01 radians
    of the fastest sinusoid of 1000 t."""
    t = 1 - 1e-5
    return [t / (shift - (shift - 1) * t)] + [1 - i / steps for i in range(1, steps)]


@torch.no_grad()
def draw(pipe, c, context, pooled, noise):
    factor = 2 * pipe.vae_scale_factor
    dynamic = math.exp(0.5 + (1.15 - 0.5) * (c["h"] * c["w"] - 256) / (4096 - 256))
    latents = pipe(prompt_embeds=context[None], pooled_prompt_embeds=pooled[None], sigmas=sigmas(c["steps"], dynamic if c["dynamic"] else c["shift"]),
                   guidance_scale=c["guidance"], height=c["h"] * factor, width=c["w"] * factor, latents=noise[None],
                   output_type="latent").images
    h, w = c["h"] * factor, c["w"] * factor
    z = pipe._unpack_latents(latents, h, w, pipe.vae_scale_factor)
    z = z / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    return latents[0], pipe.vae.decode(z).sample[0]


def make(name, c):
    folder = os.path.join(HERE, name)
    shutil.rmtree(folder, ignore_errors=True)
    pipe = build(folder, c)
    pipe.set_progress_bar_config(disable=True)
    text = encode(pipe.text_encoder, pipe.text_encoder_2, pipe.tokenizer, pipe.tokenizer_2, c["tokens"])
    g = torch.Generator().manual_seed(10 + c["seed"])
    pipe.transformer.double(), pipe.vae.double()
    noise = torch.randn(c["h"] * c["w"], 4 * c["vae"]["latents"], generator=g)
    sizes = [c["steps"], c["guidance"], c["h"], c["w"], c["tokens"], c["shift"] if not c["dynamic"] else 0]
    out = dict(text, prompts=text_bytes(), noise=noise, settings=torch.tensor(sizes))
    lora = os.path.join(folder, "lora.safetensors")
    lora_file(pipe, lora, g)
    out["latents"], out["picture"] = draw(pipe, c, text["context"][0].double(), text["pooled"][0].double(), noise.double())
    pipe.load_lora_weights(lora)
    pipe.transformer.double()
    out["lora_latents"], out["lora_picture"] = draw(pipe, c, text["context"][0].double(), text["pooled"][0].double(), noise.double())
    save(os.path.join(folder, "reference.safetensors"), out)
    change = (out["lora_latents"] - out["latents"]).norm() / out["latents"].norm()
    print(name, f"picture {out['picture'].std():.3f}, LoRA changes latents by {change:.3f}", pipe.scheduler.sigmas.tolist())


@torch.no_grad()
def encode_sd3(pipe):
    """As StableDiffusion3Pipeline asks the three encoders, with as many tokens of T5 as its tokenizer says."""
    for m in (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
        m.float()
    rows = [pipe.encode_prompt(p, None, None, do_classifier_free_guidance=False, max_sequence_length=pipe.tokenizer_3.model_max_length)
            for p in PROMPTS]
    ids = [torch.cat([w(p, padding="max_length", max_length=w.model_max_length, truncation=True, return_tensors="pt").input_ids[0]
                      for w in (pipe.tokenizer, pipe.tokenizer_2, pipe.tokenizer_3)]) for p in PROMPTS]
    return dict(context=torch.cat([r[0] for r in rows]), pooled=torch.cat([r[2] for r in rows]), ids=torch.stack(ids))


@torch.no_grad()
def draw_sd3(pipe, c, text, noise, cfg):
    """From packed noise [h w, 4 C], whose channels are channel, row, column, to packed latents and a picture. The
    scheduler shifts the sigmas that it is given, which are those of ./sample before their shift."""
    h, w, latents, factor = c["h"], c["w"], c["vae"]["latents"], 2 * pipe.vae_scale_factor
    x = noise.double().view(1, h, w, latents, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(1, latents, 2 * h, 2 * w)
    row = lambda key, i: text[key][i:i + 1].double()
    x = pipe(prompt_embeds=row("context", 0), pooled_prompt_embeds=row("pooled", 0), negative_prompt_embeds=row("context", c["negative"]),
             negative_pooled_prompt_embeds=row("pooled", c["negative"]), guidance_scale=cfg, sigmas=sigmas(c["steps"], c["shift"]),
             num_inference_steps=c["steps"], height=h * factor, width=w * factor, latents=x, output_type="latent").images
    packed = x.view(latents, h, 2, w, 2).permute(1, 3, 0, 2, 4).reshape(h * w, 4 * latents)
    return packed, pipe.vae.decode(x / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor).sample[0]


def make_sd3(name, c):
    folder = os.path.join(HERE, name)
    shutil.rmtree(folder, ignore_errors=True)
    pipe = build_sd3(folder, c)
    pipe.set_progress_bar_config(disable=True)
    text = encode_sd3(pipe)
    g = torch.Generator().manual_seed(10 + c["seed"])
    pipe.transformer.double(), pipe.vae.double()
    noise = torch.randn(c["h"] * c["w"], 4 * c["vae"]["latents"], generator=g)
    out = dict(text, prompts=text_bytes(), noise=noise,
               settings=torch.tensor([c["steps"], c["cfg"], c["h"], c["w"], c["tokens"], c["shift"], c["negative"]]))
    out["latents"], out["picture"] = draw_sd3(pipe, c, text, noise, 1)
    out["cfg_latents"], out["cfg_picture"] = draw_sd3(pipe, c, text, noise, c["cfg"])
    lora = os.path.join(folder, "lora.safetensors")
    lora_file(pipe, lora, g)
    pipe.load_lora_weights(lora)
    pipe.transformer.double()
    out["lora_latents"], out["lora_picture"] = draw_sd3(pipe, c, text, noise, c["cfg"])
    save(os.path.join(folder, "reference.safetensors"), out)
    change = lambda a, b: (out[a] - out[b]).norm() / out[b].norm()
    print(name, f"picture {out['picture'].std():.3f}, CFG changes latents by {change('cfg_latents', 'latents'):.3f}, a LoRA by "
          f"{change('lora_latents', 'cfg_latents'):.3f}", pipe.scheduler.sigmas.tolist())


def tiny():
    folder = os.path.join(HERE, "../../data/tiny-flux")
    if not os.path.exists(folder):
        return
    path = lambda part: os.path.join(folder, part)
    out = encode(CLIPTextModel.from_pretrained(path("text_encoder")), T5EncoderModel.from_pretrained(path("text_encoder_2")),
                 CLIPTokenizerFast.from_pretrained(path("tokenizer")), T5TokenizerFast.from_pretrained(path("tokenizer_2")), 16)
    save(os.path.join(HERE, "text_tiny.safetensors"), dict(out, prompts=text_bytes(), settings=torch.tensor([0., 0, 0, 0, 16, 0])))


MAKERS = {**{name: lambda name=name, c=c: make(name, c) for name, c in CASES.items()},
          "pipeline_sd3": lambda: make_sd3("pipeline_sd3", SD3), "text_tiny": tiny}
for which in sys.argv[1:] or MAKERS:
    MAKERS[which]()
