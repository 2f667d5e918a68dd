"""Awkward texts for the tokenizers: a list of bytes, the same at every call."""
import os
import random

SENTENCES = r"""A red apple on a wooden table.
It's 42 o'clock, they're late; we've LOST, I'd say you'll win -- 'tis Sam's!
THE QUICK BROWN FOX 'S 'T 'RE JUMPED OVER 13 lazy dogs
Falsches Üben von Xylophonmusik quält jeden größeren Zwerg. STRAẞE straße
Portez ce vieux whisky au juge blond qui fume; où est l'été? ŒUVRE Ÿ
El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia y frío. ¿Año?
Luís argüia à Júlia que «brações, fé, chá, óxido, pôr, zângão» eram palavras do português.
Pchnąć w tę łódź jeża lub ośm skrzyń fig.
Příliš žluťoučký kůň úpěl ďábelské ódy.
Árvíztűrő tükörfúrógép
Pijamalı hasta yağız şoföre çabucak güvendi. İSTANBUL IĞDIR ıi
Съешь же ещё этих мягких французских булок, да выпей чаю. ЁЛКА Й
Жебракують філософи при ґанку церкви в Гадячі, ще й шатро їхнє п'яне знаємо.
Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. ΟΔΥΣΣΕΥΣ ΣΑΣ ῾Ελλάς ᾄδω
دلفين أبيض يسبح في البحر الأزرق. لا إله؟ ١٢٣ مُحَمَّدٌ ﷺ ﷲ ﻻ
یک سیب سرخ روی میز چوبی می‌خواهم
דג סקרן שט בים מאוכזב ולפתע מצא חברה. שָׁלוֹם עֲלֵיכֶם שּׁ
लाल सेब मेज़ पर रखा है। क्षत्रिय श्रीमान् क़लम १२३ ज़
একটি লাল আপেল। ড়ঢ়য় কোথায় বাংলা
ஒரு சிவப்பு ஆப்பிள் கொடு
ఒక ఎర్ర ఆపిల్ ಕೆಂಪು ಸೇಬು ചുവന്ന ആപ്പിൾ
แอปเปิ้ลสีแดงบนโต๊ะไม้ น้ำ กำลัง ๑๒๓
ແອັບເປິ້ນສີແດງ ຫນ້າ ຳ
ပန်းသီးအနီရောင် ၁၂၃
ផ្លែប៉ោមក្រហមនៅលើតុ
ཀ་ཁ་ག་ང་ རྒྱལ་པོ་ གྷ ཱི
一个红苹果在木桌上。「你好」,世界!123 ABC
いろはにほへと ちりぬるを ガギグゲゴ ﾊﾝｶｸ ｶﾞ ゟ ヿ が か゛
빨간 사과가 나무 탁자 위에 있다. 한글 각 ᄒ
წითელი ვაშლი ᲬᲘᲗᲔᲚᲘ Կարմիր խնձոր և ﬓ
ቀይ ፖም ᎠᏂᏴᏫᏯ ꭰꮒ ᐃᓄᒃᑎᑐᑦ ᠮᠣᠩᠭᠣᠯ ⵜⴰⵎⴰⵣⵉⵖⵜ
Tiếng Việt có nhiều dấu: ắ ằ ẳ ẵ ặ ộ ợ ữ
for (int i = 0; i < n; ++i) { a[i] += b[i] * 0x1F; } // ok?
def f(x: int) -> str: return f"{x!r:>10}"  # TODO\t'"\\
<html><body class="a">&amp;&nbsp;</body></html> {"k": [1, 2.5e-3, null]}
SELECT * FROM t WHERE a='b' AND c<>3; rm -rf / && echo $HOME
https://example.com/a_b?c=d&e=%20#f  user@example.org  C:\\Users\\x
(masterpiece:1.3), best quality, [[blurry]], <lora:x:0.8>, 8k, f/1.8, 35mm
∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α ∧ ¬β = ¬(¬α ∨ β), ∑ⁿᵢ₌₁ xᵢ² ≠ ½ ㎏ ㏒ № ℡ ™ © ®
ℌ𝔢𝔩𝔩𝔬 𝕎𝕠𝕣𝕝𝕕 𝒽𝒾 ＦＵＬＬ ｗｉｄｔｈ Ⓐⓑ ①②⑳ Ⅳ ⅷ ﬁ ﬃ ﬆ ĳ Ǆǅǆ ŉ ſ ẛ
👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇩🇪🇫🇷🇯 1️⃣ ❤️ ☺︎ 🧑🏿‍🚀 🏴󠁧󠁢󠁥󠁮󠁧󠁿 👁️‍🗨️ 🫠 ⚕
zero\u200bwidth\u200djoin\u200cnon\ufeffbom\u2060word\u00adshy\u202ertl\u202c\u180e
e\u0301 a\u0308\u0304 o\u0328\u0301 o\u0301\u0328 A\u030a \u212b \u2126 q\u0307\u0323 q\u0323\u0307
\u1112\u1161\u11ab \u1100\u1161\u11a8\u11a8 \ud55c\u11ab \uac00\u11a8 \u115f \u3131\u314f \uffa1\uffc2
<pad></s><unk><extra_id_0> x <extra_id_99><extra_id_100> </S> < /s> \uff1c/s\uff1e \uff1cunk\uff1e
<|startoftext|>a<|endoftext|> b <|STARTOFTEXT|> <|EndOfText|> <|endoftext <|endoftext|>|>
\u2581lower\u2581\u2581one \u2581 \u2025 \u2026 \u00a8 \u00b4 \u02d9 \u0384 \ufe30
tabs\t\tand\r\nlines\n\n\rand\x0bother\x0cspaces\u00a0\u3000\u2003\u205f\u1680\u0085end
\x01\x02\x1b[31m\x7f\x80\x9f\ufffd\ufffe\uffff\U0010ffff\ue000\U000e0001
\u0958\u09dc\u0344\u0374\u037e\u0387\u0340\u2000\u2329\uf900\ufa2d\ufb1d\ufb4e\U0001d15e\U0002f800
\u2122\u0301 \u2460\u0301 \ufb01\u0301 \u00bd\u0301 \u2122\u200d \u00a9\u200d\u2122\u0301 \u0600\ufb01\u0301
Zalgo: Z\u0351\u036b\u0343a\u0321\u0322\u0347l\u0489g\u0334\u0335o\u031b\u0316\u0301""".splitlines()

INSERTED = [" ", "  ", "\t", "\n", "\r\n", "'", "'s", "'LL", "0", "1234", "\u00bd", "\u0301", "\u0323", "\u0327",
            "\u0345", "\u093c", "\u094d", "\u0e33", "\u200b", "\u200c", "\u200d", "\ufe0f", "\u20e3", "\u3099",
            "\u1161", "\u11a8", "\u00e9", "\u0130", "\u03a3", "\u1e9e", "\u2126", "\ufb01", "\u2122", "\u2460",
            "\uff21", "\u3000", "\u2581", "\U0001f3fd", "\U0001f468", "\U0001f1e9", "</s>", "<pad>", "<unk>",
            "<extra_id_7>", "<|startoftext|>", "<|endoftext|>", "\x01", "\x7f", "\u00ad", "\ufeff", "\ufffd", "!!!",
            "...", "_", "-", "\u0600", "\u06dd", "\u0e31", "\u302e", "\U0001d165", "\u0958", "\u2126\u0313\u0301"]
BLOCKS = [(0x20, 0x7f), (0xa0, 0x250), (0x250, 0x370), (0x370, 0x400), (0x400, 0x530), (0x530, 0x600),
          (0x600, 0x700), (0x700, 0x860), (0x860, 0x980), (0x980, 0xe00), (0xe00, 0x1000), (0x1000, 0x1200),
          (0x1200, 0x1800), (0x1800, 0x1e00), (0x1e00, 0x2000), (0x2000, 0x2100), (0x2100, 0x2800),
          (0x2c00, 0x3000), (0x3000, 0x3400), (0x4e00, 0xa000), (0xa000, 0xac00), (0xac00, 0xd7a4),
          (0xd7b0, 0xd800), (0xf900, 0xfb00), (0xfb00, 0x10000), (0x10000, 0x11000), (0x11000, 0x12000),
          (0x16000, 0x17000), (0x1d000, 0x1d800), (0x1e000, 0x1f000), (0x1f000, 0x20000), (0x2f800, 0x2fa20),
          (0xe0000, 0xe0200)]


def sentences():
    """The sentences above, with their escapes read."""
    return [s.encode("ascii", "backslashreplace").decode("unicode_escape") for s in SENTENCES]


def mixed(r, plain):
    """Words of several sentences, with something inserted now and then."""
    words = [w for s in r.sample(plain, r.randint(1, 4)) for w in r.sample(s.split(" "), 1)]
    words += r.choice(plain).split(" ")[:r.randint(0, 8)]
    text = list(" ".join(words))
    for _ in range(r.randint(0, 6)):
        text.insert(r.randint(0, len(text)), r.choice(INSERTED))
    text = "".join(text)
    return r.choice((text, text, text, text.upper(), text.title(), " " + text, text + "  "))


def soup(r):
    """Characters of a few blocks, and marks."""
    text, blocks = "", r.sample(BLOCKS, r.randint(1, 3))
    for _ in range(r.randint(1, 30)):
        text += chr(r.randrange(*r.choice(blocks)))
        if r.random() < 0.25:
            text += r.choice(INSERTED)
    return text


def damaged(r, plain):
    """UTF-8 with bytes changed, cut out or put in."""
    data = bytearray(mixed(r, plain).encode())
    for _ in range(r.randint(1, 5)):
        i = r.randint(0, len(data))
        data[i:i + r.randint(0, 2)] = bytes(r.choice((0x80, 0xbf, 0xc0, 0xc3, 0xe0, 0xe2, 0xed, 0xa0, 0xf0,
                                                      0x90, 0xf4, 0xff, r.randint(1, 255)))
                                            for _ in range(r.randint(0, 3)))
    return bytes(data)


def texts(count, seed=1):
    r = random.Random(seed)
    plain = sentences()
    result = ["", " ", "   ", "\n", "\u3000", "\u200b", "'", "''s", "</s>", " </s> ", "<|endoftext|>"] + plain
    result += [s * (5000 // len(s) + 1) for s in plain[::4]] + ["a" * 5000, "\u00e9" * 5000, "e\u0301" * 2500]
    result += [chr(c) for c in range(1, 0x2500)][::max(1, 20000 // count)]
    with open(os.__file__, encoding="utf-8") as f:                       # code
        result += [line.rstrip("\n") for line in f][:count // 10]
    result = [s.encode() for s in result]
    while len(result) < count:
        kind = r.random()
        result.append(mixed(r, plain).encode() if kind < 0.45 else soup(r).encode() if kind < 0.85
                      else damaged(r, plain))
    return [s.replace(b"\0", b"") for s in result[:count]]
