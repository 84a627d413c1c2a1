"""What a call returns: rows, why they ended, the text that each token brought, and how all of it looks."""

from __future__ import annotations

import dataclasses
import html
import re

import pytest
from noisy_pair import make_talking_decoder
from tiny import noisy_draft, tiny_model

from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.config.tree import TreeShape
from s2d_jax.errors import UserError
from s2d_jax.generation import html as pages
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.generation.result import GeneratedRow, GenerationResult
from s2d_jax.weights.model import with_trimmed_head
from s2d_jax.weights.prepare import prepare_for_decode
from s2d_jax.weights.vocabulary import DraftVocabulary

VOCAB = 300
PROMPTS = [[5, 9, 2], [7, 7, 1, 3, 30, 12, 50]]
GREEDY = SamplingParams(max_new_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def decoder() -> SpeculativeDecoder:
    return make_talking_decoder()


@pytest.fixture(scope="module")
def whole(decoder) -> GenerationResult:
    return decoder.generate(PROMPTS, GREEDY)


def test_a_result_has_rows(whole):
    assert len(whole) == 2
    assert list(whole) == whole.rows == whole[:]
    assert isinstance(whole[1], GeneratedRow)
    assert [row.text for row in whole] == whole.texts
    assert [row.token_ids for row in whole] == whole.token_ids
    assert [row.stats for row in whole] == whole.row_stats
    assert [len(row.drafted_by) for row in whole] == [40, 40]
    assert whole[-1] is whole[1]
    with pytest.raises(IndexError):
        whole[2]
    with pytest.raises(UserError, match=r"the result has 2 rows; take one: result\[0\].text"):
        _ = whole.text


def test_finish_reasons(decoder, whole):
    assert whole.finish_reasons == ["length", "length"]
    stop_id = whole.token_ids[0][9]
    rows = [dataclasses.replace(GREEDY, stop_token_ids=stop_id), GREEDY]
    assert decoder.generate(PROMPTS, rows).finish_reasons == ["stop", "length"]
    stop = whole.texts[0][12:15]
    assert (
        decoder.generate(PROMPTS, dataclasses.replace(GREEDY, stop=stop))[0].finish_reason == "stop"
    )
    # The last token that is allowed is a stop token.
    last = whole.token_ids[0].index(stop_id) + 1
    short = dataclasses.replace(rows[0], max_new_tokens=last)
    assert decoder.generate(PROMPTS, short).finish_reasons[0] == "stop"
    with decoder.stream(PROMPTS, [GREEDY, dataclasses.replace(GREEDY, max_new_tokens=1)]) as stream:
        next(stream)
    assert stream.result.finish_reasons == ["abort", "length"]
    config = dataclasses.replace(decoder.target.config, eos_token_ids=(stop_id,))
    ending = SpeculativeDecoder(dataclasses.replace(decoder.target, config=config), decoder.draft)
    obeying = dataclasses.replace(GREEDY, ignore_eos=False)
    assert ending.generate(PROMPTS, [obeying, GREEDY]).finish_reasons == ["stop", "length"]


def test_at_the_context_a_row_ends_by_length(decoder):
    config = dataclasses.replace(decoder.target.config, max_context=20)
    short = SpeculativeDecoder(dataclasses.replace(decoder.target, config=config))
    assert short.generate(list(range(3, 18)), GREEDY).finish_reasons == ["length"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_pieces_add_up_to_the_text(decoder, whole, temperature):
    sampling = dataclasses.replace(GREEDY, temperature=temperature, seed=5)
    results = [decoder.generate(PROMPTS, sampling)]
    stop = results[0].texts[0][12:15]
    results.append(decoder.generate(PROMPTS, dataclasses.replace(sampling, stop=(stop, "zq"))))
    with decoder.stream(PROMPTS, dataclasses.replace(sampling, stop="zq")) as stream:
        for _ in range(4):
            next(stream)
    results.append(stream.result)
    for row in (row for result in results for row in result):
        assert len(row.pieces) == len(row.token_ids)
        assert "".join(row.pieces) == row.text
        assert row.first_pieces(3) == row.pieces[:3]


def _shown(page: str) -> list[tuple[str | None, str]]:
    """Colour and text of the spans of a page, and the plain text between them."""
    found = re.findall(
        r'<span style="background:(#\w+)[^"]*">(.*?)</span>|>?([^<>]+)(?=<)', page, re.S
    )
    return [(colour or None, html.unescape(inside or plain)) for colour, inside, plain in found]


def test_a_page_shows_who_drafted_each_token(decoder):
    two_exits = DecodeConfig(num_draft_tokens=3, exit_thresholds=(0.15, 0.0))
    result = SpeculativeDecoder(decoder.target, decoder.draft, two_exits).generate(PROMPTS, GREEDY)
    row = result[0]
    assert set(row.drafted_by) == {None, 1, 2}
    page = row._repr_html_()
    legend = dict(re.findall(r'background:(#\w+)[^"]*">exit (\d+)</span>', page))
    colour_of = {int(exit): colour for colour, exit in legend.items()}
    assert sorted(colour_of) == [1, 2]
    tinted = [(colour, text) for colour, text in _shown(page) if colour][: -len(legend)]
    expected = [
        (colour_of[exit], piece)
        for exit, piece in zip(row.drafted_by, row.pieces, strict=True)
        if exit is not None and piece
    ]
    assert tinted == expected
    assert "target</div>" in page
    assert f"MAT {row.stats.mean_acceptance_length:.2f}" in page
    assert f"{row.stats.tokens_per_second:.1f} tokens/s" in page
    assert page.count("finished by length") == 1
    assert result._repr_html_().count("finished by length") == 2
    text = re.search(r'<div style="white-space:pre-wrap[^>]*>(.*?)</div>', page, re.S)[1]
    assert html.unescape(re.sub(r"</?span[^>]*>", "", text)) == row.text
    for colour in colour_of.values():  # dark text on a light tint, whatever the page's colours
        assert min(int(colour[i : i + 2], 16) for i in (1, 3, 5)) > 0x90
    assert page.count("background:") == page.count("color:#111")


def test_a_page_is_escaped_and_bounded(decoder, whole, monkeypatch):
    tokenizer = decoder.target.tokenizer
    ids = tokenizer.encode("<b>a  b</b>\n&amp;")
    text = tokenizer.decode(ids)
    hostile = dataclasses.replace(whole[0], text=text, token_ids=ids, drafted_by=[None] * len(ids))
    page = hostile._repr_html_()
    assert "&lt;" in page
    assert "<b>" not in page
    assert html.escape(text) in page
    assert "white-space:pre-wrap" in page
    monkeypatch.setattr(pages, "MOST_TOKENS", 10)
    assert "… 30 more tokens" in whole[0]._repr_html_()
    monkeypatch.setattr(pages, "MOST_ROWS", 1)
    page = whole._repr_html_()
    assert "… 1 more rows" in page
    assert page.count("finished by") == 1
    bare = dataclasses.replace(whole[0], tokenizer=None, text="")
    assert f"{whole[0].token_ids[0]} " in bare._repr_html_()


def test_reprs_are_two_lines_for_people(decoder, whole):
    target, draft = decoder.target, decoder.draft
    stream = decoder.stream(PROMPTS, GREEDY)
    asked = decoder.conversation()
    asked.ask("one two", dataclasses.replace(GREEDY, max_new_tokens=12))
    deep = noisy_draft(tiny_model(num_layers=4), (1, 2, 4), (0.4, 0.4, 0.0))
    shown = {
        "target": (target, ["tiny seed 0", "llama, 2 layers x 32, vocabulary 300", "float32"]),
        "int8": (prepare_for_decode(target, "int8"), ["int8", "kB"]),
        "long": (dataclasses.replace(target, source="long/" * 40), ["long/long"]),
        "bare": (dataclasses.replace(target, tokenizer=None), ["no tokenizer"]),
        "draft": (draft, ["Draft: noisy, exits 1, 2"]),
        "trimmed": (with_trimmed_head(draft, DraftVocabulary(range(9))), ["head over 9 tokens"]),
        "deep": (deep, ["exits 1, 2, 4"]),
        "decoder": (decoder, ["target tiny seed 0, draft noisy", "exits 1, 2, up to 3 tokens"]),
        "tree": (
            SpeculativeDecoder(target, draft, DecodeConfig(tree=TreeShape(2, 2, 5))),
            ["trees of 5 nodes, 2 deep"],
        ),
        "plain": (SpeculativeDecoder(target), ["no draft", "plain decoding"]),
        "auto": (SpeculativeDecoder(target, draft, DecodeConfig(policy="auto")), ["calibration"]),
        "conversation": (decoder.conversation(), ["0 messages"]),
        "asked": (asked, ["2 messages"]),
        "stream": (stream, ["Stream: running, 2 rows, 0 tokens so far"]),
        "result": (whole, ["2 rows, 80 tokens, MAT", "tokens/s, finished by length 2"]),
        "row": (whole[0], ["GeneratedRow: 40 tokens, MAT", "finished by length"]),
        "stats": (whole.stats, ["GenerationStats: 2 rows, 80 tokens", "drafted tokens accepted"]),
        "tokenizer": (target.tokenizer, ["Tokenizer: 300 tokens, answers end with"]),
    }  # fmt: skip
    for name, (thing, words) in shown.items():
        text = repr(thing)
        lines = text.splitlines()
        assert len(lines) <= 2, name
        assert max(map(len, lines)) <= 110, name
        for word in words:
            assert word in text, name
    stream.close()
    with decoder.stream(PROMPTS, GREEDY) as ended:
        ended.finish()
    assert "Stream: ended, 2 rows, 80 tokens" in repr(ended)
