"""The table of token blocks: the same members as a list of them, in memory and in a file."""

import dataclasses
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from based_megatron.data.members import Member, Members, row_type

WORDS = {"docs_bytes", "origins_bytes", "tokens", "docs"}
NUMBERS = [field.name for field in dataclasses.fields(Member) if field.type == "int"]


@st.composite
def members(draw, shards: str = "ab") -> Member:
    numbers = {name: draw(st.integers(0, 2**32 - 1 if name in WORDS else 2**63 - 1)) for name in NUMBERS}
    return Member(
        file=draw(st.sampled_from([f"train/{shard}.tar" for shard in shards])),
        key=draw(st.text("0123456789abé", min_size=1, max_size=12)),
        xxh3=f"{draw(st.integers(0, 2**128 - 1)):032x}",
        # A member without hashed pieces has no hash of them either.
        hashes_xxh3=f"{draw(st.integers(1, 2**64 - 1)):016x}" if numbers["hashed_end"] else "",
        **numbers,
    )


def saved_and_read(table: Members, path) -> Members:
    with path.open("wb") as stream:
        table.write(stream)
    return Members.read(table.files, path)


@settings(max_examples=50, deadline=None)
@given(given_members=st.lists(members(), max_size=6))
def test_a_table_holds_the_members_it_was_made_of(tmp_path_factory, given_members):
    table = Members.of(given_members)
    assert list(table) == given_members and [table[i] for i in range(len(table))] == given_members
    read = saved_and_read(table, tmp_path_factory.mktemp("table") / "t.npy")
    assert read == table and list(read) == given_members and read.xxh3 == table.xxh3
    for name in NUMBERS:
        assert table.column(name).tolist() == [getattr(member, name) for member in given_members]
    needed = dict(zip(table.files, table.needed_bytes().tolist(), strict=True))
    assert needed == {
        file: max(member.end for member in given_members if member.file == file)
        for file in {member.file for member in given_members}
    }


@settings(max_examples=30, deadline=None)
@given(first=st.lists(members("ab"), max_size=4), second=st.lists(members("cd"), max_size=4))
def test_joined_tables_are_the_table_of_all_members(first, second):
    joined = Members.joined([Members.of(first), Members.of(second)])
    assert joined == Members.of([*first, *second]) and list(joined) == [*first, *second]


@settings(max_examples=30, deadline=None)
@given(given_members=st.lists(members(), min_size=1, max_size=4), data=st.data())
def test_any_other_member_is_another_table(given_members, data):
    place = data.draw(st.integers(0, len(given_members) - 1))
    other = [*given_members]
    other[place] = data.draw(members())
    assert (Members.of(other) == Members.of(given_members)) == (other == given_members)
    if [member.file for member in other] == [member.file for member in given_members] and other != given_members:
        assert Members.of(other).xxh3 != Members.of(given_members).xxh3


@pytest.mark.parametrize(
    ("files", "table", "words"),
    [
        (["a"], np.zeros(2, np.int64), "columns"),
        (["a"], np.zeros(1, [("file", "<u4"), ("key", "S8")]), "columns"),
        ([], np.zeros(1, row_type(8)), "shard 0, of 0"),
    ],
)
def test_what_is_no_table_of_members_is_refused(tmp_path, files, table, words):
    np.save(tmp_path / "t.npy", table)
    with pytest.raises(ValueError, match=words):
        Members.read(files, tmp_path / "t.npy")


def test_a_row_is_small():
    stream = io.BytesIO()
    np.save(stream, np.zeros(1000, row_type(8)))
    assert len(stream.getvalue()) < 1000 * 120
