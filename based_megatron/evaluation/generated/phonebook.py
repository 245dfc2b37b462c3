"""The task `phonebook`: a number of a book of so many lines, which shows how much a state holds (arXiv 2402.01032)."""

import random
from collections.abc import Iterator
from itertools import count, product

from based_megatron.evaluation.contexts import Asked
from based_megatron.evaluation.generated.rows import Length, Row, row

LINES = (8, 16, 32, 64, 128, 256)
QUESTIONS_A_BOOK = 8
FIRST_NAMES = (
    "Adam Alice Anna Arthur Carl Clara David Diana Edith Eric Eva Felix Frank George Grace Helen Henry Ida Irene Jack James Jane Julia "
    "Karen Laura Leo Louis Lucy Mark Martha Mary Max Nina Nora Oliver Oscar Paul Peter Ralph Robert Rosa Ruth Simon Sophie Thomas Vera "
    "Victor Walter"
)
LAST_NAMES = (
    "Adler Baker Becker Bell Brown Carter Clark Cole Cook Cooper Davis Dixon Evans Fisher Ford Foster Fox Graham Gray Green Hall Harris "
    "Hill Hughes Hunt Jones King Lane Lee Lewis Long Mason Miller Moore Morris Nash Parker Price Reed Rose Scott Shaw Smith Stone Turner "
    "Walker Ward Young"
)


def phonebook_rows(lines: int, length: Length, seed: int) -> Iterator[Row]:
    """Rows of books with so many lines, without end; before the question another entry is asked for and given, as an example."""
    names = [" ".join(pair) for pair in product(FIRST_NAMES.split(), LAST_NAMES.split())]
    rng = random.Random(f"phonebook {seed} {lines}")
    for book_number in count():
        numbers = map(str, rng.sample(range(1_000_000, 10_000_000), lines))
        book = dict(zip(rng.sample(names, lines), numbers, strict=True))
        document = "\n".join(f"{name}: {value}" for name, value in book.items())
        example, *asked_names = rng.sample(sorted(book), min(lines, QUESTIONS_A_BOOK + 1))
        for name in asked_names:
            asked = Asked(document, f"\n\n{example}: {book[example]}\n\n{name}:", book[name])
            found = row(asked, "number", f"book {book_number} {lines}", lines, length)
            assert found is not None, "numbers of seven digits are no parts of each other"
            yield found
