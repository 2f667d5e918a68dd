#!/usr/bin/env python3
"""Writes tokens.safetensors: awkward texts, and for each the hash of the ids that Hugging Face's
CLIPTokenizerFast and T5TokenizerFast give it; test_pipeline.c compares. To be run again when the
tokenizers of data/tiny-flux change.

    python make_tokens.py FLUX.1-DEV-FOLDER

Versions: transformers 4.57.1, tokenizers 0.22.2. Where test_pipeline.c finds a difference,
test/compare_tokenizers.py shows the ids.
"""
import os
import sys

import numpy
from safetensors.numpy import save_file
from transformers import CLIPTokenizerFast, T5TokenizerFast

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from awkward_texts import texts  # noqa: E402

LONG = 2048


def hashes(tokenizer, data):
    """FNV-1a of the 32-bit ids at both lengths, for each text."""
    h = numpy.full(len(data), 0xcbf29ce484222325, dtype=numpy.uint64)
    for length in (tokenizer.model_max_length, LONG):
        ids = tokenizer(data, padding="max_length", max_length=length, truncation=True).input_ids
        for column in numpy.array(ids, dtype=numpy.uint64).T:
            h = (h ^ column) * numpy.uint64(0x100000001b3)
    return h.view(numpy.int64)


def main(flux):
    data = [s[:3000] for s in texts(1500)]
    text = [s.decode("utf-8", errors="replace") for s in data]
    out = dict(texts=numpy.frombuffer(b"".join(s + b"\0" for s in data), dtype=numpy.uint8))
    for name, folder in ("tiny", os.path.join(HERE, "../../data/tiny-flux")), ("flux", flux):
        for part, kind in ("tokenizer", CLIPTokenizerFast), ("tokenizer_2", T5TokenizerFast):
            tokenizer = kind.from_pretrained(os.path.join(folder, part))
            out[f"{name}.{part}"] = hashes(tokenizer, text)
            print(name, part, tokenizer.model_max_length, len(text), "texts")
    save_file(out, os.path.join(HERE, "tokens.safetensors"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]) if len(sys.argv) == 2 else __doc__)
