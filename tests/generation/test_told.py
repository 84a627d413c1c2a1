"""Loading, compiling and prefill tell what they do; a later turn too."""

from __future__ import annotations

import dataclasses

import pytest
from infer_tiny import save_tiny_models
from tiny import tiny_model, tiny_tokenizer

from s2d_jax.config.sampling import SamplingParams
from s2d_jax.decode import programs as compilation
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.progress import activity as module
from s2d_jax.progress import durations
from s2d_jax.weights.load import load_draft, load_model

SHORT = SamplingParams(max_new_tokens=4, ignore_eos=True)
DECODING = "decoding up to 4 tokens"


@pytest.fixture
def told(monkeypatch, tmp_path):
    """What is told, in order, however quick it is; programs are compiled anew, and nothing is remembered from before."""
    texts: list[str] = []

    class Everything:
        moves = False

        def tick(self, going, now):
            texts.extend(each.text for each in going if each.text not in texts[-len(going) :])

        def close(self):
            pass

    monkeypatch.setenv("S2D_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("S2D_PROGRESS", "lines")
    monkeypatch.setattr(module, "_LINES", Everything())
    monkeypatch.setattr(compilation, "_CACHE", {})
    return texts


@pytest.fixture(scope="module")
def target():
    model = tiny_model(300, 2, max_context=512)
    return dataclasses.replace(model, tokenizer=tiny_tokenizer(300))


def test_loading_tells_of_the_tokenizer_and_of_the_weights(told, tmp_path, monkeypatch):
    models = save_tiny_models(tmp_path)
    told.clear()  # saving was told too
    done = []
    monkeypatch.setattr(
        module.BOARD, "end", lambda it, end=module.BOARD.end: done.append(it) or end(it)
    )
    load_model(models.small)
    assert list(dict.fromkeys(told)) == ["opening small", "reading the tokenizer", "loading small"]
    assert done[-1].done == pytest.approx(done[-1].total)
    size = (tmp_path / "small" / "model.safetensors").stat().st_size
    assert done[-1].total == pytest.approx(size)
    told.clear()
    load_draft(models.draft)
    assert list(dict.fromkeys(told)) == ["opening draft", "reading the tokenizer", "loading draft"]


def test_each_turn_tells_what_it_compiles_and_reads(told, target):
    conversation = SpeculativeDecoder(target).conversation()
    conversation.ask("the quick brown fox jumps over the lazy dog", SHORT)
    assert told == [
        "compiling prefill for 48 tokens",
        "compiling the decoding loop",
        "reading 38 tokens of the prompt",
        DECODING,
    ]
    told.clear()
    conversation.ask("and then one two three four five six seven eight nine ten", SHORT)
    assert told.pop() == DECODING
    extend, *others = [
        text for text in told if not text.startswith(("compiling a cache", "reading"))
    ]
    assert extend.startswith("compiling prefill for ")
    assert extend.endswith(" more tokens")
    assert others in ([], ["compiling the decoding loop"])
    assert told[-1].startswith("reading ")  # all is compiled before the first word


def test_a_prompt_that_is_read_quickly_is_not_waited_for(told, target):
    decoder = SpeculativeDecoder(target)
    prompt = [list(range(60))]
    decoder.generate(prompt, SHORT)
    assert told[-2:] == ["reading 60 tokens of the prompt", DECODING]
    (key,) = {f"prefill/cpu/{_size(target)}"}
    durations.remember(key, 1e6)
    told.clear()
    decoder.generate(prompt, SHORT)
    assert told == [DECODING]  # and nothing was compiled


def test_parts_of_rounds_are_told(told, target):
    decoder = SpeculativeDecoder(target)
    decoder.generate([[5, 6, 7]], SHORT, time_rounds=True)
    parts = ["compiling drafting", "compiling verification", "compiling acceptance"]
    assert [text for text in told if text in parts] == parts


def test_nothing_is_told_or_kept_where_it_is_off(told, target, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("S2D_PROGRESS", "off")
    SpeculativeDecoder(target).generate([list(range(60))], SHORT)
    assert told == []
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "cache").exists()


def _size(model) -> int:
    import jax

    return sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
