"""Documents with a question after them: the score, windows cut around the answer, and documents that are read twice."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Asked:
    """A document and the question after it, which begins with what divides the two."""

    document: str
    question: str
    value: str
    """The answer."""

    @property
    def text(self) -> str:
        """The prompt."""
        return self.document + self.question

    def read_twice(self) -> str:
        """The prompt with the document in it twice, as JRT has it (arXiv 2407.05483)."""
        return f"{self.document}\n\n{self.document}{self.question}"


Cut = Callable[[Asked], Asked]


def contains(answer: str, value: str) -> bool:
    """Whether the answer has the value in it, in capitals or not."""
    return re.search(re.escape(value), answer, re.IGNORECASE) is not None


def divided(text: str, value: str, key: str = "") -> Asked:
    """A prompt of which nobody says where its question begins.

    It begins where the key comes last, else after the last line break, else after the last sentence; with no such place all but the
    last word is document.
    """
    text = text.strip()
    place = text.lower().rfind(key.strip().lower()) if key.strip() else -1
    if place > 0:
        line = text.rfind("\n", 0, place) + 1
        place = line if line and not text[line:place].strip() else place
    else:
        ends = (text.rfind("\n"), text.rfind(". ") + 1, text.rfind(" "))
        place = next((end for end in ends if end > 0), 0)
    while place and text[place - 1].isspace():
        place -= 1
    return Asked(text[:place], text[place:], value.strip())


def window_around_answer(asked: Asked, tokens: int, tokenizer: PreTrainedTokenizerFast) -> Asked:
    """The document cut to so many tokens with the answer's first occurrence in the middle, as far as its ends allow.

    The answer stays whole. A document without it keeps its end.
    """
    offsets = tokenizer(asked.document, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if len(offsets) <= tokens:
        return asked
    place = re.search(re.escape(asked.value), asked.document, re.IGNORECASE)
    if place is None:
        first, last = len(offsets) - 1, len(offsets) - 1
    else:
        first = next(i for i, (_, end) in enumerate(offsets) if end > place.start())
        last = next(i for i, (_, end) in enumerate(offsets) if end >= place.end())
    around = max(0, tokens - (last - first + 1))
    start = max(0, min(first - around // 2, len(offsets) - tokens))
    end = max(min(len(offsets), start + tokens), last + 1)
    return Asked(asked.document[offsets[start][0] : offsets[end - 1][1]], asked.question, asked.value)
