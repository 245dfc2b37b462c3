"""The made corpus of recall: the same for a seed, and each fact restated word for word."""

from collections import Counter

from benchmarks.recall_corpus import CHOICES, FACT, FACTS, FILLER, RESTATEMENTS, document, following, question


def test_documents_follow_from_seed_and_number():
    assert document(0, 5) == document(0, 5)
    assert len({document(seed, number) for seed in (0, 1) for number in (5, 6)}) == 4


def test_a_name_has_one_fact_and_most_are_restated():
    for number in range(20):
        found = FACT.findall(document(0, number))
        assert len({who.rsplit(" ", 1)[0] for who, _ in found}) == len(set(found)) == FACTS
        counts = Counter(found)
        assert max(counts.values()) <= 1 + RESTATEMENTS and sum(count > 1 for count in counts.values()) > FACTS / 2


def test_the_language_between_facts_has_few_words_after_two_others():
    words = FACT.sub("", document(0, 1)).replace(".", "").split()
    numbers = [FILLER.index(word) for word in words]
    for one, two, three in zip(numbers, numbers[1:], numbers[2:], strict=False):
        assert three in {following(one, two, choice) for choice in range(len(CHOICES))}


def test_a_question_asks_for_a_fact_that_was_told_once():
    for number in range(20):
        row, whole = question(0, number), document(0, number)
        assert whole.startswith(f"{row['text']} {row['value']} .") and row["text"].endswith(row["key"])
        assert row["text"].count(row["key"]) == 2 and row["text"].count(f". {row['key']} {row['value']} .") == 1
