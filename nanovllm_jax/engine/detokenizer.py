"""From tokens to text as they come, and the strings that end it."""

from typing import Any

from nanovllm_jax.sampling_params import SamplingParams

REPLACEMENT = "\ufffd"  # what the bytes of an unfinished character decode to
WINDOW = 8  # tokens after which the window moves on, where it can


class Detokenizer:
    """The text of one sequence, grown token by token, of which each piece is final.

    With each new token only the last ones are decoded again: a window, which starts where the text does not depend on
    the tokens before. Replacement characters at its end wait: the bytes that complete a character may come yet.
    """

    def __init__(self, tokenizer: Any, params: SamplingParams):
        """`tokenizer` is transformers'; of `params` count the stop strings and what concerns the text."""
        self.text = ""  # cut at the stop string, once it was found
        self.stop: str | None = None  # the stop string that was found
        self._tokenizer, self._params = tokenizer, params
        self._num_tokens = 0
        self._num_taken = 0  # characters
        self._window: list[int] = []
        self._decoded = ""  # the window's text
        self._num_known = 0  # characters of it that are in `text`
        self._cut = 0  # where the window may start next

    def append(self, tokens: list[int]) -> None:
        """Add tokens: with stop strings one by one, or the first may be found too late."""
        start = len(self.text)
        self._num_tokens += len(tokens)
        self._window += tokens
        self._decoded = self._decode(self._window)
        end = len(self._decoded.rstrip(REPLACEMENT))
        self._extend_text(end)
        # Where a tokenizer decodes runs of bytes, an unfinished character makes those before it unreadable for a while.
        if len(self._window) - self._cut >= WINDOW and end >= self._num_known:
            self._move_window()
        if self._params.stop and self._num_tokens > self._params.min_tokens:
            self._find_stop(start)

    def finish(self) -> None:
        """No token will come: an unfinished character stays a replacement character."""
        if self.stop is None:
            self._extend_text(len(self._decoded))

    def take(self, finished: bool) -> str:
        """The text since the last call, without what may become a stop string unless the text is finished."""
        held = 0 if finished or self._params.include_stop_str_in_output else self._num_held()
        start, self._num_taken = self._num_taken, max(self._num_taken, len(self.text) - held)
        return self.text[start : self._num_taken]

    def _decode(self, tokens: list[int]) -> str:
        # Not transformers' own `decode`, which takes three times as long, and may clean up what was given out already.
        return self._tokenizer.backend_tokenizer.decode(tokens, skip_special_tokens=self._params.skip_special_tokens)

    def _extend_text(self, end: int) -> None:
        """Take the window's first `end` characters as final."""
        self.text += self._decoded[self._num_known : end]
        self._num_known = max(self._num_known, end)

    def _move_window(self) -> None:
        """Let the window start at the cut, if the tokens on both sides decode to the same apart as together.

        They do not where the cut is inside a character, or where a tokenizer writes the first word in another way.
        Tokens behind the cut that have no text, as special ones that are skipped, leave it.
        """
        if self._cut:
            before, after = (self._decode(part) for part in (self._window[: self._cut], self._window[self._cut :]))
            if after and before + after == self._decoded:
                self._extend_text(len(before))
                self._window, self._decoded = self._window[self._cut :], after
                self._num_known -= len(before)
            elif not after and before == self._decoded:
                del self._window[self._cut :]
            else:  # it may be inside a character, which has few tokens
                self._cut += 1
                return
        self._cut = len(self._window)

    def _find_stop(self, start: int) -> None:
        """Cut the text at the stop string that is complete first; what ends before `start` does not count."""
        found = []
        for string in self._params.stop:
            at = self.text.find(string, max(0, start - len(string) + 1))
            if at >= 0:
                found.append((at + len(string), at, string))
        if found:
            end, at, self.stop = min(found)  # of two that end together, the longer
            self.text = self.text[: end if self._params.include_stop_str_in_output else at]

    def _num_held(self) -> int:
        """Length of the longest end of the text with which a stop string starts."""
        if not self._params.stop:
            return 0
        return max(_overlap(self.text, string) for string in self._params.stop)


def _overlap(text: str, string: str) -> int:
    lengths = range(min(len(string) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(string[:length])), 0)
