"""What ranks ask of a file system at a start, counted in a simulation that really runs it."""

from benchmarks.start_requests import rows_of, simulate, table

FEW, MANY = 4, 16


def test_nothing_grows_faster_than_the_ranks():
    few, many = simulate(FEW), simulate(MANY)
    for name, number in rows_of(many).items():
        # Of a constant part and one that grows with the ranks; sizes have a digit more where there are more ranks.
        assert number <= rows_of(few)[name] * MANY / FEW * 1.05, name
    assert set(many.writers.values()) == {1} and many.writers.keys() >= {"lock", "config.yaml", "history.jsonl"}
    assert many.opened[".metadata"] == few.opened[".metadata"] and many.opened["state.json"] == few.opened["state.json"]
    assert many.opened["tensors of the checkpoint"] == 2 * MANY, "each file is hashed once and read once"
    assert many.collectives == few.collectives
    assert len(table([few, many])) == 2 + len(rows_of(many))
