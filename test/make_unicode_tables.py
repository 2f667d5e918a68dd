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
    word, kind = dict.fromkeys(CODES, 0), dict.fromkeys(CODES, 0)
    for flag, pattern in (LETTER, r"\p{L}"), (NUMBER, r"\p{N}"):
        replace = normalizers.Replace(Regex(pattern), "")
        for c in CODES:
            if not replace.normalize_str(chr(c)):
                word[c] |= flag
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
    return word, kind


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
    """Canonical decompositions, less Hangul's: pairs (code point, first, second) that NFC composes
    again, pairs that it does not, and single code points for others."""
    nfd, nfc = normalizers.NFD().normalize_str, normalizers.NFC().normalize_str
    composed, split, replaced = [], [], []
    for c in CODES:
        if nfd(chr(c)) == chr(c) or 0xAC00 <= c <= 0xD7A3:
            continue
        parts = [int(x, 16) for x in unicodedata.decomposition(chr(c)).split()]
        text = "".join(map(chr, parts))
        assert nfd(chr(c)) == nfd(text)
        kind = replaced if len(parts) == 1 else composed if nfc(text) == chr(c) else split
        kind.append((c, *parts))
    return composed, split, replaced


# ---- Packing ----

def pack(numbers):
    """Digits of base 21, offset by 70, and a last one of base 70; printed from "#" on without '\\'."""
    text = ""
    for n in numbers:
        digits = [n % 70]
        n //= 70
        while n:
            n, digit = divmod(n, 21)
            digits.append(70 + digit)
        text += "".join(chr(d + 35 + (d + 35 >= 92)) for d in reversed(digits))
    return text


def zigzag(n):
    return 2 * n if n >= 0 else -2 * n - 1


def runs(values):
    """{code point: value} -> gap, 2 * (count - 1) + (1 if every other code point), value, ..."""
    codes, result, end, i = sorted(c for c in values if values[c]), [], 0, 0
    while i < len(codes):
        c = codes[i]
        stride = 2 if values.get(c + 2) == values[c] and not values.get(c + 1) else 1
        n = 1
        while (values.get(c + n * stride) == values[c]
               and (stride == 1 or not values.get(c + n * stride - 1))):
            n += 1
        result += [c - end, 2 * (n - 1) + stride - 1, zigzag(values[c])]
        i, end = i + n, c + (n - 1) * stride
    return result


def differences(rows):
    """Each number less the one above it."""
    above = [[0] * len(row) for row in rows[:1]] + rows
    return [zigzag(x - y) for row, before in zip(rows, above) for x, y in zip(row, before)]


def show(name, numbers):
    text = pack(numbers)
    print(f"static const char {name}[] =")
    for i in range(0, len(text), 92):                       # '??' would begin a trigraph
        print('    "' + text[i:i + 92].replace("??", '?""?')
              + ('"' if i + 92 < len(text) else '";'))


if __name__ == "__main__":
    print(f"/* Packed by test/make_unicode_tables.py, as tokenizers {tokenizers.__version__}"
          " has them. */")
    for table, values in zip(("sc__word_table", "sc__grapheme_table"), read_kinds()):
        show(table, runs(values))
    show("sc__lower_table", runs(read_lower()))
    show("sc__class_table", runs(read_classes()))
    for table, rows in zip(("sc__composed_table", "sc__split_table", "sc__replaced_table"),
                           read_pairs()):
        show(table, differences(rows))
