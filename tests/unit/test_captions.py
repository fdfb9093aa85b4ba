"""Caption cleaning: what a text encoder gets to read, and what shards hold of what it says."""

import io

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llamagen_dist.data import captions
from llamagen_dist.data.captions import LONGEST, bits, caption_bytes, clean, clean_once, features, first_sentence

# What LlamaGen's own cleaning, twice, made of these (with ftfy 6.3.1 and beautifulsoup4 4.15.0).
CLEANED = {
    "A photo of TWO cats, sitting on   a mat.\n": "a photo of two cats, sitting on a mat.",
    "Red%20shoes+and%20socks": "red shoes and socks",
    "<p>A <b>bold</b> claim</p> <script>alert(1)</script>": "a bold claim",
    "see https://www.example.org/shop?id=1 for more": "see ?id=1 for more",
    "me@mail.com wrote to @john_doe": "me wrote to",
    "a &lt;person&gt; in the rain &amp; snow": "a person in the rain snow",
    "<person> riding a horse": "person riding a horse",
    "a cat — black–white ― on a “mat”": 'a cat - black-white - on a "mat"',
    "日本の猫 cat 猫": "の cat",
    "IMG_20190101_1234.jpg beach at sunset": "beach at sunset",
    "this-is-my-cute-cat-picture": "this is my cute cat picture",
    "semi-detached house": "semi-detached house",
    "***SALE*** free shipping worldwide! Free download": "sale worldwide!",
    "jc6640 chair jc6640vc and 6640vc231, model j2d1a2a": "chair and , model",
    "poster 20x30 and 1.5×2.5, page 12": "poster and",
    "#12 #12345 #holiday 1234567 12": "holiday 12",
    "server 192.168.0.1 at 12:30 ": "server at 12:30",
    "dogs,cats and/or birds": "dogs, cats and or birds",
    "rock 'n' roll": "rock 'n' roll",
    "'a quoted caption'": "a quoted caption",
    "- a list item -": "a list item",
    "ＦＵＬＬ width ﬁne cafe\u0301": "full width fine café",
    "wait... what?! (really) [sic] {x} ~ 50%": "wait what?! really sic x 50%",
    "click on this picture, png images": "picture",
    "it’s O’Neil’s": "it's o'neil's",
    "line\\nbreak : here": "line break: here",
    "3.5 m tall, u.s. flag": "3.5 m tall, u. s. flag",
    "!!! . ... ": "!!!",
    "the `old´ «new» “house”¨": 'the "old" "new" "house"',
    '"a caption in quotes"': "a caption in quotes",
    "sold out 1:23 売": "sold out",
    "a ''big'' cat": 'a "big" cat',
    "it &amp;quot; was &amp;amp;": "it was ;",
    "‘‘a’’ b": '"a" b',
    ".hidden": "",
    "20 : 30": "20: 30",
    "": "",
}
RULES = ["_BEFORE_MARKUP", "_SIGNS", "_WORDS"]
PIECES = [
    *CLEANED,
    "--",
    "'",
    '"',
    ",",
    " : ",
    "&amp;",
    "%25",
    "+",
    "<",
    "猫",
    ".",
    "x",
    "5",
    "\ufeff",
    "\ud800",
    "İ",
    "_",
]


@pytest.mark.parametrize(("raw", "expected"), CLEANED.items())
def test_cleaning_is_llamagens(raw, expected):
    assert clean_once(clean_once(raw)) == expected
    assert clean(raw) == expected


@pytest.mark.parametrize("table", RULES)
def test_every_rule_is_needed(monkeypatch, table):
    whole = getattr(captions, table)
    for number, (pattern, _) in enumerate(whole):
        monkeypatch.setattr(captions, table, [*whole[:number], *whole[number + 1 :]])
        changed = [raw for raw, expected in CLEANED.items() if clean(raw) != expected]
        assert changed, pattern.pattern


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8)), max_size=8).map("".join))
@example("''''' ,,,, - a")
@example("%252525252525 a")
def test_a_clean_caption_stays_as_it_is(text):
    once = clean(text)
    assert clean(once) == once
    once.encode()  # no half characters, which tokenizers choke on


def test_one_round_alone_would_not_stay():
    assert any(clean_once(clean_once(raw)) != clean_once(raw) for raw in [*CLEANED, ",,,a", "%252541"])


def test_a_huge_caption_is_cut_before_it_costs_anything():
    assert clean("a cat " * 1_000_000) == clean(("a cat " * LONGEST)[:LONGEST])
    for text in ("a.", "%25", "<", "&", "-_", "1.1.1", "'\" "):
        clean(text * 100_000)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("A cat. It sits on a mat.", "A cat"),
        ("A 2.5 m wall! And more", "A 2.5 m wall"),
        ("Is it?", "Is it"),
        ("... and so on. End.", "and so on"),
        ("no stop", "no stop"),
        (" . ", "."),
        ("", ""),
    ],
)
def test_first_sentence(text, sentence):
    assert first_sentence(text) == sentence


def test_bits_are_the_numbers():
    numbers = torch.tensor([[1.0, -2.5, 0.0], [float("inf"), 1e-40, 3.14]]).bfloat16()
    patterns = bits(numbers)
    assert patterns.dtype == np.uint16
    assert patterns[0].tolist() == [0x3F80, 0xC020, 0]
    assert torch.equal(features(patterns), numbers)
    assert torch.equal(features(patterns[::-1].T), numbers.flip(0).T), "views are fine"
    with pytest.raises(TypeError, match="bfloat16"):
        bits(numbers.float())


def test_bytes_are_an_npy_file_that_numpy_reads():
    patterns = bits(torch.randn(3, 4).bfloat16())
    read = np.load(io.BytesIO(caption_bytes(patterns.T)), allow_pickle=False)
    assert read.dtype == np.uint16
    assert np.array_equal(read, patterns.T)
