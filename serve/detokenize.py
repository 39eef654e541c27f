"""Token ids to text as they come: no broken characters, and stop strings found across token boundaries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

REPLACEMENT = "\ufffd"


class IncrementalDecoder:
    """Joined, the pieces that `push` and `flush` return are `decode` of all the ids.

    Decoding one token alone would lose a leading space or half of a character, so each step decodes a short
    window that begins at tokens already shown. A trailing replacement character may be the start of a longer
    one and waits for the next token.
    """

    def __init__(self, decode: Callable[[list[int]], str], context: list[int] | None = None) -> None:
        """`context`: the tokens before the first one, such as the end of the prompt."""
        self._decode = decode
        self._window = list(context or [])[-8:]
        self._shown = self._stable(decode(self._window))
        self._settled = len(self._window)

    def push(self, token: int) -> str:
        """Add a token; return the text that is certain now, often empty in the middle of a character."""
        self._window.append(token)
        text = self._decode(self._window)
        stable = self._stable(text)
        piece = self._advance(stable)
        if stable == text:
            self._shorten()
        return piece

    def flush(self) -> str:
        """Return what was held back, as the decoder spells it."""
        return self._advance(self._decode(self._window))

    @staticmethod
    def _stable(text: str) -> str:
        return text.removesuffix(REPLACEMENT)

    def _advance(self, text: str) -> str:
        piece = text[len(self._shown) :]
        if len(text) > len(self._shown):
            self._shown = text
        return piece

    def _shorten(self) -> None:
        """Drop the tokens before the last one that ended on a whole character."""
        rest = self._window[self._settled :]
        text = self._decode(rest) if rest else ""
        if text and not text.startswith(REPLACEMENT):
            self._window, self._shown = rest, text
        self._settled = len(self._window)


@dataclass
class TextStream:
    """The visible text of one sequence: decoded, cut at the first stop string, and never ahead of one."""

    decoder: IncrementalDecoder
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    _held: str = ""
    stopped: bool = False

    def push(self, token: int) -> str:
        """Add a token and return the text that can be shown; `stopped` tells that a stop string ended it."""
        return self._release(self.decoder.push(token), last=False)

    def finish(self) -> str:
        """Return everything still held back; call once, when no token follows."""
        return self._release(self.decoder.flush(), last=True)

    def _release(self, piece: str, *, last: bool) -> str:
        if not self.stop:
            return piece
        text = self._held + piece
        found = [(text.find(word), word) for word in self.stop if word in text]
        if found:
            at, word = min(found, key=lambda hit: (hit[0], -len(hit[1])))
            self.stopped, self._held = True, ""
            return text[: at + len(word)] if self.include_stop else text[:at]
        keep = 0 if last else self._overlap(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _overlap(self, text: str) -> int:
        """Length of the longest end of the text that a stop string may begin with."""
        longest = max(len(word) for word in self.stop) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(word.startswith(text[-size:]) for word in self.stop):
                return size
        return 0
