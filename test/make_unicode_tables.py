"""Prints the Unicode tables of shortcut.h's tokenizers: classes and lower case as gap-coded runs."""
import sys
import unicodedata


def runs(test):
    """[gap, length, gap, length, ...] of the code points for which test holds."""
    result, end, start = [], 0, None
    for c in range(0x110000 + 1):
        inside = c <= 0x10FFFF and test(chr(c))
        if inside and start is None:
            start = c
        if not inside and start is not None:
            result += [start - end, c - start]
            start, end = None, c
    return result


def lower_runs():
    """[gap, length, stride, delta, ...]: code points start, start + stride, ... go to + delta."""
    pairs = [(c, ord(chr(c).lower()) - c) for c in range(128, 0x110000)
             if len(chr(c).lower()) == 1 and chr(c).lower() != chr(c)]
    result, end, i = [], 0, 0
    while i < len(pairs):
        start, delta = pairs[i]
        stride = 2 if i + 1 < len(pairs) and pairs[i + 1] == (start + 2, delta) else 1
        n = 1
        while i + n < len(pairs) and pairs[i + n] == (start + n * stride, delta):
            n += 1
        result += [start - end, n, stride, delta]
        end, i = start, i + n
    return result


def show(kind, name, numbers):
    print(f"static const {kind} {name}[] = {{")
    line = "   "
    for number in numbers:
        if len(line) + len(str(number)) + 2 > 99:
            print(line)
            line = "   "
        line += f" {number},"
    print(line + "\n};")


print(f"/* Unicode {unicodedata.unidata_version}, made by test/make_unicode_tables.py. */", file=sys.stdout)
show("uint32_t", "sc__letters", runs(lambda c: unicodedata.category(c).startswith("L")))
show("uint32_t", "sc__numbers_table", runs(lambda c: unicodedata.category(c).startswith("N")))
show("int32_t", "sc__lower", lower_runs())
