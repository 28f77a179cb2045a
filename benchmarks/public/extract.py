"""Which option an answer names, or None: a letter is read only where the text states it, never guessed.

lmms-eval's extractor takes "The answer is C because of D." for D, loses a lower-case "b", finds A in "I think it is
Apple", and D in the word FAILED. Here a text that names no option, or more than one, is unanswered, which counts as
wrong and is reported beside the score.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from benchmarks.public.formats import LETTERS

# What may follow a bare capital letter that is a choice and not an article: "A because ...", "C is right".
_FOLLOWS = r"(?=\s*(?:$|[.,;:!?)\]\n]|-\s|(?:because|since|as|is|for|due|given|which|based|in)\b))"
_NOT_ANOTHER = r"(?!\s*(?:or|and|/|,|&)\s*(?:option\s+)?[(\[]?[A-Ja-j]\b(?!'))"
_LEAD = (
    r"(?:(?:answer|option|choice)(?:\s+(?:is|would\s+be|should\s+be|must\s+be)|\s*[:=])"
    r"|\b(?:i|i'd|i\s+would|we)\s+(?:choose|select|pick|say|go\s+with))"
    r"[:\s]*(?:(?:option|choice|letter)\s+)?"
)
# "Option B", "Answer B", "It's B": what a short answer opens with, and what then must follow the letter.
_NAMED = r"\W*(?i:(?:the\s+)?(?:option|answer|choice)|it's|it\s+is)\s+"
_ENDS = r"\s*(?:$|[.,;:!?)\]\n]|(?:because|since|as|for|due|given|based)\b)"
_BRACKETED = r"[(\[]\s*([A-Ja-j])\s*[)\]]"
_BARE = r"(?<![A-Za-z'])([A-J])(?![A-Za-z'0-9])"
_SMALL = r"(?<![A-Za-z'])([a-j])(?=\s*(?:$|[.,;:!?)\]]))"
_NEGATION = re.compile(r"\b(?:not|no|never|neither|nor|except|without|cannot)\b|n't\b", re.IGNORECASE)
_MAX_WORDS = 20
_TYPOGRAPHY = {0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2013: "-", 0x2014: "-"}


def _plain(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text.casefold()).strip()


def _of_options(text: str, options: Sequence[str]) -> str | None:
    """The one option whose text this is, after case and punctuation are dropped."""
    wanted = _plain(text)
    matches = [LETTERS[i] for i, option in enumerate(options) if wanted and _plain(option) == wanted]
    return matches[0] if len(matches) == 1 else None


def _contained(text: str, options: Sequence[str]) -> str | None:
    """The one option whose words stand in a short sentence that denies nothing."""
    words = f" {_plain(text)} "
    if len(words.split()) > _MAX_WORDS or _NEGATION.search(text):
        return None
    found = [i for i, option in enumerate(options) if len(_plain(option)) > 2 and f" {_plain(option)} " in words]
    # "red car" contains "red": only the longest of nested options was said.
    outer = [
        i for i in found if not any(j != i and f" {_plain(options[i])} " in f" {_plain(options[j])} " for j in found)
    ]
    return LETTERS[outer[0]] if len(outer) == 1 else None


def _stated(text: str, options: Sequence[str]) -> set[str]:
    """Every option that a phrase such as "the answer is" leads to."""
    found = set()
    for lead in re.finditer(_LEAD, text, re.IGNORECASE):
        rest = text[lead.end() :]
        sentence = re.split(r"[.!?](?=\s|$)|\n", rest, maxsplit=1)[0]  # not at the point of "3.5"
        if (letter := _of_options(sentence, options)) is not None:
            found.add(letter)
            continue
        bracketed = re.match(rf"\s*{_BRACKETED}{_NOT_ANOTHER}", rest)
        bare = re.match(rf"\s*[\"'(\[]?{_BARE}{_NOT_ANOTHER}", rest)
        small = re.match(rf"\s*[\"'(\[]?{_SMALL}{_NOT_ANOTHER}", rest)
        if bracketed:
            found.add(bracketed[1].upper())
        elif bare:
            # "A" may be an article ("the answer is A dog"); the other capitals are no words.
            is_choice = bare[1] not in "AI" or re.match(_FOLLOWS, rest[bare.end() :], re.IGNORECASE)
            after = rest[bare.end() :]
            if is_choice or _starts_with_option(after, options, bare[1]):
                found.add(bare[1])
        elif small:
            found.add(small[1].upper())
    return found


def _starts_with_option(text: str, options: Sequence[str], letter: str) -> bool:
    i = LETTERS.index(letter)
    return i < len(options) and bool(_plain(options[i])) and f"{_plain(text)} ".startswith(f"{_plain(options[i])} ")


def _leading(text: str, options: Sequence[str]) -> str | None:
    """A letter with which the text starts, as in "B. Candles", "(c)", "C) Berries", "D because ...", "Option B"."""
    listed = re.findall(r"^\s*(?:[(\[]([A-Ja-j])[)\]]|([A-J])\s*[.):])", text, re.MULTILINE)
    if len({(a or b).upper() for a, b in listed}) > 1:
        return None  # the options were repeated, none was chosen
    named = re.match(rf"{_NAMED}{_BARE}{_NOT_ANOTHER}", text)
    if named:
        rest = text[named.end() :]
        if re.match(_ENDS, rest, re.IGNORECASE) or _starts_with_option(rest, options, named[1]):
            return named[1]
    marked = re.match(rf"\s*(?:{_BRACKETED}|([A-Ja-j])\s*[.):\]](?![A-Za-z]\.)){_NOT_ANOTHER}", text)
    if marked:
        return (marked[1] or marked[2]).upper()
    bare = re.match(rf"\s*{_BARE}{_NOT_ANOTHER}", text)
    if bare:
        rest = text[bare.end() :]
        if re.match(_FOLLOWS, rest, re.IGNORECASE) or _starts_with_option(rest, options, bare[1]):
            return bare[1]
    return None


def extract_answer(text: str, options: Sequence[str]) -> str | None:
    """The letter of the option that a model's answer names.

    Args:
        text: what the model wrote; a leading ``<think>`` block is not part of the answer.
        options: texts of the options, option i having the letter ``LETTERS[i]``; at most 10.

    Returns:
        "A", "B", ... within the options, or None where the text names none, or more than one.
    """
    if len(options) > len(LETTERS):
        raise ValueError(f"at most {len(LETTERS)} options are supported, got {len(options)}")
    valid = set(LETTERS[: len(options)])
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL).rpartition("</think>")[2]
    if "<think>" in text:
        return None  # cut off while thinking
    text = re.sub(r"\\boxed\{(?:\\text\{)?\s*([A-J])\s*\}?\}", r"(\1)", text)
    text = re.sub(r"</?answer>|[*`$]", "", text).translate(_TYPOGRAPHY).strip()
    only = re.fullmatch(r"\W*([A-Ja-j])\W*", text)
    if only:
        return only[1].upper() if only[1].upper() in valid else None
    if (letter := _of_options(text, options)) is not None:
        return letter
    stated = _stated(text, options)
    if stated:
        return stated.pop() if len(stated) == 1 and stated <= valid else None
    leading = _leading(text, options)
    if leading is not None:
        return leading if leading in valid else None
    if re.search(rf"{_BRACKETED}|(?<![A-Za-z'])[B-HJ](?![A-Za-z'])", text):
        return None  # letters are mentioned, and none is stated as the answer
    return _contained(text, options)
