"""Random pipelines of FLUX and Stable Diffusion 3.5, and the layouts and LoRA dialects that people have them in.

    formats.py FOLDER [tiny|schnell|wide]    writes all of FLUX's into FOLDER

tiny and schnell have small configs; wide has FLUX.1-dev's true widths, one double and one single
block (4 GB as f32), and takes the real tokenizers from $SHORTCUT_FLUX_DIR. Every other layout is
made from diffusers' own, so that all of them hold one model. SD3's: large and medium are small ones,
odd has sizes that are no multiples of anything, wide SD3.5-Medium's true width and two blocks (0.8 GB).
"""
import json
import os
import shutil
import sys

import torch
from diffusers import (AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel,
                       StableDiffusion3Pipeline)
from safetensors.torch import save_file
from transformers import (CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizerFast, T5Config, T5EncoderModel,
                          T5TokenizerFast)

HERE = os.path.dirname(os.path.abspath(__file__))
FP8 = torch.float8_e4m3fn

CONFIGS = {
    "tiny": dict(layers=(2, 3), head=32, heads=3, guidance=True, clip=(128, 2, 2), t5=(48, 3, 16, 96, 2), vae=(32, 64), blocks=1, words=1000),
    "schnell": dict(layers=(1, 2), head=64, heads=2, guidance=False, clip=(64, 1, 3), t5=(64, 2, 24, 80, 1), vae=(32, 32, 64), blocks=2, words=1000),
    "wide": dict(layers=(1, 1), head=128, heads=24, guidance=True, clip=(768, 12, 1), t5=(4096, 64, 64, 10240, 1), vae=(128, 256, 512, 512), blocks=2,
                 words=49408),
}

# clip, clip_2: width, heads, layers. Files name neither CLIP: bigG is the one with more than 12 layers, heads are of 64 channels. ComfyUI
# reads only models with as many blocks as heads of 64 channels, as Large and Medium are, and medium here.
SD3_CONFIGS = {
    "large": dict(layers=3, head=32, heads=3, dual=(), table=24, clip=(64, 1, 2), clip_2=(128, 2, 13), t5=(256, 3, 16, 96, 2), vae=(32, 64), blocks=1,
                  grid=(6, 9)),
    "medium": dict(layers=3, head=64, heads=3, dual=(0, 1), table=16, clip=(64, 1, 3), clip_2=(64, 1, 14), t5=(128, 2, 24, 80, 1), vae=(32, 32, 64),
                   blocks=2, grid=(7, 4)),
    "odd": dict(layers=2, head=12, heads=3, dual=(0,), table=13, clip=(28, 2, 2), clip_2=(33, 3, 3), t5=(75, 2, 20, 50, 1), vae=(32, 64), blocks=1,
                grid=(13, 3)),
    "wide": dict(layers=2, head=64, heads=24, dual=(0,), table=48, clip=(64, 1, 2), clip_2=(64, 1, 13), t5=(192, 2, 24, 80, 1), vae=(32, 64), blocks=1,
                 grid=(4, 5)),
}


# ---- One model in diffusers' layout ----

def rope_axes(head):
    return (head // 8, head * 7 // 16, head * 7 // 16)


def random_weights(model, spread=0.05):
    """Not as they come: norms would be 1, biases 0, and exchanging them would go unnoticed."""
    for p in model.parameters():
        if p.ndim < 2:
            p.data += spread * torch.randn_like(p)
    return model.eval()


def autoencoder(c, **more):
    levels = len(c["vae"])
    return AutoencoderKL(
        block_out_channels=c["vae"], down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=c["blocks"], latent_channels=16, norm_num_groups=32, sample_size=64, use_quant_conv=False, use_post_quant_conv=False, **more)


def t5_encoder(c, words):
    width, heads, head, hidden, layers = c["t5"]
    return T5EncoderModel(T5Config(
        d_model=width, num_heads=heads, d_kv=head, d_ff=hidden, num_layers=layers, vocab_size=words, feed_forward_proj="gated-gelu",
        dense_act_fn="gelu_pytorch_tanh", tie_word_embeddings=False, is_encoder_decoder=False, use_cache=False))


def sd3_pipeline(name):
    """CLIP-L's projection is the identity, as in the pipelines that were made of Stability's files, but in odd."""
    c = SD3_CONFIGS[name]
    torch.manual_seed(sum(map(ord, "sd3" + name)))
    path = lambda part: os.path.join(HERE, "../data/tiny-flux", part)
    tokenizers = [CLIPTokenizerFast.from_pretrained(path("tokenizer"), **more) for more in ({}, dict(pad_token="!"))]
    clips = [CLIPTextModelWithProjection(CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_attention_heads=heads, num_hidden_layers=layers, vocab_size=1000,
        max_position_embeddings=tokenizers[0].model_max_length, hidden_act=act, bos_token_id=0, eos_token_id=2, pad_token_id=1, projection_dim=width))
        for (width, heads, layers), act in ((c["clip"], "quick_gelu"), (c["clip_2"], "gelu"))]
    t5, vae = t5_encoder(c, 1000), autoencoder(c, scaling_factor=1.5305, shift_factor=0.0609)
    transformer = SD3Transformer2DModel(
        sample_size=c["table"], in_channels=16, out_channels=16, num_layers=c["layers"], attention_head_dim=c["head"], num_attention_heads=c["heads"],
        joint_attention_dim=c["t5"][0], caption_projection_dim=c["head"] * c["heads"], pooled_projection_dim=c["clip"][0] + c["clip_2"][0],
        pos_embed_max_size=c["table"], dual_attention_layers=c["dual"], qk_norm="rms_norm")
    for model in transformer, vae, *clips, t5:
        random_weights(model)
    if name != "odd":
        clips[0].text_projection.weight.data = torch.eye(c["clip"][0])
    table = transformer.pos_embed.pos_embed
    table.data += 0.2 * torch.randn_like(table)
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae, text_encoder=clips[0], tokenizer=tokenizers[0],
        text_encoder_2=clips[1], tokenizer_2=tokenizers[1], text_encoder_3=t5, tokenizer_3=T5TokenizerFast.from_pretrained(path("tokenizer_2")))


def pipeline(name):
    c = CONFIGS[name]
    torch.manual_seed(sum(map(ord, name)))
    parts = os.environ.get("SHORTCUT_FLUX_DIR", "") if name == "wide" else os.path.join(HERE, "../data/tiny-flux")
    clip_width, clip_heads, clip_layers = c["clip"]
    tokenizer = CLIPTokenizerFast.from_pretrained(os.path.join(parts, "tokenizer"))  # the slow one treats accents and Chinese differently
    tokenizer_2 = T5TokenizerFast.from_pretrained(os.path.join(parts, "tokenizer_2"))
    text_encoder = CLIPTextModel(CLIPTextConfig(
        hidden_size=clip_width, intermediate_size=4 * clip_width, num_attention_heads=clip_heads, num_hidden_layers=clip_layers,
        vocab_size=c["words"], max_position_embeddings=tokenizer.model_max_length, hidden_act="quick_gelu", bos_token_id=0, eos_token_id=2,
        pad_token_id=1, projection_dim=clip_width))
    text_encoder_2 = t5_encoder(c, 32128 if name == "wide" else 1000)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=c["layers"][0], num_single_layers=c["layers"][1], attention_head_dim=c["head"],
        num_attention_heads=c["heads"], joint_attention_dim=c["t5"][0], pooled_projection_dim=clip_width, guidance_embeds=c["guidance"],
        axes_dims_rope=rope_axes(c["head"]))
    vae = autoencoder(c, scaling_factor=0.3611, shift_factor=0.1159)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0 if c["guidance"] else 1.0, use_dynamic_shifting=c["guidance"])
    for model in transformer, vae, text_encoder, text_encoder_2:
        random_weights(model)
    return FluxPipeline(transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, text_encoder_2=text_encoder_2,
                        tokenizer_2=tokenizer_2, scheduler=scheduler)


# ---- Names and rows of the other layouts ----

def to_bfl(sd):
    """Black Forest Labs' names: q, k, v (and a single block's MLP) are rows of one matrix, and the last modulation has the shift first."""
    out = {}

    def take(new, *old):
        for kind in "weight", "bias":
            out[f"{new}.{kind}"] = torch.cat([sd[f"{o}.{kind}"] for o in old])
    for new, old in (("img_in", "x_embedder"), ("txt_in", "context_embedder"), ("final_layer.linear", "proj_out")):
        take(new, old)
    for new, old in ("time", "timestep"), ("vector", "text"), ("guidance", "guidance"):
        if f"time_text_embed.{old}_embedder.linear_1.weight" in sd:
            take(f"{new}_in.in_layer", f"time_text_embed.{old}_embedder.linear_1")
            take(f"{new}_in.out_layer", f"time_text_embed.{old}_embedder.linear_2")
    for kind in "weight", "bias":
        scale, shift = sd[f"norm_out.linear.{kind}"].chunk(2)
        out[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
    for i in range(1000):
        old, new = f"transformer_blocks.{i}.", f"double_blocks.{i}."
        if old + "norm1.linear.weight" not in sd:
            break
        for stream, mod, ff, qkv, proj, norm in (("img", "norm1", "ff", ("to_q", "to_k", "to_v"), "to_out.0", "norm_"),
                                                 ("txt", "norm1_context", "ff_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "norm_added_")):
            take(f"{new}{stream}_mod.lin", f"{old}{mod}.linear")
            take(f"{new}{stream}_attn.qkv", *(f"{old}attn.{x}" for x in qkv))
            take(f"{new}{stream}_attn.proj", f"{old}attn.{proj}")
            take(f"{new}{stream}_mlp.0", f"{old}{ff}.net.0.proj")
            take(f"{new}{stream}_mlp.2", f"{old}{ff}.net.2")
            out[f"{new}{stream}_attn.norm.query_norm.scale"] = sd[f"{old}attn.{norm}q.weight"]
            out[f"{new}{stream}_attn.norm.key_norm.scale"] = sd[f"{old}attn.{norm}k.weight"]
    for i in range(1000):
        old, new = f"single_transformer_blocks.{i}.", f"single_blocks.{i}."
        if old + "norm.linear.weight" not in sd:
            break
        take(new + "modulation.lin", old + "norm.linear")
        take(new + "linear1", *(old + x for x in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")))
        take(new + "linear2", old + "proj_out")
        out[new + "norm.query_norm.scale"] = sd[old + "attn.norm_q.weight"]
        out[new + "norm.key_norm.scale"] = sd[old + "attn.norm_k.weight"]
    return out


def sd3_layers(sd):
    """Stability's layers, each with diffusers' that are its rows, and whether halves are swapped: diffusers has the scale before the shift."""
    yield "x_embedder.proj", ["pos_embed.proj"], False
    for new, old in ("t", "timestep"), ("y", "text"):
        for i in 0, 1:
            yield f"{new}_embedder.mlp.{2 * i}", [f"time_text_embed.{old}_embedder.linear_{i + 1}"], False
    yield "context_embedder", ["context_embedder"], False
    blocks = len({k.split(".")[1] for k in sd if k.startswith("transformer_blocks.")})
    for i in range(blocks):
        old, new = f"transformer_blocks.{i}.", f"joint_blocks.{i}."
        for stream, rows in (("x_block.", {
                "attn.qkv": "attn.to_q attn.to_k attn.to_v", "attn.proj": "attn.to_out.0", "attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
                "attn2.proj": "attn2.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2", "adaLN_modulation.1": "norm1.linear"}),
                             ("context_block.", {
                "attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj", "attn.proj": "attn.to_add_out", "mlp.fc1": "ff_context.net.0.proj",
                "mlp.fc2": "ff_context.net.2", "adaLN_modulation.1": "norm1_context.linear"})):
            for layer, parts in rows.items():
                names = [old + x for x in parts.split()]
                if names[0] + ".weight" in sd:
                    yield new + stream + layer, names, i == blocks - 1 and parts == "norm1_context.linear"
    yield "final_layer.adaLN_modulation.1", ["norm_out.linear"], True
    yield "final_layer.linear", ["proj_out"], False


def swapped(x):
    return torch.cat(x.chunk(2)[::-1])


def to_stability(sd):
    """Stability's names of SD3's transformer."""
    out = {"pos_embed": sd["pos_embed.pos_embed"]}
    for new, old, swap in sd3_layers(sd):
        for kind in "weight", "bias":
            x = torch.cat([sd[f"{o}.{kind}"] for o in old])
            out[f"{new}.{kind}"] = swapped(x) if swap else x
    for i in range(1000):
        old, new = f"transformer_blocks.{i}.", f"joint_blocks.{i}."
        for theirs, ours in (("x_block.attn.ln_", "attn.norm_"), ("x_block.attn2.ln_", "attn2.norm_"), ("context_block.attn.ln_", "attn.norm_added_")):
            for kind in "qk":
                if f"{old}{ours}{kind}.weight" in sd:
                    out[f"{new}{theirs}{kind}.weight"] = sd[f"{old}{ours}{kind}.weight"]
        if old + "norm1.linear.weight" not in sd:
            return out


def to_ldm(sd, levels):
    """The autoencoder's names of latent diffusion, as in ae.safetensors; its attention is 1x1 convolutions."""
    names = (("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"), ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
             ("mid_block.attentions.0.to_q", "mid.attn_1.q"), ("mid_block.attentions.0.to_k", "mid.attn_1.k"), ("mid_block.attentions.0.to_v", "mid.attn_1.v"),
             ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"), ("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut"),
             ("downsamplers.0.conv", "downsample.conv"), ("upsamplers.0.conv", "upsample.conv"), ("resnets.", "block."), ("down_blocks.", "down."))
    out = {}
    for name, x in sd.items():
        linear = ".attentions." in name and x.ndim == 2
        for old, new in names:
            name = name.replace(old, new)
        for i in range(levels):
            name = name.replace(f"up_blocks.{i}.", f"up.{levels - 1 - i}.")
        out[name] = x[:, :, None, None] if linear else x
    return out


def to_fp8(sd, convention):
    """Matrices as e4m3fn; convention: None (plain cast), 'scale_weight' (ComfyUI, with its marker)
    or 'weight_scale', both with scales of activations too, which change no weight. Also what the file then means."""
    out, meaning = {}, {}
    for name, x in sd.items():
        if x.ndim != 2 or not name.endswith(".weight"):
            out[name] = x.to(torch.bfloat16)
            meaning[name] = out[name].float()
            continue
        scale = torch.tensor(1.0) if convention is None else (x.abs().max() / 448).float()
        out[name] = (x / scale).to(FP8)
        meaning[name] = out[name].float() * scale
        if convention:
            out[name[:-len("weight")] + convention] = scale
            out[name[:-len("weight")] + {"scale_weight": "scale_input", "weight_scale": "input_scale"}[convention]] = torch.tensor(3.0)
    if convention == "scale_weight":
        out["scaled_fp8"] = torch.zeros(0, dtype=FP8)
    return out, meaning


def contiguous(sd, dtype=None):
    return {k: (v if dtype is None else v.to(dtype)).clone().contiguous() for k, v in sd.items()}


# ---- LoRA files ----

def lora_factors(sd, rank, seed, spread=0.02):
    """{module of diffusers: (A, B)} on every linear layer."""
    g = torch.Generator().manual_seed(seed)
    return {name[:-7]: (torch.randn(rank, x.shape[1], generator=g) / x.shape[1] ** 0.5, spread * torch.randn(x.shape[0], rank, generator=g))
            for name, x in sd.items() if x.ndim == 2 and name.endswith(".weight")}


def bfl_factors(sd, rank, seed, spread=0.02):
    """The same on BFL's fused layers."""
    return lora_factors(to_bfl(sd), rank, seed, spread)


XLABS = {"img_attn.qkv": "qkv_lora1", "img_attn.proj": "proj_lora1", "txt_attn.qkv": "qkv_lora2", "txt_attn.proj": "proj_lora2",
         "linear1": "qkv_lora", "linear2": "proj_lora"}


def sd3_factors(sd, rank, seed, spread=0.02):
    """{layer: (A, B)} on every linear layer, and of the convolution A [rank, in, 2, 2] and B [out, rank, 1, 1], in the names of sd."""
    g, out = torch.Generator().manual_seed(seed), {}
    for name, x in sd.items():
        if x.ndim in (2, 4) and name.endswith(".weight"):
            out[name[:-7]] = (torch.randn(rank, *x.shape[1:], generator=g) / x[0].numel() ** 0.5,
                              spread * torch.randn(x.shape[0], rank, *(1,) * (x.ndim - 2), generator=g))
    return out


def split_sd3(sd, factors):
    """Factors on Stability's layers as those on diffusers': A for all parts, B by rows."""
    out = {}
    for theirs, ours, swap in sd3_layers(sd):
        if theirs in factors:
            a, b = factors[theirs]
            for name, rows in zip(ours, (swapped(b) if swap else b).chunk(len(ours))):
                out[name] = a.clone(), rows
    return out


def xlabs_factors(sd, rank, seed, spread=0.02):
    """On the layers that XLabs trains, in BFL's names; of linear1 the rows of q, k and v only."""
    layers = {name[:-7]: x for name, x in to_bfl(sd).items() if name.endswith(".weight") and name[:-7].split(".", 2)[-1] in XLABS}
    return lora_factors({name + ".weight": x[:3 * x.shape[1]] if name.endswith("linear1") else x for name, x in layers.items()}, rank, seed, spread)


OMI_PARTS = {"attn.to_q": "img_attn.qkv.0", "attn.to_k": "img_attn.qkv.1", "attn.to_v": "img_attn.qkv.2", "attn.add_q_proj": "txt_attn.qkv.0",
             "attn.add_k_proj": "txt_attn.qkv.1", "attn.add_v_proj": "txt_attn.qkv.2"}
OMI_SINGLE = {"attn.to_q": "linear1.0", "attn.to_k": "linear1.1", "attn.to_v": "linear1.2", "proj_mlp": "linear1.3"}


def omi_file(sd, factors, alpha):
    """OneTrainer's OMI format, of factors on diffusers' modules: BFL's names with a number for each part, and the last modulation's B swapped."""
    marks = {k: torch.full((v.shape[0], 1), float(i)) for i, (k, v) in enumerate(sd.items())}
    places = {round(v.mean().item()): k[:-7] for k, v in to_bfl(marks).items() if k.endswith(".weight") and v.min() == v.max()}
    out = {}
    for name, (a, b) in factors.items():
        kind, index, last = name.split(".", 2) if "blocks." in name else ("", "", name)
        part = (OMI_SINGLE if kind.startswith("single") else OMI_PARTS).get(last)
        blocks = "single_blocks" if kind.startswith("single") else "double_blocks"
        theirs = f"{blocks}.{index}.{part}" if part else places[list(sd).index(name + ".weight")]
        if name == "norm_out.linear":
            b = torch.cat(b.chunk(2)[::-1])
        key = "transformer." + ("img_in.proj" if theirs == "img_in" else theirs)
        out[key + ".lora_down.weight"], out[key + ".lora_up.weight"] = a.contiguous(), b.contiguous()
        out[key + ".alpha"] = torch.tensor(float(alpha))
    return out


def lora_file(factors, dialect, alpha=None):
    """The tensors of a LoRA file; alpha: in a tensor of its own (the factors' product is then scaled by alpha / rank)."""
    prefix, a, b, flat = {
        "peft": ("transformer.", ".lora_A.weight", ".lora_B.weight", False),
        "bare": ("", ".lora_A.weight", ".lora_B.weight", False),
        "model": ("base_model.model.", ".lora_A.weight", ".lora_B.weight", False),
        "old": ("transformer.", ".lora.down.weight", ".lora.up.weight", False),
        "comfy": ("diffusion_model.", ".lora_A.weight", ".lora_B.weight", False),
        "comfy-down": ("diffusion_model.", ".lora_down.weight", ".lora_up.weight", False),
        "xlabs": ("", ".down.weight", ".up.weight", False),
        "kohya": ("lora_unet_", ".lora_down.weight", ".lora_up.weight", True),
        "lycoris": ("lycoris_", ".lora_down.weight", ".lora_up.weight", True),
        "onetrainer": ("lora_transformer_", ".lora_down.weight", ".lora_up.weight", True)}[dialect]
    out = {}
    for name, (down, up) in factors.items():
        if dialect == "xlabs":
            blocks, i, layer = name.split(".", 2)
            name = f"{blocks}.{i}.processor.{XLABS[layer]}"
        key = prefix + (name.replace(".", "_") if flat else name)
        out[key + a], out[key + b] = down.contiguous(), up.contiguous()
        if alpha is not None:
            out[key + ".alpha"] = torch.tensor(float(alpha))
    return out


def dense(factors):
    a, b = factors
    return b.flatten(1).double() @ a.flatten(1).double()


def scaled(factors, scale):
    return {name: (a, scale * b) for name, (a, b) in factors.items()}


def together(one, other):
    """Factors of the sum."""
    return {name: tuple(torch.cat([f[name][i] for f in (one, other) if name in f], i) for i in (0, 1)) for name in {**one, **other}}


def split(factors):
    """Factors on BFL's layers as those on diffusers' modules: A for all parts, B by rows."""
    out = {}
    for name, (a, b) in factors.items():
        block = "single_transformer_blocks." if name.startswith("single") else "transformer_blocks."
        where = block + name.split(".")[1] + "." if "blocks." in name else ""
        last = name.split(".", 2)[2] if where else name
        if last.endswith("qkv") or last == "linear1":
            n = a.shape[1]  # q, k and v are as wide as their input
            for i, x in enumerate(("add_q_proj", "add_k_proj", "add_v_proj") if last.startswith("txt") else ("to_q", "to_k", "to_v")):
                out[f"{where}attn.{x}"] = a, b[i * n:(i + 1) * n]
            if last == "linear1" and len(b) > 3 * n:  # not XLabs'
                out[where + "proj_mlp"] = a, b[3 * n:]
        elif name == "final_layer.adaLN_modulation.1":
            shift, scale = b.chunk(2)
            out["norm_out.linear"] = a, torch.cat([scale, shift])
        else:
            out[where + {
                "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear", "img_attn.proj": "attn.to_out.0",
                "txt_attn.proj": "attn.to_add_out", "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2", "txt_mlp.0": "ff_context.net.0.proj",
                "txt_mlp.2": "ff_context.net.2", "modulation.lin": "norm.linear", "linear2": "proj_out", "img_in": "x_embedder",
                "txt_in": "context_embedder", "final_layer.linear": "proj_out",
                "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1", "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
                "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
                "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
                "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
                "vector_in.out_layer": "time_text_embed.text_embedder.linear_2"}[last]] = a, b
    return out


# ---- All layouts ----

def write_diffusers(pipe, folder, dtype=torch.float32, shard="1GB"):
    pipe.save_pretrained(folder, max_shard_size=shard)
    if dtype == torch.float32:
        return folder
    for part in "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3":
        model = getattr(pipe, part, None)
        if model is None:
            continue
        files = [f for f in os.listdir(os.path.join(folder, part)) if f != "config.json"]
        for f in files:
            os.remove(os.path.join(folder, part, f))
        name = "model" if part.startswith("text") else "diffusion_pytorch_model"
        save_file(contiguous(own_state(model), dtype), os.path.join(folder, part, name + ".safetensors"))
    return folder


def own_state(model):
    """T5's table stands twice in its state."""
    return {k: v for k, v in model.state_dict().items() if k != "encoder.embed_tokens.weight"}


def write_tokenizers(pipe, folder):
    for name in "tokenizer", "tokenizer_2", "tokenizer_3":
        if hasattr(pipe, name):
            getattr(pipe, name).save_pretrained(os.path.join(folder, name))


def write_single_files(pipe, folder, transformer, dtype=torch.float32, t5=None):
    """BFL's and ComfyUI's files beside each other; t5: (name, tensors)."""
    os.makedirs(folder, exist_ok=True)
    write_tokenizers(pipe, folder)
    levels = len(pipe.vae.config.block_out_channels)
    save_file(contiguous(transformer), os.path.join(folder, "flux1-dev.safetensors"))
    save_file(contiguous(to_ldm(pipe.vae.state_dict(), levels), dtype), os.path.join(folder, "ae.safetensors"))
    save_file(contiguous(own_state(pipe.text_encoder), dtype), os.path.join(folder, "clip_l.safetensors"))
    name, tensors = t5 or ("t5xxl_fp16", contiguous(own_state(pipe.text_encoder_2), dtype))
    save_file(contiguous(tensors), os.path.join(folder, name + ".safetensors"))
    return folder


def write_all_in_one(pipe, folder, transformer, dtype=torch.float32):
    os.makedirs(folder, exist_ok=True)
    write_tokenizers(pipe, folder)
    levels = len(pipe.vae.config.block_out_channels)
    parts = {"model.diffusion_model.": transformer, "vae.": to_ldm(pipe.vae.state_dict(), levels),
             "text_encoders.clip_l.transformer.": own_state(pipe.text_encoder), "text_encoders.t5xxl.transformer.": own_state(pipe.text_encoder_2)}
    path = os.path.join(folder, "flux1-dev-all.safetensors")
    save_file({prefix + k: v.clone().contiguous() for prefix, part in parts.items() for k, v in contiguous(part, dtype).items()}, path)
    return path


def write_sd3_file(pipe, folder, texts, dtype=torch.float32, transformer=None):
    """Stability's file of transformer (or these tensors) and autoencoder; texts: with the encoders in it, else as ComfyUI's files beside it.
    CLIP-L has a projection there, which nobody applies; its and bigG's names are transformers'."""
    os.makedirs(folder, exist_ok=True)
    write_tokenizers(pipe, folder)
    clip = own_state(pipe.text_encoder)
    clip["text_projection.weight"] = torch.randn_like(clip["text_projection.weight"])
    encoders = {"clip_l": clip, "clip_g": own_state(pipe.text_encoder_2), "t5xxl": own_state(pipe.text_encoder_3)}
    parts = {"model.diffusion_model.": transformer or contiguous(to_stability(pipe.transformer.state_dict()), dtype),
             "first_stage_model.": to_ldm(pipe.vae.state_dict(), len(pipe.vae.config.block_out_channels))}
    if texts:
        parts.update({f"text_encoders.{name}.transformer.": part for name, part in encoders.items()})
    path = os.path.join(folder, "sd3.5_all.safetensors" if texts else "sd3.5.safetensors")
    save_file({prefix + k: v for prefix, part in parts.items()
               for k, v in contiguous(part, None if prefix.startswith("model.") else dtype).items()}, path)
    for name, part in encoders.items() if not texts else ():
        save_file(contiguous(part, dtype), os.path.join(folder, name + ("_fp16" if name == "t5xxl" else "") + ".safetensors"))
    return path if texts else folder


def write_all(name, folder):
    pipe = pipeline(name)
    shutil.rmtree(folder, ignore_errors=True)
    sd = pipe.transformer.state_dict()
    bfl = to_bfl(sd)
    write_diffusers(pipe, os.path.join(folder, "sharded"), shard="200KB" if name != "wide" else "600MB")
    write_diffusers(pipe, os.path.join(folder, "single"))
    write_diffusers(pipe, os.path.join(folder, "bf16"), torch.bfloat16)
    write_diffusers(pipe, os.path.join(folder, "f16"), torch.float16)
    write_single_files(pipe, os.path.join(folder, "bfl"), bfl)
    for convention in None, "scale_weight", "weight_scale":
        t5 = ("t5xxl_fp8_e4m3fn" + ("_scaled" if convention else ""), to_fp8(own_state(pipe.text_encoder_2), convention)[0])
        write_single_files(pipe, os.path.join(folder, f"fp8-{convention}"), to_fp8(bfl, convention)[0], t5=t5)
    write_all_in_one(pipe, os.path.join(folder, "all-in-one"), bfl)
    loras = os.path.join(folder, "loras")
    os.makedirs(loras)
    for dialect in "peft", "bare", "model", "old", "onetrainer":
        save_file(lora_file(lora_factors(sd, 4, 7), dialect), os.path.join(loras, dialect + ".safetensors"))
    save_file(lora_file(xlabs_factors(sd, 6, 9), "xlabs"), os.path.join(loras, "xlabs.safetensors"))
    for dialect in "kohya", "comfy", "comfy-down":
        save_file(lora_file(bfl_factors(sd, 5, 8), dialect, alpha=3), os.path.join(loras, dialect + ".safetensors"))


if __name__ == "__main__":
    for which in sys.argv[2:] or ["tiny", "schnell"]:
        write_all(which, os.path.join(sys.argv[1], which))
        print(json.dumps({which: sorted(os.listdir(os.path.join(sys.argv[1], which)))}))
