"""Tokens to text as they come, and stop strings in it."""

from __future__ import annotations

from collections.abc import Sequence

from fastgpt2.tokenizer import Tokenizer


class TextStream:
    """Turns the tokens of one sample into text as they come, and finds stop strings in it.

    The bytes of a character may be spread over tokens, so text is given out only when decoding no longer ends in a
    replacement character. Text that could be the beginning of a stop string is held back too.

    `text` is what is decoded so far, without a stop string and what follows it; `stopped` says whether one was found.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.stop_strings = stop_strings
        self.ids: list[int] = []
        self.decoded_from = 0  # ids before this one are decoded for good
        self.text = ""  # decoded so far, a stop string cut off
        self.given = 0  # characters given out
        self.stopped = False

    def push(self, token_id: int) -> None:
        """Add a token."""
        self.ids.append(token_id)
        piece = self.tokenizer.decode(self.ids[self.decoded_from :])
        if piece and not piece.endswith("\ufffd"):
            self._append(piece)
            self.decoded_from = len(self.ids)

    def finish(self) -> None:
        """No more tokens come: what was held back is text now."""
        if not self.stopped and self.decoded_from < len(self.ids):
            self._append(self.tokenizer.decode(self.ids[self.decoded_from :]))
            self.decoded_from = len(self.ids)
        self.stop_strings = ()

    def _append(self, piece: str) -> None:
        searched = max(0, len(self.text) - max(map(len, self.stop_strings), default=0))
        self.text += piece
        found = [at for stop in self.stop_strings if (at := self.text.find(stop, searched)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def take(self) -> str:
        """The text that is certain by now and was not given out yet."""
        certain = len(self.text)
        if not self.stopped:
            for stop in self.stop_strings:
                for length in range(min(len(stop) - 1, certain), 0, -1):
                    if self.text.endswith(stop[:length]):
                        certain = min(certain, len(self.text) - length)
                        break
        new, self.given = self.text[self.given : certain], max(self.given, certain)
        return new
