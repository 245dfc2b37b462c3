"""The made corpus of recall: the same for a seed, and each fact restated word for word."""

import re
from collections import Counter

from benchmarks.recall_corpus import CHOICES, FACTS, FILLER, RESTATEMENTS, document, following

FACT = re.compile(r"\. ([A-Z]\w+ [A-Z]\w+) (\w+ \w+ \w+) \.")


def test_documents_follow_from_seed_and_number():
    assert document(0, 5) == document(0, 5)
    assert len({document(seed, number) for seed in (0, 1) for number in (5, 6)}) == 4


def test_a_name_has_one_fact_and_most_are_restated():
    for number in range(20):
        found = FACT.findall(document(0, number))
        assert len({name for name, _ in found}) == len(set(found)) == FACTS
        counts = Counter(found)
        assert max(counts.values()) <= 1 + RESTATEMENTS and sum(count > 1 for count in counts.values()) > FACTS / 2


def test_the_language_between_facts_has_few_words_after_two_others():
    words = FACT.sub("", document(0, 1)).replace(".", "").split()
    numbers = [FILLER.index(word) for word in words]
    for one, two, three in zip(numbers, numbers[1:], numbers[2:], strict=False):
        assert three in {following(one, two, choice) for choice in range(len(CHOICES))}
