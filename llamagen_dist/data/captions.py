"""Captions as text, and caption features as the numbers that token shards hold."""

import html
import io
import re
import unicodedata
from html.parser import HTMLParser
from typing import TYPE_CHECKING
from urllib.parse import unquote_plus

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

CAPTION_FEATURES_MEMBER = ".caption.npy"
SHORT_FEATURES_MEMBER = ".short.npy"
CLEANING = "llamagen-1"
"""Name of the rules of ``clean``, kept in manifests; to be changed when they change."""
LONGEST = 2048
"""Characters of a caption that are looked at; far more than a text encoder's 120 tokens."""

# The rules of LlamaGen's training captions (PixArt's, and DeepFloyd's before that): what they take out, a released
# model has never seen. Each line is (what to find, what to put there), in the order in which they work.
_ADDRESSES = r"""
    \b(?: (?:https?|www): (?:/{1,3} | [a-z0-9%])
        | [a-z0-9.\-]+ [.] (?:com|co|ru|net|org|edu|gov|it) [\w/\-]* \b /? (?!@) )
"""
_DASHES = r"\-\u058a\u05be\u1400\u1806\u2010-\u2015"
_MORE_DASHES = r"\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
_FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"


def _rules(*pairs: tuple[str, str]) -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(pattern), to) for pattern, to in pairs]


_BEFORE_MARKUP = [(re.compile("<person>"), "person"), (re.compile(_ADDRESSES, re.VERBOSE), "")]
_SIGNS = _rules(
    (r"@\w+\b", ""),  # nicknames
    ("[\u31c0-\u9fff]+", ""),  # Chinese, and its strokes, circled and squared forms
    (f"[{_DASHES}{_MORE_DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    (r"&quot;?|&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # network addresses
    (r"\d:\d\d\s+$", ""),  # article numbers
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_FILES})", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
_WORDS = _rules(
    (r"\b[a-z]{1,3}\d{3,15}\b", ""),  # article codes: jc6640
    (r"\b[a-z]+\d+[a-z]+\b", ""),
    (r"\b\d+[a-z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILES})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-z]+\d+[a-z]+\d+[a-z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes: 20 x 30, with a Latin x, a Cyrillic one or a cross
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"'](.+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)
_QUOTES = {**dict.fromkeys(map(ord, "ʼ‘’‚‛"), "'"), **dict.fromkeys(map(ord, "“”„‟"), '"')}
_LIGATURES = {ord(char): unicodedata.normalize("NFKC", char) for char in "ĳǆǉǌǳﬀﬁﬂﬃﬄﬅﬆ"}
_WIDTHS = {code: unicodedata.normalize("NFKC", chr(code)) for code in (0x3000, *range(0xFF01, 0xFFF0))}
_CONTROLS = dict.fromkeys([*range(9), 11, *range(14, 32), 127, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)])
_CHARACTERS = {**_QUOTES, **_LIGATURES, **_WIDTHS, **_CONTROLS}


class _Text(HTMLParser):
    """Collects what a browser would show."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in ("script", "style", "template")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= self._hidden > 0 and tag in ("script", "style", "template")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.pieces.append(data)


def _without_markup(text: str) -> str:
    if "<" not in text and "&" not in text:
        return text
    parser = _Text()
    parser.feed(text)
    parser.close()
    return "".join(parser.pieces)


def clean_once(text: str) -> str:
    """One round of the rules. LlamaGen does two; ``clean`` repeats them until nothing changes."""
    text = unquote_plus(text).strip().lower()
    for pattern, to in _BEFORE_MARKUP:
        text = pattern.sub(to, text)
    text = _without_markup(text)
    for pattern, to in _SIGNS:
        text = pattern.sub(to, text)
    if text.count("-") + text.count("_") > 3:  # this-is-the-name-of-a-file
        text = text.replace("-", " ").replace("_", " ")
    text = unicodedata.normalize("NFC", html.unescape(html.unescape(text)).translate(_CHARACTERS)).strip()
    for pattern, to in _WORDS:
        text = pattern.sub(to, text)
    return text.strip()


def clean(text: str) -> str:
    """The caption as the text encoder reads it: lower case, without addresses, markup, file names and shop language.

    Cleaning a clean caption changes nothing. Where LlamaGen's two rounds of the rules (``clean_once``) come to rest,
    this is their result. Only the first ``LONGEST`` characters count. May be empty.
    """
    text = text[:LONGEST].encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half characters: no text
    while (again := clean_once(text)) != text:
        text = again
    return text


def first_sentence(text: str) -> str:
    """Up to the first ``.``, ``!`` or ``?`` at the end of a word, without it: LlamaGen's short caption.

    (LlamaGen cuts at any full stop, also in 2.5.) A text without a sentence is returned as it is, stripped.
    """
    sentences = (piece.strip() for piece in re.split(r"[.!?]+(?=\s|$)", text))
    return next((sentence for sentence in sentences if sentence), text.strip())


def bits(features: "Tensor") -> NDArray[np.uint16]:
    """bfloat16 [L, C] (any device) -> its bit patterns, uint16 [L, C]. Raises TypeError for another type."""
    import torch

    if features.dtype != torch.bfloat16:
        raise TypeError(f"caption features are bfloat16, not {features.dtype}")
    patterns: NDArray[np.uint16] = features.detach().cpu().contiguous().view(torch.int16).numpy().view(np.uint16)
    return patterns


def features(patterns: NDArray[np.uint16]) -> "Tensor":
    """The inverse of ``bits``: uint16 [...] -> bfloat16 [...], copied."""
    import torch

    return torch.from_numpy(np.array(patterns, np.uint16).view(np.int16)).view(torch.bfloat16)


def caption_bytes(patterns: NDArray[np.uint16]) -> bytes:
    """uint16 [L, C] as the bytes of an .npy file."""
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(patterns, "<u2"), allow_pickle=False)
    return file.getvalue()
