"""The text of a row while its tokens arrive: whole characters only, and cut before a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from s2d_jax.text.tokenizer import Tokenizer


class RowText:
    """Takes a row's new tokens in portions and gives out its text in portions.

    Together the portions are exactly the text of all tokens decoded at once. Text that a later token could still change is
    held back, and so is the possible beginning of a stop string.

    Args:
        tokenizer: None gives no text.
        stop: strings that end the row; the text ends before the first of them, the tokens end with the one that completes it.

    Attributes:
        token_ids: kept so far.
        text: given out so far.
        stopped: a stop string was found; further tokens are dropped.
        overshoot: tokens dropped.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self.token_ids: list[int] = []
        self.text = ""
        self.stopped = False
        self.overshoot = 0

    def feed(self, new_ids: Sequence[int], ended: bool) -> tuple[str, list[int]]:
        """Takes what comes next (`ended`: nothing will follow); returns the text and the tokens to give out."""
        if self.stopped:
            self.overshoot += len(new_ids)
            return "", []
        known = len(self.token_ids)
        self.token_ids += new_ids
        if self._tokenizer is None:
            return "", list(new_ids)
        text = self._cut_at_stop(known, ended) if self._stop else None
        if text is None:
            text = self._text_of(len(self.token_ids), ended)
            if not ended:
                text = text[: len(text) - self._held_back(text)]
        new_text, self.text = text[len(self.text) :], text
        return new_text, self.token_ids[known:]

    def _text_of(self, count: int, ended: bool) -> str:
        """The text of the first `count` tokens; if more may follow, only the part that they cannot change."""
        assert self._tokenizer is not None
        ids = self.token_ids[:count]
        last = ended and count == len(self.token_ids)
        return self._tokenizer.decode(ids) if last else self._tokenizer.decode_settled(ids)

    def _cut_at_stop(self, known: int, ended: bool) -> str | None:
        """The text before the first stop string, with the tokens behind it dropped; None if there is none."""
        whole = self._text_of(len(self.token_ids), ended)
        if not any(stop in whole for stop in self._stop):
            return None
        last = len(self.token_ids)
        for count in range(min(known + 1, last), last + 1):
            text = self._text_of(count, ended)
            found = [at for at in map(text.find, self._stop) if at >= 0]
            if found:
                self.overshoot = last - count
                del self.token_ids[count:]
                self.stopped = True
                return text[: min(found)]
        return None

    def _held_back(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0


def text_pieces(
    tokenizer: Tokenizer | None, ids: Sequence[int], text: str, count: int, *, complete: bool
) -> list[str]:
    """The piece of a row's text that each of the first `count` tokens brought; all pieces together are the text.

    Args:
        tokenizer: None gives no text.
        ids: all tokens of the row.
        text: the row's text as `RowText` gave it out, cut before a stop string or not.
        count: pieces that are wanted.
        complete: nothing can follow the last token.
    """
    row, pieces, given = RowText(tokenizer), [], 0
    for number, token in enumerate(ids[:count], start=1):
        row.feed([token], complete and number == len(ids))
        length = min(len(row.text), len(text))
        pieces.append(text[given:length])
        given = length
    return pieces
