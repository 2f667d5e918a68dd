"""Compares the ids of shortcut.h's tokenizers with Hugging Face's.

    compare_tokenizers.py FOLDER [COUNT]     FOLDER/tokenizer, tokenizer_2 and, of SD3.5, tokenizer_3
"""
import os
import subprocess
import sys
import tempfile

import tokenizers
import transformers
from transformers import CLIPTokenizerFast, T5TokenizerFast

from awkward_texts import texts

HERE = os.path.dirname(os.path.abspath(__file__))


def ours(program, folder, data, length):
    run = subprocess.run([program, folder, str(length)], input=b"".join(s + b"\0" for s in data),
                         stdout=subprocess.PIPE, check=True)
    return [[int(x) for x in line.split()] for line in run.stdout.splitlines()]


def theirs(tokenizer, data, length):
    data = [s.decode("utf-8", errors="replace") for s in data]
    return tokenizer(data, padding="max_length", max_length=length, truncation=True).input_ids


def compare(data, a, b):
    """How many of the texts have other ids; shows the first of them."""
    assert len(a) == len(b) == len(data)
    wrong = [i for i in range(len(data)) if a[i] != b[i]]
    for i in wrong[:1]:
        end = next(k for k, (x, y) in enumerate(zip(a[i], b[i])) if x != y)
        print(f"  {data[i][:200]!r}\n    ours   {a[i][:end + 6]}\n    theirs {b[i][:end + 6]}")
    return len(wrong)


def main(folder, count):
    data, failed = texts(count), 0
    print(f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}")
    with tempfile.TemporaryDirectory() as temporary:
        program = os.path.join(temporary, "tokenize")
        subprocess.run([os.environ.get("CC", "cc"), "-std=c99", "-O2", "-w", os.path.join(HERE, "tokenize.c"),
                        "-o", program, "-lm"], check=True)
        for name in "tokenizer", "tokenizer_2", "tokenizer_3":
            part = os.path.join(folder, name)
            if not os.path.exists(part):
                continue
            kind = CLIPTokenizerFast if os.path.exists(os.path.join(part, "merges.txt")) else T5TokenizerFast
            tokenizer = kind.from_pretrained(part)
            for length in (tokenizer.model_max_length, 4096):
                wrong = 0
                for first in range(0, len(data), 1000):  # 4,096 ids each: within little memory
                    some = data[first:first + 1000]
                    wrong += compare(some, ours(program, part, some, length), theirs(tokenizer, some, length))
                failed += wrong
                print(f"{name}, {kind.__name__}, {length} tokens: {len(data)} texts, {wrong} differ")
    return failed > 0


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) == 3 else 12000))
