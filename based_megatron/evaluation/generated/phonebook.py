"""The task `phonebook`: a number of a book of so many lines, which shows how much a state holds (arXiv 2402.01032)."""

import random
from collections.abc import Iterator, Sequence
from itertools import product

from based_megatron.evaluation.contexts import Asked
from based_megatron.evaluation.generated.rows import Length, Row, row

LINES = (8, 16, 32, 64, 128, 256)
QUESTIONS_A_BOOK = 8
FIRST_NAMES = (
    "Adam Alice Anna Arthur Carl Clara David Diana Edith Eric Eva Felix Frank George Grace Helen Henry Ida Irene Jack James Jane Julia "
    "Karen Laura Leo Louis Lucy Mark Martha Mary Max Nina Nora Oliver Oscar Paul Peter Ralph Robert Rosa Ruth Simon Sophie Thomas Vera "
    "Victor Walter"
).split()
LAST_NAMES = (
    "Adler Baker Becker Bell Brown Carter Clark Cole Cook Cooper Davis Dixon Evans Fisher Ford Foster Fox Graham Gray Green Hall Harris "
    "Hill Hughes Hunt Jones King Lane Lee Lewis Long Mason Miller Moore Morris Nash Parker Price Reed Rose Scott Shaw Smith Stone Turner "
    "Walker Ward Young"
).split()


def phonebook_rows(lines: Sequence[int], rows_a_size: int, length: Length, seed: int) -> Iterator[Row]:
    """Rows of books with so many lines; before the question another entry is asked for and given, as an example."""
    names = [" ".join(pair) for pair in product(FIRST_NAMES, LAST_NAMES)]
    for count in lines:
        rng = random.Random(f"phonebook {seed} {count}")
        done = 0
        for number in range(rows_a_size):
            book = dict(zip(rng.sample(names, count), map(str, rng.sample(range(1_000_000, 10_000_000), count)), strict=True))
            document = "\n".join(f"{name}: {value}" for name, value in book.items())
            example, *asked_names = rng.sample(sorted(book), min(count, QUESTIONS_A_BOOK + 1))
            for name in asked_names[: rows_a_size - done]:
                question = f"\n\n{example}: {book[example]}\n\n{name}:"
                found = row(Asked(document, question, book[name]), "number", f"book {number} {count}", count, length)
                assert found is not None
                yield found
                done += 1
            if done == rows_a_size:
                break
