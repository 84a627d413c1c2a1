"""How text is split into words before merging, by the name that a GGUF file gives under `tokenizer.ggml.pre`.

The rules are those of the models' own `tokenizer.json`. Which name means which rule, and what else goes with a name, is
what llama.cpp reads (`llama-vocab.cpp` there). Names of models that this library could not run anyway are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tokenizers import Regex, pre_tokenizers

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_OTHERS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_OTHERS}"
_QWEN2 = rf"{_WORDS}|\p{{N}}|{_OTHERS}"
# GPT-2's rule. The last character of a run of spaces is left over, and so is a word of its own.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
# Words with small letters behind capital ones: as in "HTTPServer", which is "HTTPS", "erver" to no other rule.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*",
)
_SIGNS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
# The letters with two cases that DeepSeek LLM lists.
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼ"
    "ιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ"
    "𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_DEEPSEEK_CJK = "[一-龥ࠀ-一가-퟿]+"
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_NO_STOPS = r" ?[^(\s|.,!?…。，、।۔،)]+"


def _split(*patterns: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    """Splits by one pattern after the other; what none of them matches is a word, too."""

    def make() -> pre_tokenizers.PreTokenizer:
        splits = [pre_tokenizers.Split(Regex(each), behavior="isolated") for each in patterns]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([*splits, to_bytes])

    return make


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_then_gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


@dataclasses.dataclass(frozen=True)
class WordRule:
    """What a name says.

    Attributes:
        split: makes the pre-tokenizer, whose words are in the alphabet of bytes.
        takes_whole_words: a word that is a token is taken even where no merges lead to it.
        adds_bos: a text begins with BOS, unless the file says otherwise.
        composes: characters are composed (NFC) first.
    """

    split: Callable[[], pre_tokenizers.PreTokenizer]
    takes_whole_words: bool = False
    adds_bos: bool = False
    composes: bool = False


def _named(names: str, rule: WordRule) -> dict[str, WordRule]:
    return dict.fromkeys(names.split(), rule)


WORD_RULES: dict[str, WordRule] = {
    **_named(
        "gpt-2 phi-2 mpt olmo jais gigachat a.x-4.0 mellum trillion exaone4 granite-docling",
        WordRule(_gpt2),
    ),
    **_named(
        "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
        WordRule(_digits_then_gpt2),
    ),
    **_named("qwen2", WordRule(_split(_QWEN2), composes=True)),
    **_named(
        "deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan grok-2 solar-open",
        WordRule(_split(_QWEN2)),
    ),
    **_named(
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        WordRule(_split(_LLAMA3), takes_whole_words=True, adds_bos=True),
    ),
    **_named("dbrx smaug-bpe glm4 chatglm-bpe", WordRule(_split(_LLAMA3))),
    "deepseek-llm": WordRule(
        _split(
            r"[\r\n]",
            rf"\s?[{_DEEPSEEK_LETTERS}]+",
            r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+".replace(r"\u3000", "\u3000"),
            r"\s+$",
            _DEEPSEEK_CJK,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": WordRule(
        _split(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}")
    ),
    "deepseek-v3": WordRule(_split(r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK_V3)),
    "tekken": WordRule(
        _split(rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SIGNS}"), takes_whole_words=True, adds_bos=True
    ),
    **_named(
        "gpt-4o llama4 kanana2",
        WordRule(
            _split(
                rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_SIGNS}"
            )
        ),
    ),
    "seed-coder": WordRule(_split(rf"{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}")),
    "poro-chat": WordRule(_split(_NO_STOPS)),
    "viking": WordRule(_split(_NO_STOPS, r"\p{N}")),
    "falcon": WordRule(_split(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "default": WordRule(_split(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
"""The rules by all names under which they are known."""
