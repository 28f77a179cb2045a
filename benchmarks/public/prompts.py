"""What each set asks the model, word for word: the set's own prompt, or lmms-eval 0.7.3's."""

from __future__ import annotations

from benchmarks.public.formats import LETTERS, Question

VARIANTS = ("official", "lmms-eval")

_VIDEOMME = (
    "Select the best answer to the following multiple-choice question based on the video{subtitles}. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)
_VIDEOMME_LMMS_END = "\nAnswer with the option's letter from the given choices directly."
_MLVU_SYSTEM = (
    "Carefully watch this video and pay attention to every detail. Based on your observations, "
    "select the best option that accurately addresses the question."
)


def prompt(name: str, question: Question, variant: str) -> tuple[str | None, str]:
    """System text (or None) and user text of one question.

    Args:
        name: "videomme", "mlvu" or "lvbench".
        question: as read by ``public.formats``.
        variant: "official", or "lmms-eval" for that harness's default text. Three notes. lmms-eval's Video-MME text
            speaks of subtitles even where there are none. MLVU's own script starts the assistant's turn with its
            prefix "Best Option: ("; not every endpoint can do that, so it ends the user's turn here, as in lmms-eval.
            LVBench publishes no prompt: both variants are lmms-eval's.

    Raises:
        ValueError: another name or variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"prompt must be one of {', '.join(VARIANTS)}, got {variant!r}")
    official = variant == "official"
    if name == "videomme":
        start = _VIDEOMME.format(subtitles="" if official else " and the subtitles")
        end = (
            "The best answer is:" if official else "\nAnswer with the option's letter from the given choices directly."
        )
        return None, f"{start}\n{question.body}\n{end}"
    if name == "mlvu":
        options = "\n".join(f"({LETTERS[i]}) {text}" for i, text in enumerate(question.options))
        if official:
            user = f"Question: {question.text}\nOptions:\n{options}\nOnly give the best option.\nBest Option: ("
            return _MLVU_SYSTEM, user
        # The parquet that lmms-eval reads has the options inside the question, with a newline after the last.
        return None, f"{question.text}\n{options}\n\nOnly give the best option.\nBest option: ("
    if name == "lvbench":
        return None, f"{question.body}\nAnswer the question with the option letter"
    raise ValueError(f"no prompt for {name!r}; known: videomme, mlvu, lvbench")
