"""Chat templates: several by name, files, GGUF; which is used, which are kept, and what they may do."""

from __future__ import annotations

import json
import pickle

import pytest
import transformers
from hf_tiny import expect_user_error, tiny_gguf_vocabulary, write_gguf
from tiny import tiny_config, tiny_model, tiny_params, tiny_tokenizer

from s2d_jax.formats.gguf import GGUFFile
from s2d_jax.text.templates import VICUNA_TEMPLATE
from s2d_jax.text.tokenizer import Tokenizer
from s2d_jax.weights.export import save_model
from s2d_jax.weights.load import load_model

DEFAULT = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
TOOLS = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
NAMED = {"default": DEFAULT, "tool_use": TOOLS}
MESSAGES = [{"role": "user", "content": "Hi"}]


def in_config(directory, templates):
    """tokenizer_config.json lists the templates by name."""
    file = directory / "tokenizer_config.json"
    listed = [{"name": name, "template": text} for name, text in templates.items()]
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": listed}))


def in_files(directory, templates):
    """The templates are files beside each other, and tokenizer_config.json has an older one."""
    in_config(directory, {"default": "old", "old": "old"})
    (directory / "additional_chat_templates").mkdir()
    for name, text in templates.items():
        file = (
            f"additional_chat_templates/{name}.jinja"
            if name != "default"
            else "chat_template.jinja"
        )
        (directory / file).write_text(text)


def in_gguf(directory, templates):
    """A GGUF file, whose further templates have keys of their own."""
    config = tiny_config(num_layers=1)
    keys = {
        "chat_template" if n == "default" else f"chat_template.{n}": t for n, t in templates.items()
    }
    keys |= {"chat_templates": [n for n in templates if n != "default"]}
    vocabulary = tiny_gguf_vocabulary() | keys
    return write_gguf(directory / "m.gguf", config, tiny_params(config), tokenizer=vocabulary)


def read(directory, write, templates) -> Tokenizer:
    if write is in_gguf:
        return Tokenizer.from_gguf(GGUFFile(in_gguf(directory, templates)))
    tiny_tokenizer(chat=False).save(directory)
    write(directory, templates)
    return Tokenizer.from_directory(directory)


@pytest.mark.parametrize("write", [in_config, in_files, in_gguf])
def test_default_is_used_unless_another_is_chosen(tmp_path, write):
    tokenizer = read(tmp_path, write, NAMED)
    assert tokenizer.templates == NAMED
    assert tokenizer.render_chat(MESSAGES) == "[Hi]"
    chosen = tokenizer.with_chat_template("tool_use")
    assert chosen.render_chat(MESSAGES) == "<Hi>"
    assert tokenizer.render_chat(MESSAGES) == "[Hi]", "the first one is as it was"
    assert tokenizer.with_chat_template(None) is tokenizer
    assert chosen.fingerprint() != tokenizer.fingerprint()
    with expect_user_error("'tools' is neither a file nor .* one of default, tool_use, vicuna"):
        tokenizer.with_chat_template("tools")


@pytest.mark.parametrize("write", [in_config, in_files, in_gguf])
def test_several_without_a_default_ask_for_a_choice(tmp_path, write):
    tokenizer = read(tmp_path, write, {"rag": DEFAULT, 'it\'s "x"': TOOLS})
    with expect_user_error("there are the templates .*rag.*; choose one with --chat-template"):
        tokenizer.render_chat(MESSAGES)
    assert tokenizer.with_chat_template("rag").render_chat(MESSAGES) == "[Hi]"
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.from_directory(tmp_path / "saved").templates == tokenizer.templates


def test_the_only_one_is_used(tmp_path):
    assert read(tmp_path, in_config, {"rag": DEFAULT}).render_chat(MESSAGES) == "[Hi]"


def test_a_file_is_chosen(tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ messages|length }}!")
    tokenizer = tiny_tokenizer().with_chat_template(str(tmp_path / "mine.jinja"))
    assert tokenizer.render_chat(MESSAGES) == "1!"
    assert tokenizer.template_notice is None
    with expect_user_error("is a directory, a file is expected"):
        tokenizer.with_chat_template(str(tmp_path))
    with expect_user_error("is neither a file nor"):
        tokenizer.with_chat_template("a\0b")


def test_a_model_is_loaded_with_a_chosen_template(tmp_path):
    model = tiny_model(64, 1)
    save_model(tmp_path / "m", model.config, model.params, tiny_tokenizer())
    in_config(tmp_path / "m", NAMED)
    tokenizer = load_model(tmp_path / "m", chat_template="tool_use").tokenizer
    assert tokenizer is not None
    assert tokenizer.render_chat(MESSAGES) == "<Hi>"
    with expect_user_error("neither a file nor"):
        load_model(tmp_path / "m", chat_template="tools")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "m" / name).unlink()
    with expect_user_error("has no tokenizer, so chat_template='tool_use' serves nothing"):
        load_model(tmp_path / "m", chat_template="tool_use")


def saved_templates(tokenizer: Tokenizer, directory):
    """The templates that are read again, and those that transformers reads."""
    tokenizer.save(directory)
    again = Tokenizer.from_directory(directory)
    assert again.render_chat(MESSAGES) == tokenizer.render_chat(MESSAGES)
    fast = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    theirs = (
        {"default": fast.chat_template}
        if isinstance(fast.chat_template, str)
        else fast.chat_template
    )
    assert again.templates == (theirs or {})
    return again.templates


def test_every_template_is_kept_and_none_is_added(tmp_path):
    tokenizer = read(tmp_path / "many", in_config, NAMED)
    assert saved_templates(tokenizer, tmp_path / "1") == NAMED
    chosen = tokenizer.with_chat_template("tool_use")
    kept = {"default": TOOLS, "tool_use": TOOLS, "replaced_default": DEFAULT}
    assert saved_templates(chosen, tmp_path / "2") == kept
    assert saved_templates(chosen.with_chat_template("default"), tmp_path / "3") == NAMED
    none = tiny_tokenizer(chat=False)
    assert saved_templates(none, tmp_path / "4") == {}
    vicuna = none.with_chat_template("vicuna")
    assert saved_templates(vicuna, tmp_path / "5") == {"default": VICUNA_TEMPLATE}


def test_vicunas_stands_in_with_a_notice(tmp_path):
    none, own = tiny_tokenizer(chat=False), tiny_tokenizer()
    assert none.chat_template == VICUNA_TEMPLATE
    assert none.template_notice is not None
    assert "no chat template" in none.template_notice
    assert "Vicuna's" in repr(none)
    assert own.template_notice is None
    assert none.with_chat_template("vicuna").template_notice is None
    assert pickle.loads(pickle.dumps(none)).template_notice == none.template_notice
    none.save(tmp_path)
    assert Tokenizer.from_directory(tmp_path).template_notice == none.template_notice


@pytest.mark.parametrize("value", [3, True, ["a"], 1.5])
@pytest.mark.parametrize("key", ["chat_template", "chat_template.tool_use"])
def test_gguf_templates_that_are_no_texts(tmp_path, key, value):
    config = tiny_config(num_layers=1)
    vocabulary = tiny_gguf_vocabulary() | {key: value}
    write_gguf(tmp_path / "m.gguf", config, tiny_params(config), tokenizer=vocabulary)
    with expect_user_error("m.gguf: .*chat_template"):
        Tokenizer.from_gguf(GGUFFile(tmp_path / "m.gguf"))


HOSTILE = {
    "a file": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "the system": "{{ cycler.__init__.__globals__.os.system('touch LEFT') }}",
    "imports": "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch LEFT') }}",
    "changing messages": "{{ messages.append(1) }}",
    "a huge range": "{{ range(10**12)|list }}",
    "no Jinja": "{% for %}",
    "dividing by zero": "{{ 1 / 0 }}",
    "a missing key": "{{ messages[7]['role'].x.y }}",
    "a number for a text": "{{ 'x' + 1 }}",
    "itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("write", [in_config, in_files, in_gguf])
@pytest.mark.parametrize("what", HOSTILE)
def test_a_template_stays_in_its_sandbox(tmp_path, what, write):
    left = tmp_path / "left behind"
    text = HOSTILE[what].replace("LEFT", str(left))
    tokenizer = read(tmp_path, write, {"default": text})
    with expect_user_error(r"the chat template refuses the conversation \(.*\); give messages"):
        tokenizer.render_chat(MESSAGES)
    assert not left.exists()
