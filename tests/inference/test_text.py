"""Text of tokens as they come: its pieces join to the whole text, cut before the first stop string."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from based_megatron.errors import ConfigError
from based_megatron.inference.requests import read_requests
from based_megatron.inference.sampling import Sampling
from based_megatron.inference.text import TextDecoder, TextRequest, TextStream
from support.decoding import engine_of, letters

GREEDY = Sampling(max_new_tokens=12, temperature=0)


def given_out(ids: list[int], stop: list[str]) -> tuple[list[str], bool]:
    """The pieces of a stream, and whether it was cut."""
    stream = TextStream(letters().backend_tokenizer, stop)
    pieces, is_cut = [], False
    for token in ids:
        is_cut = stream.push(token)
        if is_cut:
            break
        pieces.append(stream.take())
    return [*pieces, stream.close()], is_cut


def ids_of(text: str) -> list[int]:
    return list(letters().encode(text, add_special_tokens=False))


@given(st.text(alphabet="aé日\U0001f600 \n", max_size=30))
def test_pieces_join_to_the_text(text):
    pieces, is_cut = given_out(ids_of(text), [])
    assert "".join(pieces) == text and not is_cut


@given(st.lists(st.integers(1, 256), max_size=25))
def test_bytes_that_are_no_text_are_those_of_the_whole(ids):
    """Pieces are what decoding all tokens at once gives, bytes that are no characters included."""
    assert "".join(given_out(ids, [])[0]) == letters().backend_tokenizer.decode(ids)


@given(
    st.lists(st.sampled_from("abé"), max_size=25).map("".join),
    st.lists(st.sampled_from(["ab", "aab", "bé", "éa"]), max_size=2),
)
def test_a_text_is_cut_before_its_first_stop_string(text, stop):
    pieces, is_cut = given_out(ids_of(text), stop)
    places = [place for place in (text.find(string) for string in stop) if place >= 0]
    assert "".join(pieces) == (text[: min(places)] if places else text)
    assert is_cut == bool(places)


def test_text_that_may_become_a_stop_string_is_held_back():
    stream = TextStream(letters().backend_tokenizer, ["\nEnd"])
    seen = []
    for token in ids_of("one\nE\nEn two"):
        assert not stream.push(token)
        seen.append(stream.take())
    assert seen[:5] == ["o", "n", "e", "", ""] and seen[5:9] == ["\nE", "", "", "\nEn "]
    assert "".join(seen) + stream.close() == "one\nE\nEn two"


@pytest.fixture(scope="module")
def loop():
    return engine_of().loop(3)


def test_texts_are_those_of_each_prompt_alone(loop):
    requests = [TextRequest(text, GREEDY) for text in ("hello", "x", "日本", "the world is", "y")]
    together = TextDecoder(loop, letters()).complete(requests)
    assert together == [TextDecoder(loop, letters()).complete([request])[0] for request in requests]
    assert len({each.text for each in together}) == 5 and all(each.tokens <= 12 for each in together)


def test_a_stop_string_ends_a_text_and_frees_its_slot(loop):
    (whole,) = TextDecoder(loop, letters()).complete([TextRequest("hello", GREEDY)])
    stop = whole.text[3:5]
    decoder = TextDecoder(loop, letters())
    (cut,) = decoder.complete([TextRequest("hello", GREEDY, (stop,))])
    assert cut.text == whole.text[: whole.text.find(stop)] and cut.finish == "stop"
    assert cut.tokens < whole.tokens and not decoder.batcher.is_busy


def test_a_cancelled_text_says_no_more(loop):
    decoder = TextDecoder(loop, letters())
    first, second = decoder.add(TextRequest("hello", GREEDY)), decoder.add(TextRequest("x", GREEDY))
    decoder.step()
    decoder.cancel(first)
    updates = [update for _ in range(12) for update in decoder.step()]
    assert {update.request for update in updates} == {second} and not decoder._streams


def test_a_prompt_without_tokens_is_refused(loop):
    with pytest.raises(ConfigError, match="no tokens"):
        TextDecoder(loop, letters()).add(TextRequest(""))


# --- requests of a command line


def test_prompts_come_from_flags_files_and_lines(tmp_path):
    (tmp_path / "a.txt").write_text("two\nlines\n")
    lines = [{"prompt": "p", "seed": 4}, {"prompt": "q\u2028r", "stop": "x", "temperature": 0}]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n")
    found = read_requests(["one"], [tmp_path / "a.txt"], tmp_path / "b.jsonl", GREEDY, ("end",))
    assert found == [
        TextRequest("one", GREEDY, ("end",)),
        TextRequest("two\nlines\n", GREEDY, ("end",)),
        TextRequest("p", Sampling(max_new_tokens=12, temperature=0, seed=4), ("end",)),
        TextRequest("q\u2028r", GREEDY, ("x",)),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "line 2 of .* is no request"),
        (b"[1]", 'no text "prompt"'),
        (b'{"prompt": 3}', 'no text "prompt"'),
        (b'{"prompt": "x", "temprature": 1}', "'temprature' is none of prompt, stop, max_new_tokens"),
        (b'{"prompt": "x", "seed": 1.5}', "seed is 1.5, which is no whole number"),
        (b'{"prompt": "x", "seed": true}', "seed is True"),
        (b'{"prompt": "x", "top_p": "1"}', "top_p is '1', which is no number"),
        (b'{"prompt": "x", "top_p": 0}', "--top-p is 0"),
        (b'{"prompt": "x", "temperature": NaN}', "--temperature is nan"),
        (b'{"prompt": "x", "seed": 99999999999999999999}', "--seed is .* 64 bits"),
        (b'{"prompt": "x", "stop": [1]}', r"stop is \[1\]"),
        (b'{"prompt": ""}', "prompt is empty"),
        (b'{"prompt": "\\ud800"}', "not text in UTF-8"),
        (b'{"prompt": "\xff"}', "byte .* is 0xff"),
    ],
)
def test_a_line_that_is_no_request_is_named(tmp_path, line, reason):
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "x"}\n' + line + b"\n")
    with pytest.raises(ConfigError, match=reason) as caught:
        read_requests([], [], tmp_path / "b.jsonl", GREEDY, ())
    assert "\n" not in str(caught.value)


def test_no_prompt_and_no_file_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="there is no prompt"):
        read_requests([], [], None, GREEDY, ())
    with pytest.raises(ConfigError, match="cannot read --prompt-file"):
        read_requests([], [tmp_path / "none"], None, GREEDY, ())
