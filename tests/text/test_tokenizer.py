"""Tokenizers from GGUF files against Hugging Face's reader, chat templates, and saving."""

from __future__ import annotations

import json

import pytest
import tokenizers
import transformers
from hard_texts import TEXTS
from hf_tiny import expect_user_error, tiny_gguf_vocabulary, write_gguf
from tiny import tiny_config, tiny_params, tiny_tokenizer

from s2d_jax.formats.gguf import GGUFFile
from s2d_jax.text.pairing import check_same_tokenizer
from s2d_jax.text.tokenizer import Tokenizer

WITHOUT_DIGITS = [text for text in TEXTS if not any(c.isnumeric() for c in text)]


def huggingface_reader(path, *, split_digits: bool = False):
    """Hugging Face's GGUF reader; `split_digits` adds what it leaves out for SmolLM.

    SmolLM's own tokenizer.json splits off every digit before it looks for words, and so does llama.cpp.
    """
    fast = transformers.AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, trust_remote_code=False
    )
    if split_digits:
        backend = fast.backend_tokenizer
        digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    return fast


def assert_same_ids(ours: Tokenizer, theirs, texts=TEXTS):
    for text in texts:
        expected = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == expected, text
        decoded = theirs.decode(
            expected, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert ours.decode(expected) == decoded, text


def assert_survives_saving(tokenizer: Tokenizer, directory, texts=TEXTS):
    tokenizer.save(directory)
    reloaded = Tokenizer.from_directory(directory)
    plain = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    for text in texts:
        ids = tokenizer.encode(text)
        assert reloaded.encode(text) == plain.encode(text, add_special_tokens=False) == ids, text
        assert reloaded.decode(ids) == tokenizer.decode(ids)
    assert reloaded.stop_token_ids == tokenizer.stop_token_ids
    assert reloaded.chat_template == tokenizer.chat_template
    assert plain.chat_template == tokenizer.templates.get("default")
    assert reloaded.vocabulary() == tokenizer.vocabulary()
    check_same_tokenizer(tokenizer, reloaded)


@pytest.mark.exhaustive("tiny tokenizers of every kind are compared with Hugging Face's")
@pytest.mark.weights
def test_smollm2(smollm2_path, tmp_path):
    ours = Tokenizer.from_gguf(GGUFFile(smollm2_path))
    theirs = huggingface_reader(smollm2_path)
    assert len(WITHOUT_DIGITS) > 15
    assert_same_ids(ours, theirs, WITHOUT_DIGITS)
    assert_same_ids(ours, huggingface_reader(smollm2_path, split_digits=True))
    assert_survives_saving(ours, tmp_path)
    assert ours.stop_token_ids == (2, 0)
    messages = [{"role": "user", "content": "Hi"}]
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.render_chat(messages, add_generation_prompt=True) == expected
    assert ours.decode(ours.encode_chat(messages), skip_special_tokens=False) == expected


@pytest.mark.weights
def test_smollm2_splits_digits_before_words(smollm2_path):
    """As the model's own tokenizer.json; Hugging Face's GGUF reader leaves that split out."""
    ours = Tokenizer.from_gguf(GGUFFile(smollm2_path))
    two_spaces = ours.encode("  ")
    assert len(two_spaces) == 1
    assert ours.encode("a  7") == [*ours.encode("a"), *two_spaces, *ours.encode("7")]


@pytest.mark.weights
def test_qwen_05b(qwen_05b_path, tmp_path):
    ours = Tokenizer.from_gguf(GGUFFile(qwen_05b_path))
    assert_same_ids(ours, huggingface_reader(qwen_05b_path))
    assert_survives_saving(ours, tmp_path)
    assert ours.stop_token_ids == (151_645, 151_643)
    assert len(ours.vocabulary()) == 151_665


def byte_level_metadata(pre: str) -> dict[str, object]:
    """GGUF keys of a byte-level tokenizer trained on `TEXTS`."""
    rust = tokenizers.Tokenizer(tokenizers.models.BPE())
    rust.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    rust.train_from_iterator(TEXTS, trainer)
    model = json.loads(rust.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "ggml.model": "gpt2",
        "ggml.pre": pre,
        "ggml.tokens": tokens,
        "ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
        "ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "ggml.bos_token_id": 0,
        "ggml.eos_token_id": 2,
    }


def sentencepiece_metadata(**changes) -> dict[str, object]:
    """GGUF keys of a small SentencePiece BPE vocabulary: specials, bytes, pieces with falling scores."""
    letters = sorted(set("▁abcdefghilmnoprstuwy"))
    pieces = ["▁t", "he", "▁the", "in", "er", "▁a", "an", "▁an", "▁w", "or", "▁wor", "ld", "▁world"]
    data = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *data, *pieces, *letters]
    normal = len(pieces) + len(letters)
    return {
        "ggml.model": "llama",
        "ggml.tokens": tokens,
        "ggml.scores": [0.0] * 259 + [-float(i) for i in range(normal)],
        "ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * normal,
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
        **changes,
    }


@pytest.fixture
def gguf_with(tmp_path):
    """Writes a one-layer model with these `tokenizer.*` keys."""

    def write(metadata, family="llama"):
        tokens = metadata.get("ggml.tokens") or tiny_gguf_vocabulary()["ggml.tokens"]
        config = tiny_config(vocab_size=len(tokens), num_layers=1, family=family)
        return write_gguf(tmp_path / "m.gguf", config, tiny_params(config), tokenizer=metadata)

    return write


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_byte_level(pre, gguf_with, tmp_path):
    path = gguf_with(byte_level_metadata(pre))
    ours = Tokenizer.from_gguf(GGUFFile(path))
    assert_same_ids(ours, huggingface_reader(path, split_digits=pre == "smollm"))
    assert_survives_saving(ours, tmp_path / "saved")
    if pre != "qwen2":
        for text in TEXTS:
            assert ours.decode(ours.encode(text), skip_special_tokens=False) == text


def test_qwen2_composes_characters_first(gguf_with):
    """NFC, as in the model's own tokenizer.json; Hugging Face's GGUF reader leaves it out."""
    ours = Tokenizer.from_gguf(GGUFFile(gguf_with(byte_level_metadata("qwen2"))))
    assert ours.encode("cafe\u0301") == ours.encode("café")


def test_llama3_takes_whole_words(gguf_with):
    """A word that is a token is taken even where no merges lead to it."""
    metadata = byte_level_metadata("llama-bpe")
    metadata["ggml.tokens"] = [*metadata["ggml.tokens"], "zyx"]
    metadata["ggml.token_type"] = [*metadata["ggml.token_type"], 1]
    ours = Tokenizer.from_gguf(GGUFFile(gguf_with(metadata)))
    assert ours.encode("zyx") == [len(metadata["ggml.tokens"]) - 1]
    assert ours.encode("a", add_special_tokens=True)[0] == metadata["ggml.bos_token_id"]


def test_sentencepiece(gguf_with, tmp_path):
    path = gguf_with(sentencepiece_metadata())
    ours = Tokenizer.from_gguf(GGUFFile(path))
    texts = [
        text for text in TEXTS if text.strip() and not text[0].isspace() and "</s>" not in text
    ]
    assert_same_ids(ours, huggingface_reader(path), texts)
    assert_survives_saving(ours, tmp_path / "saved")
    tokens = sentencepiece_metadata()["ggml.tokens"]
    assert [tokens[i] for i in ours.encode("the world")] == ["▁the", "▁world"]
    # SentencePiece puts its space before any text, also one that begins with a space.
    assert [tokens[i] for i in ours.encode(" the")] == ["▁", "▁the"]
    assert [tokens[i] for i in ours.encode("é")] == ["▁", "<0xC3>", "<0xA9>"]
    assert ours.encode("the", add_special_tokens=True) == [1, *ours.encode("the")]
    assert ours.stop_token_ids == (2,)


def test_sentencepiece_without_space_prefix(gguf_with):
    metadata = sentencepiece_metadata(**{"ggml.add_space_prefix": False})
    ours = Tokenizer.from_gguf(GGUFFile(gguf_with(metadata)))
    assert [metadata["ggml.tokens"][i] for i in ours.encode("an the")] == ["an", "▁the"]
    assert ours.decode(ours.encode("an the")) == "an the"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ggml.model": "t5"}, "tokenizer 't5' is not supported; use one of gpt2, llama"),
        (
            {"ggml.pre": "jina-v1-en"},
            "pre-tokenizer 'jina-v1-en' is not supported; use one of gpt-2, phi-2",
        ),
        ({"ggml.merges": None}, "lacks tokenizer.ggml.merges; use a file with its tokenizer"),
        ({"ggml.tokens": None}, "lacks tokenizer.ggml.tokens"),
        ({"ggml.merges": ["no such"]}, r"the tokenizer is damaged \(.*out of vocabulary\)"),
    ],
)
def test_unsupported_gguf_tokenizers(changes, message, gguf_with):
    file = GGUFFile(gguf_with(tiny_gguf_vocabulary() | changes))
    with expect_user_error(message):
        Tokenizer.from_gguf(file)


def test_unreadable_directory(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with expect_user_error(r"tokenizer.json is no readable tokenizer \(Model missing.*; fetch it"):
        Tokenizer.from_directory(tmp_path)


def test_stop_tokens_are_eos_and_end_of_turn(tmp_path):
    tokenizer = tiny_tokenizer()
    vocabulary = tokenizer.vocabulary()
    assert tokenizer.stop_token_ids == (vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"])
    tokenizer.save(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    expected = {5, 6, *tokenizer.stop_token_ids}
    assert set(Tokenizer.from_directory(tmp_path).stop_token_ids) == expected


def test_vicuna_template_stands_in():
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()),
        bos_token="<s>",
        eos_token="</s>",
    )
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    ]
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions."
    )
    # What FastChat's conversation of the template "vicuna_v1.1" prints: no space behind an EOS, one behind each user.
    dialogue = " USER: Hi ASSISTANT: Hello!</s>USER: Bye "
    tokenizer = Tokenizer(fast)
    assert tokenizer.render_chat(messages, False) == f"<s>{system}{dialogue}"
    assert tokenizer.render_chat(messages, True) == f"<s>{system}{dialogue}ASSISTANT:"
    own_system = [{"role": "system", "content": "Be brief."}, *messages]
    assert tokenizer.render_chat(own_system, False) == f"<s>Be brief.{dialogue}"
    with expect_user_error(
        r"refuses the conversation \(role tool is unknown\); give messages with"
    ):
        tokenizer.render_chat([{"role": "tool", "content": "x"}], False)


def test_own_template_refuses_a_conversation():
    tokenizer = tiny_tokenizer()
    assert tokenizer.render_chat([{"role": "user", "content": "x"}], False).startswith(
        "<|im_start|>"
    )
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with expect_user_error("refuses the conversation .roles must alternate.; give messages with"):
        tokenizer.render_chat([{"role": "user", "content": "x"}], False)
