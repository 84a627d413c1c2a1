"""Texts that tokenizers find hard."""

from __future__ import annotations

TEXTS = (
    "",
    " ",
    "Hello, world!",
    "I'm sure they've seen it; she'd say we'll go, DON'T you?",
    "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n",
    "\tfor (int i = 0; i < 10; ++i) {\r\n\t\tsum += a[i];\r\n\t}\n\n\n",
    "3.14159 and 1,000,000 and 0xDEADBEEF and 2024-11-22T01:02:03Z",
    "Ünïcödé: naïve café, Straße, Ζεύς, Привет, мир!",
    "日本語のテキストと中文文本。한국어 문장도 있습니다。",
    "مرحبا بالعالم — שלום עולם",
    "हिन्दी में एक वाक्य और தமிழ்",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🤖 … “quotes” ‘single’ – dash",
    "non\u00a0breaking\u2003em space\u200bzero width",
    "many      spaces   and\n\n   newlines \n \n end   ",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "a<|endoftext|>b <|endoftext|> c<|im_end|><|im_end|>",
    "<|not_special|> <|im_start <s></s> [INST] x [/INST]",
    "https://example.org/a?b=c&d=%20#e user@example.com C:\\path\\file.txt",
    "SELECT * FROM t WHERE x <> 'y' AND z >= 1;",
    "$\\int_0^\\infty e^{-x^2}\\,dx = \\frac{\\sqrt{\\pi}}{2}$",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "!!!???...,,,;;;:::---___===+++***///\\\\\\|||",
    "CamelCaseAndsnake_case_and-kebab-case123abc456",
    "ﬁligature ½ ² ™ ℌ ⅷ",
    "x = {'a': [1, 2, {'b': None}]}  # comment\n@decorator\nclass A(B): ...",
)
