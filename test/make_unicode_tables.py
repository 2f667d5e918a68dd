"""Prints the packed Unicode tables of shortcut.h's tokenizers.

Hugging Face's `tokenizers` mixes several versions of Unicode (in 0.22.2: letters of 16.0, lower
case of 17.0, normalisation of 9.0), so the facts are read off the library itself, code point by
code point. The names of the classes are those of the enum in shortcut.h.
"""
import struct
import unicodedata

import tokenizers
from tokenizers import Regex, normalizers

CODES = [c for c in range(1, 0x110000) if not 0xD800 <= c < 0xE000]
LETTER, NUMBER, EXTEND, SPACING, CONTROL, PREPEND, PICTURE, CONSONANT, LINKER = (
    1 << i for i in range(9))


# ---- Asking the library ----

def precompiled(key):
    """T5's normaliser with the one rule key -> "Z". A whole grapheme of less than 6 bytes that
    begins with key becomes "Z"; of longer ones, only the code points equal to key do."""
    data, units, base = key.encode(), [0] * 0x600, 0
    for i, byte in enumerate(data):
        place, base = base ^ byte, 0x100 * (i + 1)
        units[place] = byte | (place ^ base) << 10 | (i == len(data) - 1) << 8
    units[base] = 1 << 31
    packed = struct.pack(f"<{1 + len(units)}I", 4 * len(units), *units)
    return normalizers.Precompiled(packed + b"Z\0").normalize_str


def read_kinds():
    """{code point: flags} for the split into words, and for graphemes (UAX 29)."""
    kind = dict.fromkeys(CODES, 0)
    for flag, pattern in (LETTER, r"\p{L}"), (NUMBER, r"\p{N}"):
        replace = normalizers.Replace(Regex(pattern), "")
        for c in CODES:
            if not replace.normalize_str(chr(c)):
                kind[c] |= flag
    a, trademark, qa = precompiled("a"), precompiled("\u2122"), precompiled("\u0958")
    for c in CODES:
        s = chr(c)
        if a("a" + s) == "Z":        # joins what is before it; U+2122 after a joiner tells how
            extends = trademark("\xa9" + s + "\u200d\u2122\u0301").endswith("Z\u0301")
            kind[c] |= EXTEND if extends else SPACING
        elif precompiled(s)(s + ("\u0301" if len(s.encode()) < 4 else "")) != "Z":
            kind[c] |= CONTROL
        if trademark(s + "\u200d\u2122\u0301").endswith("Z\u0301"):
            kind[c] |= PICTURE
        if qa(s + "\u094d\u0958\u0301").endswith("Z\u0301"):
            kind[c] |= CONSONANT
        if qa("\u0915" + s + "\u0958\u0301").endswith("Z\u0301"):
            kind[c] |= LINKER
        if unicodedata.category(s) in ("Cf", "Lo", "Cn", "Mc") and not kind[c] & (EXTEND | CONTROL):
            if precompiled(s)(s + "a") == "Z":
                kind[c] |= PREPEND
    return kind


def read_lower():
    """{code point: distance to its lower case}; U+0130 alone becomes two code points."""
    lower = normalizers.Lowercase().normalize_str
    return {c: ord(lower(chr(c))) - c for c in CODES
            if len(lower(chr(c))) == 1 and lower(chr(c)) != chr(c)}


def read_classes():
    """{code point: combining class}; the library moves those it knows before U+0345, the last."""
    nfd = normalizers.NFD().normalize_str
    return {c: unicodedata.combining(chr(c)) for c in CODES if unicodedata.combining(chr(c))
            and (c == 0x345 or nfd("\u0345" + chr(c)) != "\u0345" + chr(c))}


def read_pairs():
    """Canonical decompositions, less Hangul's: (code point, kind, first, second); kind 0: into one
    code point, 1: into two, 2: into two that NFC composes again."""
    nfd, nfc = normalizers.NFD().normalize_str, normalizers.NFC().normalize_str
    pairs = []
    for c in CODES:
        if nfd(chr(c)) == chr(c) or 0xAC00 <= c <= 0xD7A3:
            continue
        parts = [int(x, 16) for x in unicodedata.decomposition(chr(c)).split()]
        text = "".join(map(chr, parts))
        assert nfd(chr(c)) == nfd(text)
        pairs.append((c, len(parts) - 1 + (len(parts) == 2 and nfc(text) == chr(c)),
                      *parts, *[0] * (2 - len(parts))))
    return pairs


# ---- Packing ----

class Packer:
    """What sc__unpack reads: range and seen are the same here and there."""

    def __init__(self):
        self.low, self.range, self.digits, self.seen = 0, 1, 0, {}

    def bit(self, bit, context):
        seen = self.seen.setdefault((context * 0x9E3779B1 & 0xFFFFFFFF) >> 14, [0, 0])
        while self.range < 1 << 25:
            self.range, self.low, self.digits = self.range * 92, self.low * 92, self.digits + 1
        zeros = self.range // (2 * sum(seen) + 2) * (2 * seen[0] + 1)
        self.low += zeros * bit
        self.range = self.range - zeros if bit else zeros
        seen[bit] += 1
        if seen[bit] == 24:
            seen[:] = seen[0] // 2, seen[1] // 2

    def number(self, n, context):
        n = 2 * n + 1 if n >= 0 else -2 * n
        context = context * 0x85EBCA6B
        bits = n.bit_length() - 1
        for i in range(bits):
            self.bit(1, context + i)
        self.bit(0, context + bits)
        for i in range(bits, 0, -1):
            self.bit(n >> i - 1 & 1, context + 32 * (n >> i) + i)

    def show(self, name):
        alphabet = [chr(c) for c in range(32, 127) if chr(c) not in '"?\\']
        text = ""
        for _ in range(self.digits):
            self.low, digit = divmod(self.low, 92)
            text = alphabet[digit] + text
        print(f"static const char {name}[] =")
        for i in range(0, len(text), 94):
            print(f'    "{text[i:i + 94]}"' + ";" * (i + 94 >= len(text)))


def pack_facts(facts):
    """Runs of code points with the same facts: these, and the length - 1."""
    packer, before, c = Packer(), (0, 0, 0), 0
    while c < 0x110000:
        row, end, context = facts[c], c, 0
        while end < 0x110000 and facts[end] == row:
            end += 1
        for i in range(3):
            packer.number(row[i], 4 * (context + before[i]) + i)
            context = 1009 * (context + row[i])
        packer.number(end - c - 1, 4 * context + 3)
        before, c = row, end
    return packer


def pack_pairs(pairs):
    """The code point, less the one before; kind; first, less the one before of this kind; second,
    less the one before, where there is one."""
    packer, code, kind, first, second = Packer(), 0, 0, [0, 0, 0], 0
    for pair in pairs:
        packer.number(pair[0] - code, kind)
        packer.number(pair[1], 3 + kind)
        code, kind = pair[:2]
        step = pair[2] - first[kind]
        packer.number(step, 6 + kind)
        first[kind] = pair[2]
        if kind:
            packer.number(pair[3] - second, 9 + kind + 100 * step)
            second = pair[3]
    packer.number(0x110000 - code, kind)                    # the end
    return packer


if __name__ == "__main__":
    print(f"/* Packed by test/make_unicode_tables.py, as tokenizers {tokenizers.__version__}"
          " has them. */")
    kinds, classes, lower = read_kinds(), read_classes(), read_lower()
    pack_facts([(kinds.get(c, 0), classes.get(c, 0), lower.get(c, 0))
                for c in range(0x110000)]).show("sc__facts_text")
    pack_pairs(read_pairs()).show("sc__pairs_text")
