"""Typed fields of files, and how values are shown in messages."""

import math

import pytest

from s2d_jax.errors import UserError, printable, shown
from s2d_jax.fields import Fields

FOUND = {
    "layers": 3,
    "eps": 1e-5,
    "on": True,
    "name": "a",
    "ids": [1, 2],
    "parts": {"rank": 4},
    "empty": None,
}


def fields(**raw):
    return Fields(raw or FOUND, "config.json", "export again")


def test_values_come_back_plain():
    found = fields()
    assert found.integer("layers", 1, 9) == 3
    assert found.number("eps") == found.positive("eps") == 1e-5
    assert found.flag("on")
    assert found.text("name") == "a"
    assert found.integers("ids") == (1, 2)
    assert found.numbers("ids") == (1, 2)
    assert found.fields("parts").integer("rank") == 4


def test_absent_and_null_have_the_default():
    assert fields().integer("absent", default=7) == fields().integer("empty", default=7) == 7
    assert fields().fields("absent", None) is None
    with pytest.raises(UserError, match=r"^config.json lacks empty; export again$"):
        fields().text("empty")


@pytest.mark.parametrize(
    "value", ["3", 3.0, True, [3], {"a": 1}, 0, 10, pytest.param(10**5000, id="many digits")]
)
def test_integers_are_whole_and_in_bounds(value):
    with pytest.raises(UserError, match=r"^config.json: x=.* must be a whole number from 1 to 9"):
        fields(x=value).integer("x", 1, 9)


@pytest.mark.parametrize(
    "value", ["3", True, [3], math.nan, math.inf, pytest.param(10**5000, id="many digits")]
)
def test_numbers_are_finite(value):
    with pytest.raises(UserError, match=r"x=.* must be a number"):
        fields(x=value).number("x")


@pytest.mark.parametrize("value", [0, -1, -0.5])
def test_positive_numbers_are_above_0(value):
    with pytest.raises(UserError, match="must be a number above 0"):
        fields(x=value).positive("x")


@pytest.mark.parametrize(
    ("read", "value"),
    [
        ("texts", ["a", 1]),
        ("integers", [1, "a"]),
        ("numbers", [1, None]),
        ("list", "abc"),
        ("flag", 1),
        ("text", 5),
    ],
)
def test_other_types_are_named(read, value):
    with pytest.raises(UserError, match=r"^config.json: x=.* must be .*; export again$"):
        getattr(fields(x=value), read)("x")


@pytest.mark.parametrize("raw", [None, 5, "text", [1], [["a", 1]]])
def test_what_is_no_object_is_refused(raw):
    with pytest.raises(UserError, match="must be an object"):
        Fields(raw, "config.json")


def test_unknown_fields_are_named():
    with pytest.raises(UserError, match="unknown field 'layers'"):
        fields().only(["eps"])


def test_any_value_can_be_shown():
    nested = []
    for _ in range(100_000):
        nested = [nested]

    class Broken:
        def __repr__(self):
            raise RuntimeError

    for value in (nested, Broken(), 10**5000, "\ud800\x1b[31m\0", list(range(10**6)), "a\u2028b"):
        assert len(shown(value)) <= 60
        assert shown(value).isprintable()
    assert shown([1, "a"]) == "[1, 'a']"
    while nested:  # taken apart by hand: Python's own way is recursive
        nested = nested.pop()


def test_names_are_printable():
    assert printable("a\nb\x1b \ud800é") == r"a\nb\x1b \ud800é"
