"""Decoding a stream of tokens to text, and finding stop strings in it."""

from __future__ import annotations

from collections.abc import Sequence

from fastgpt2.tokenizer import Tokenizer


class TextStream:
    """Decodes the tokens of one sample to text as they arrive, and finds stop strings.

    A character's bytes may be spread over several tokens. Text is therefore held back while its decoding ends in a
    replacement character. Text that could be the beginning of a stop string is held back too.

    Args:
        tokenizer: Decodes the tokens.
        stop_strings: Strings that end the sample.

    Attributes:
        text: The text decoded so far. It ends before the first stop string.
        stopped: Whether a stop string was found.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.stop_strings = stop_strings
        self.ids: list[int] = []
        self.decoded_from = 0  # the text of all ids before this one is final
        self.text = ""
        self.given = 0  # number of characters that `take` has returned
        self.stopped = False

    def push(self, token_id: int) -> None:
        """Add a token."""
        self.ids.append(token_id)
        piece = self.tokenizer.decode(self.ids[self.decoded_from :])
        if piece and not piece.endswith("\ufffd"):
            self._append(piece)
            self.decoded_from = len(self.ids)

    def finish(self) -> None:
        """End the stream. Text that was held back becomes final."""
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
        """Return the text that has become certain since the last call."""
        certain = len(self.text)
        if not self.stopped:
            for stop in self.stop_strings:
                for length in range(min(len(stop) - 1, certain), 0, -1):
                    if self.text.endswith(stop[:length]):
                        certain = min(certain, len(self.text) - length)
                        break
        new, self.given = self.text[self.given : certain], max(self.given, certain)
        return new
