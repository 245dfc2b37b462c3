"""Made text in which recall pays: facts about people with rare names, told again far later in the same document.

    python -m benchmarks.recall_corpus OUTPUT.jsonl --documents 18000 --questions ROWS/facts.jsonl

A document has paragraphs of a language whose next word follows from the two before it, which takes a model many tokens to learn by
heart, and between them facts (`Takevo Lurimi keeps zapune dorike .`): each is stated, and later restated, at distances that are spread
evenly on a logarithmic scale. Nobody has the same name in two documents but by chance, so only the document can tell a fact. Every
document follows from the seed and its number.

Questions are rows for `based eval --data ROWS --tasks facts`, about documents that come after those of the corpus: a document up to
where it restates a fact for the first time, whose last two words are asked for.
"""

import argparse
import itertools
import json
import multiprocessing
import random
import re
from collections.abc import Sequence
from pathlib import Path

CONSONANTS, VOWELS = "bdfgjklmnprstvz", "aeiou"
SYLLABLES = ["".join(pair) for pair in itertools.product(CONSONANTS, VOWELS)]
FILLER_WORDS, NAMES, VALUES = 600, 4000, 2000
VERBS = ("keeps", "wants", "sold", "owes", "found", "lost")
PARAGRAPHS, PARAGRAPH_WORDS = 14, 64
FACTS = 40
RESTATEMENTS = 3
"""Most of them for a fact; those that would stand behind the end are left out."""
CHOICES = (0.62, 0.2, 0.1, 0.08)
"""Probabilities of the words that can follow two others."""
FACT = re.compile(r"\. ([A-Z]\w+ [A-Z]\w+ \w+) (\w+ \w+) \.")
"""A fact in a document: who does what, and the two words that are its value."""
QUESTIONS = 400


def words_of(seed: str, count: int, syllables: int) -> list[str]:
    """Different words of so many syllables, the same in every process."""
    found: dict[str, None] = {}
    generator = random.Random(seed)
    while len(found) < count:
        found["".join(generator.choices(SYLLABLES, k=syllables))] = None
    return list(found)


FILLER = words_of("filler", FILLER_WORDS, 2)
FIRST_NAMES = [word.capitalize() for word in words_of("first names", NAMES, 3)]
LAST_NAMES = [word.capitalize() for word in words_of("last names", NAMES, 3)]
VALUE_WORDS = words_of("values", VALUES, 3)


def following(one: int, two: int, choice: int) -> int:
    """The word that follows two others, if it is their choice number so and so."""
    return (one * 7919 + two * 104729 + choice * 1299709 + one * two) % FILLER_WORDS


def document(seed: int, number: int) -> str:
    """The text of a document."""
    generator = random.Random(f"{seed}/{number}")
    one, two = generator.randrange(FILLER_WORDS), generator.randrange(FILLER_WORDS)
    paragraphs: list[list[str]] = []
    choices = generator.choices(range(len(CHOICES)), CHOICES, k=PARAGRAPHS * PARAGRAPH_WORDS)
    for start in range(0, len(choices), PARAGRAPH_WORDS):
        words = []
        for choice in choices[start : start + PARAGRAPH_WORDS]:
            one, two = two, following(one, two, choice)
            words.append(FILLER[two])
        paragraphs.append(words)
    told: dict[int, list[str]] = {}
    for _ in range(FACTS):
        name = f"{generator.choice(FIRST_NAMES)} {generator.choice(LAST_NAMES)}"
        fact = f". {name} {generator.choice(VERBS)} {generator.choice(VALUE_WORDS)} {generator.choice(VALUE_WORDS)} ."
        place = generator.randrange(PARAGRAPHS * PARAGRAPH_WORDS)
        told.setdefault(place, []).append(fact)
        for _ in range(RESTATEMENTS):
            place += round(PARAGRAPH_WORDS ** generator.uniform(0.5, 1.7))
            told.setdefault(place, []).append(fact)
    pieces = []
    for number_of_word, word in enumerate(itertools.chain.from_iterable(paragraphs)):
        pieces += [*told.get(number_of_word, ()), word]
        if number_of_word % PARAGRAPH_WORDS == PARAGRAPH_WORDS - 1:
            pieces.append(".\n")
    return " ".join(pieces)


def question(seed: int, number: int) -> dict[str, str]:
    """The row of a question about a document."""
    text = document(seed, number)
    found = list(FACT.finditer(text))
    told = {match.group(): match for match in reversed(found)}
    again = {match.group(): match for match in reversed(found) if match is not told[match.group()]}
    asked = random.Random(f"question/{seed}/{number}").choice(sorted(again.values(), key=lambda match: match.start()))
    return {"text": text[: asked.end(1)], "value": asked[2], "key": asked[1], "doc": str(number)}


def _line(arguments: tuple[int, int]) -> str:
    return json.dumps({"text": document(*arguments)}) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Write documents as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--documents", type=int, default=18_000)
    parser.add_argument("--questions", type=Path, help="file to write questions into")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    numbers = [(options.seed, number) for number in range(options.documents)]
    with multiprocessing.Pool() as pool, options.output.open("w") as file:
        file.writelines(pool.imap(_line, numbers, chunksize=256))
    if options.questions:
        options.questions.parent.mkdir(parents=True, exist_ok=True)
        rows = (question(options.seed, options.documents + i) for i in range(QUESTIONS))
        options.questions.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
