"""What a teacher may say that training should not see; each reason has a name."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

REASONS = {
    "empty": "nothing but white space",
    "not_text": "no string, replacement or control characters, or hardly a letter in it",
    "special_tokens": "a chat template's tokens, such as <|im_end|>",
    "cut_off": "the answer met the token limit",
    "too_short": "fewer words than min_words",
    "too_long": "more words than max_words",
    "repeated": "too large a part of its n-grams occurs more than once",
    "refusal": "the teacher declines, or says that it sees no video",
    "prompt_echo": "the prompt is said again",
}

# Words, and each character of scripts that are written without spaces.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
_SPECIAL = re.compile(r"<\|[a-z0-9_ ]+\|>|<(?:image|video|s|/s|bos|eos|pad|unk)>|\[/?INST\]", re.IGNORECASE)
_THINKING = re.compile(r"\A\s*<think>.*?</think>\s*", re.DOTALL)
# At the beginning only: a person in a video may well be sorry, or cannot do something.
_REFUSAL = re.compile(
    r"""\A\W*(?:
        (?:i'?m|i\s+am)\s+(?:(?:really|very|so)\s+)?(?:sorry|afraid|unable|not\s+able)\b
      | sorry\b[,.]?\s+(?:but\s+)?i\b
      | (?:i\s+)?apologi[sz]e\b
      | (?:unfortunately,?\s+)?i\s+(?:can\s?not|can'?t|couldn'?t|am\s+unable\s+to|do\s+not|don'?t|won'?t)\s+
        (?:\w+\s+){0,3}(?:see|view|watch|access|describe|assist|help|provide|analy[sz]e|process|comply|have|open|play)\b
      | as\s+an?\s+(?:ai|artificial|language|text)\b
      | (?:there\s+is\s+)?no\s+video\s+(?:was|is|has)?\s*(?:been\s+)?(?:provided|attached|given|shown|available)
      | 抱歉 | 很抱歉 | 对不起 | 作为(?:一个)?(?:人工智能|AI)
    )""",
    re.IGNORECASE | re.VERBOSE,
)


@dataclass(frozen=True)
class CaptionFilter:
    """Decides by text alone; deterministic.

    Attributes:
        min_words: >= 1; words are runs of letters and digits, or single characters of Chinese, Japanese and Korean.
        max_words: >= ``min_words``.
        ngram: n of the n-grams that are counted, >= 1.
        max_repeated: largest part, in [0, 1], of the n-grams that may be repetitions of an earlier one.
        min_letters: least part, in [0, 1], of letters among the characters that are not white space.
        allow: reasons that are let pass; an empty answer, or none that is a string, never is.

    Raises:
        ValueError: a value out of range.
    """

    min_words: int = 5
    max_words: int = 1000
    ngram: int = 4
    max_repeated: float = 0.3
    min_letters: float = 0.5
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("min_words", 1), ("max_words", self.min_words), ("ngram", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        for name in ("max_repeated", "min_letters"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)!r}")
        if unknown := sorted(set(self.allow) - set(REASONS)):
            raise ValueError(f"allow must be names out of {list(REASONS)}, got {unknown}")

    def reason(self, text: object, prompt: str, finish_reason: str | None = "stop") -> str:
        """Why an answer is not used.

        Args:
            text: the answer, after :func:`clean`.
            prompt: what was asked.
            finish_reason: of the OpenAI API.

        Returns:
            A key of :data:`REASONS`, or '' for a good answer.
        """
        if not isinstance(text, str):
            return "not_text"
        if not text.strip():
            return "empty"
        return next((found for found in self._faults(text, prompt, finish_reason) if found not in self.allow), "")

    def _faults(self, text: str, prompt: str, finish_reason: str | None) -> Iterator[str]:
        words = words_of(text)
        if _SPECIAL.search(text):
            yield "special_tokens"
        if finish_reason == "length":
            yield "cut_off"
        if _is_garbage(text, self.min_letters):
            yield "not_text"
        if _REFUSAL.match(text.replace("\u2019", "'")):
            yield "refusal"
        if _echoes(words, words_of(prompt)):
            yield "prompt_echo"
        if len(words) < self.min_words:
            yield "too_short"
        if len(words) > self.max_words:
            yield "too_long"
        if repeated_part(words, self.ngram) > self.max_repeated:
            yield "repeated"


def clean(text: object) -> object:
    """An answer without its ``<think>`` part and outer white space; what is no string stays as it is."""
    return _THINKING.sub("", text).strip() if isinstance(text, str) else text


def words_of(text: str) -> list[str]:
    """Words in lower case; see :class:`CaptionFilter`."""
    return _WORD.findall(text.lower())


def repeated_part(words: list[str], n: int) -> float:
    """Part of the n-grams that occurred before, in [0, 1); 0 where there is none.

    A word that is said n times over at the end of a short text counts as much as a sentence said twice in a long one.
    """
    grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    total = grams.total()
    return (total - len(grams)) / total if total else 0.0


def _is_garbage(text: str, min_letters: float) -> bool:
    visible = [c for c in text if not c.isspace()]
    if any(c == "\ufffd" or unicodedata.category(c) in ("Cc", "Cs", "Co") for c in visible):
        return True
    letters = sum(unicodedata.category(c)[0] in "LMN" for c in visible)
    return letters < min_letters * len(visible)


def _echoes(words: list[str], prompt: list[str]) -> bool:
    """The whole prompt at the beginning or end, or an answer that is hardly more than the prompt's words."""
    if len(prompt) < 3:
        return words == prompt
    if words[: len(prompt)] == prompt or words[-len(prompt) :] == prompt:
        return True
    return len(words) <= len(prompt) and set(words) <= set(prompt) and len(words) >= 3
