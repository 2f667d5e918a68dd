#!/usr/bin/env python3
"""Writes a FLUX pipeline folder in diffusers' layout with small numbers in its configs: both
tokenizers, both text encoders, the scheduler, and the transformer's config.

    make_tiny_flux.py [--out tiny-flux] [--seed 1]

The VAE comes from train_vae.py, the transformer's weights from `train --pretrain`.

The text encoders are not trained: at this size a fixed random code for each word does as well,
if it is chosen with care. Words lie in all directions but RESERVED ones; articles and the begin,
end and pad tokens lie in the reserved ones, and no value projection reads these. So what the
attention layers mix is words only, captions get clearly different pooled vectors, and the pads
(FLUX gives T5 no attention mask) carry the caption's words instead of diluting them.
"""
import argparse
import collections
import json
import os
import re

import sentencepiece
import torch
from transformers import (CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel,
                          T5TokenizerFast)
from transformers.models.clip.tokenization_clip import bytes_to_unicode

from make_emoji import emoji_names, load_concepts

HERE = os.path.dirname(os.path.abspath(__file__))
RESERVED = 4              # dimensions of function tokens
CLIP_VOCAB, CLIP_LENGTH = 1000, 32
T5_VOCAB, T5_LENGTH = 1000, 16
FUNCTION_WORDS = ("a", "an", "the", "of", "with", "and")

CLIP = dict(
    architectures=["CLIPTextModel"], attention_dropout=0.0, bos_token_id=0, dropout=0.0,
    eos_token_id=2,       # as FLUX's: it makes transformers pool at the highest id's first place
    hidden_act="quick_gelu", hidden_size=64, initializer_factor=1.0, initializer_range=0.02,
    intermediate_size=256, layer_norm_eps=1e-5, max_position_embeddings=CLIP_LENGTH,
    model_type="clip_text_model", num_attention_heads=2, num_hidden_layers=2, pad_token_id=1,
    projection_dim=64, torch_dtype="bfloat16", vocab_size=CLIP_VOCAB)
T5 = dict(
    architectures=["T5EncoderModel"], d_ff=256, d_kv=32, d_model=128, decoder_start_token_id=0,
    dense_act_fn="gelu_pytorch_tanh", dropout_rate=0.1, eos_token_id=1, initializer_factor=1.0,
    is_encoder_decoder=True, is_gated_act=True, layer_norm_epsilon=1e-6, model_type="t5",
    num_decoder_layers=2, num_heads=4, num_layers=2, output_past=True, pad_token_id=0,
    relative_attention_max_distance=128, relative_attention_num_buckets=32,
    tie_word_embeddings=False, torch_dtype="bfloat16", vocab_size=T5_VOCAB)
TRANSFORMER = dict(
    _class_name="FluxTransformer2DModel", _diffusers_version="0.30.0.dev0",
    attention_head_dim=32, axes_dims_rope=[8, 12, 12], guidance_embeds=True, in_channels=64,
    joint_attention_dim=T5["d_model"], num_attention_heads=6, num_layers=2, num_single_layers=3,
    patch_size=1, pooled_projection_dim=CLIP["hidden_size"])
SCHEDULER = dict(
    _class_name="FlowMatchEulerDiscreteScheduler", _diffusers_version="0.30.0.dev0",
    base_image_seq_len=256, base_shift=0.5, max_image_seq_len=4096, max_shift=1.15,
    num_train_timesteps=1000, shift=4.0, use_dynamic_shifting=False)
INDEX = dict(
    _class_name="FluxPipeline", _diffusers_version="0.30.0.dev0",
    scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"],
    text_encoder=["transformers", "CLIPTextModel"],
    text_encoder_2=["transformers", "T5EncoderModel"],
    tokenizer=["transformers", "CLIPTokenizer"], tokenizer_2=["transformers", "T5TokenizerFast"],
    transformer=["diffusers", "FluxTransformer2DModel"], vae=["diffusers", "AutoencoderKL"])


def write_json(value, *path):
    path = os.path.join(*path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as f:
        f.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


# ---- tokenizers -------------------------------------------------------------------------------

def captions():
    """The words that must become single tokens, as texts."""
    return [text for _, caption, coarse in load_concepts() for text in (caption, coarse)]


def other_names():
    """Names of all emoji without skin tones: how a little of the rest of English is spelt."""
    return sorted({n.lower() for n in emoji_names().values()
                   if "skin tone" not in n and "flag" not in n})


def learn_merges(words, count):
    """Byte pair encoding: {word: weight} -> list of `count` pairs. Ties go to the smaller pair."""
    to_char = bytes_to_unicode()
    split = {}
    for word, weight in words.items():
        chars = [to_char[b] for b in word.encode()]
        split[tuple(chars[:-1] + [chars[-1] + "</w>"])] = weight
    merges = []
    while len(merges) < count:
        pairs = collections.Counter()
        for word, weight in split.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += weight
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(best)
        merged = {}
        for word, weight in split.items():
            out, i = [], 0
            while i < len(word):
                if word[i:i + 2] == best:
                    out.append(word[i] + word[i + 1])
                    i += 2
                else:
                    out.append(word[i])
                    i += 1
            merged[tuple(out)] = weight
        split = merged
    return merges


def make_clip_tokenizer(out):
    words = collections.Counter()
    for name in other_names():
        words.update(re.findall(r"[a-z]+", name))
    for word in FUNCTION_WORDS:
        words[word] += 10_000
    for text in captions():
        for word in text.split():
            words[word] += 10_000
    symbols = list(bytes_to_unicode().values())
    special = ["<|startoftext|>", "<|endoftext|>"]
    merges = learn_merges(words, CLIP_VOCAB - 2 * len(symbols) - len(special))
    tokens = symbols + [s + "</w>" for s in symbols] + ["".join(m) for m in merges] + special
    folder = os.path.join(out, "tokenizer")
    os.makedirs(folder, exist_ok=True)
    vocab, rules = os.path.join(folder, "vocab.json"), os.path.join(folder, "merges.txt")
    with open(vocab, "w", encoding="utf-8") as f:
        json.dump({t: i for i, t in enumerate(tokens)}, f, ensure_ascii=False)
    with open(rules, "w", encoding="utf-8") as f:
        f.write("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    tokenizer = CLIPTokenizer(vocab, rules, model_max_length=CLIP_LENGTH,
                              clean_up_tokenization_spaces=True, do_lower_case=True)
    tokenizer.save_pretrained(folder)
    assert len(tokenizer) == CLIP_VOCAB and tokenizer.eos_token_id == CLIP_VOCAB - 1
    return tokenizer


def make_t5_tokenizer(out):
    folder = os.path.join(out, "tokenizer_2")
    os.makedirs(folder, exist_ok=True)
    # sentencepiece counts each distinct word once when it gathers candidate pieces and drops what
    # it sees once, so every word also comes with a comma and a full stop.
    texts = captions() * 40 + [w for w in FUNCTION_WORDS for _ in range(40)] + other_names()
    texts += [t[0].upper() + t[1:] for t in captions()] * 4
    texts += [chr(c) for c in range(33, 127)]                  # no letter or sign is unknown
    texts = [re.sub(r"(?<=\w)(?= |$)", end, t) for t in texts for end in ("", ",", ".")]
    # From an iterator to a writer: the model then holds no file names.
    with open(os.path.join(folder, "spiece.model"), "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=f, model_type="unigram",
            vocab_size=T5_VOCAB, character_coverage=1.0, byte_fallback=False,
            normalization_rule_name="nmt_nfkc", pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
            pad_piece="<pad>", eos_piece="</s>", unk_piece="<unk>",
            num_threads=1, minloglevel=2)
    tokenizer = T5TokenizerFast(os.path.join(folder, "spiece.model"), extra_ids=0, legacy=False,
                                add_prefix_space=True, model_max_length=T5_LENGTH,
                                clean_up_tokenization_spaces=True)
    tokenizer.save_pretrained(folder)
    # Left in the config, this key would make transformers build tokenizer.json anew at each load.
    path = os.path.join(folder, "tokenizer_config.json")
    with open(path, encoding="utf-8") as f:
        write_json({k: v for k, v in json.load(f).items() if k != "add_prefix_space"}, path)
    assert len(tokenizer) == T5_VOCAB
    return tokenizer


# ---- text encoders ----------------------------------------------------------------------------

def word_code(vocab, dim, function_ids, generator):
    """[vocab, dim] codes: words outside the reserved dimensions, function tokens inside. All have
    about the same length, so that what the layers add to function tokens stays small in them."""
    code = torch.randn(vocab, dim, generator=generator)
    code[:, :RESERVED] = 0.0
    for i in function_ids:
        code[i] = 0.0
        direction = torch.randn(RESERVED, generator=generator)
        code[i, :RESERVED] = direction / direction.norm() * dim ** 0.5
    return code


def orthogonal(rows, cols, gain, generator):
    """Random matrix with orthogonal rows or columns; keeps lengths (times gain) if square."""
    q, r = torch.linalg.qr(torch.randn(max(rows, cols), min(rows, cols), generator=generator))
    q = q * r.diagonal().sign()
    return gain * (q if rows >= cols else q.T)


def make_clip_encoder(out, tokenizer, seed):
    g = torch.Generator().manual_seed(seed)
    model = CLIPTextModel(CLIPTextConfig(**CLIP)).eval()
    h, m = CLIP["hidden_size"], CLIP["intermediate_size"]
    function = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    function += [tokenizer.convert_tokens_to_ids(w + "</w>") for w in FUNCTION_WORDS]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        emb = model.text_model.embeddings
        emb.token_embedding.weight.copy_(word_code(CLIP_VOCAB, h, function, g))
        # The pooled state starts from the end token's code, the same for all captions: a short one.
        emb.token_embedding.weight[tokenizer.eos_token_id] *= 0.2
        emb.position_embedding.weight.copy_(0.03 * torch.randn(CLIP_LENGTH, h, generator=g))
        for layer in model.text_model.encoder.layers:
            attn = layer.self_attn
            attn.q_proj.weight.copy_(orthogonal(h, h, 0.5, g))
            attn.k_proj.weight.copy_(orthogonal(h, h, 0.5, g))
            value = orthogonal(h, h, 1.0, g)
            value[:, :RESERVED] = 0.0
            attn.v_proj.weight.copy_(value)
            attn.out_proj.weight.copy_(orthogonal(h, h, 4.0, g))
            layer.mlp.fc1.weight.copy_(orthogonal(m, h, 1.0, g))
            layer.mlp.fc2.weight.copy_(orthogonal(h, m, 0.5, g))
    save_encoder(model, CLIP, os.path.join(out, "text_encoder"))
    return model


def make_t5_encoder(out, tokenizer, seed):
    g = torch.Generator().manual_seed(seed + 1)
    model = T5EncoderModel(T5Config(**T5)).eval()
    d, kv, ff = T5["d_model"], T5["num_heads"] * T5["d_kv"], T5["d_ff"]
    function = [tokenizer.pad_token_id, tokenizer.eos_token_id]
    function += [i for i in (tokenizer.convert_tokens_to_ids("\u2581" + w)
                             for w in ("",) + FUNCTION_WORDS) if i != tokenizer.unk_token_id]
    with torch.no_grad():
        code = word_code(T5_VOCAB, d, function, g)
        for i in range(T5_VOCAB):                               # "\u2581Red" means "\u2581red"
            j = tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(i).lower())
            code[i] = code[i if j == tokenizer.unk_token_id else j]
        model.shared.weight.copy_(code)
        model.shared.weight[tokenizer.pad_token_id] *= 0.2      # the words show in the pads, too
        for i, block in enumerate(model.encoder.block):
            attn, mlp = block.layer[0].SelfAttention, block.layer[1].DenseReluDense
            # T5 does not divide the scores by sqrt(head size): q does it here.
            attn.q.weight.copy_(orthogonal(kv, d, 0.5 * T5["d_kv"] ** -0.5, g))
            attn.k.weight.copy_(orthogonal(kv, d, 0.5, g))
            value = orthogonal(kv, d, 1.0, g)
            value[:, :RESERVED] = 0.0
            attn.v.weight.copy_(value)
            attn.o.weight.copy_(orthogonal(d, kv, 1.5, g))
            if i == 0:
                bias = attn.relative_attention_bias.weight
                bias.copy_(0.3 * torch.randn(bias.shape, generator=g))
            mlp.wi_0.weight.copy_(orthogonal(ff, d, 1.0, g))
            mlp.wi_1.weight.copy_(orthogonal(ff, d, 1.0, g))
            mlp.wo.weight.copy_(orthogonal(d, ff, 0.5, g))
    save_encoder(model, T5, os.path.join(out, "text_encoder_2"))
    return model


def save_encoder(model, config, folder):
    model.to(torch.bfloat16).save_pretrained(folder)
    write_json(dict(sorted(config.items())), folder, "config.json")     # FLUX's keys, in its order
    os.chmod(os.path.join(folder, "model.safetensors"), 0o644)
    model.float()


# ---- a look at the result ---------------------------------------------------------------------

def mean_cosine(v):
    v = torch.nn.functional.normalize(v, dim=-1)
    c = v @ v.T
    off = c[~torch.eye(len(v), dtype=torch.bool)]
    return f"mean {off.mean():.3f}, largest {off.max():.3f}"


@torch.no_grad()
def report(clip_tok, t5_tok, clip, t5):
    texts = list(dict.fromkeys(captions()))
    words = sorted({w for t in texts for w in t.split()})
    for w in words:
        if len(clip_tok.tokenize(w)) != 1 or len(t5_tok.tokenize(w)) != 1:
            print(f"not one token: {w}: {clip_tok.tokenize(w)} {t5_tok.tokenize(w)}")
    ids = clip_tok(texts, padding="max_length", max_length=CLIP_LENGTH, truncation=True,
                   return_tensors="pt").input_ids
    pooled = clip(ids).pooler_output
    print(f"CLIP pooled: std {pooled.std():.3f}; cosines of {len(texts)} captions: "
          + mean_cosine(pooled))
    ids = t5_tok(texts, padding="max_length", max_length=T5_LENGTH, truncation=True,
                 return_tensors="pt").input_ids
    length = (ids != 0).sum(1)
    states = t5(ids).last_hidden_state
    last_word = states[torch.arange(len(texts)), length - 2]
    print(f"T5: std {states.std():.3f}; longest caption {length.max()} tokens; "
          f"cosines of captions' last words: {mean_cosine(last_word)}; "
          f"of their pads: {mean_cosine(states[:, -1])}")
    own = torch.cosine_similarity(last_word, t5.shared.weight[ids[torch.arange(len(texts)),
                                                                  length - 2]])
    print(f"T5: cosine of a word's state and its embedding: mean {own.mean():.3f}")
    empty = t5_tok([""], padding="max_length", max_length=T5_LENGTH, return_tensors="pt").input_ids
    print(f"T5: empty caption: std {t5(empty).last_hidden_state.std():.3f}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--out", default=os.path.join(HERE, "tiny-flux"))
    p.add_argument("--seed", type=int, default=1)
    a = p.parse_args()
    write_json(INDEX, a.out, "model_index.json")
    write_json(SCHEDULER, a.out, "scheduler", "scheduler_config.json")
    write_json(TRANSFORMER, a.out, "transformer", "config.json")
    clip_tok, t5_tok = make_clip_tokenizer(a.out), make_t5_tokenizer(a.out)
    clip = make_clip_encoder(a.out, clip_tok, a.seed)
    t5 = make_t5_encoder(a.out, t5_tok, a.seed)
    report(clip_tok, t5_tok, clip, t5)


if __name__ == "__main__":
    main()
