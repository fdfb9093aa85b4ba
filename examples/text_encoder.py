"""PROGRAM: a text encoder for trying things out: T5's architecture, one token per word, weights as they are drawn.

    python -m examples.text_encoder SHARDS --out DIR [--dim 64] [--layers 2]

Untrained it still tells captions apart: every word has a vector of its own, and two layers of attention mix in the
others and their order. It knows nothing of words that it was not made for; real captions want a trained T5.
"""

import argparse
import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llamagen_dist.console import LOG
from llamagen_dist.data.captions import CLEANING, clean
from llamagen_dist.data.shards import CAPTION_MEMBER, SHORT_CAPTION_MEMBER, open_shards
from llamagen_dist.errors import UserError
from llamagen_dist.files import OutputFolder
from llamagen_dist.program import run as run_program

_SPECIAL = ("<pad>", "</s>", "<unk>")  # numbered as T5's


def make_small_text_encoder(
    captions: Iterable[str],
    out: Path,
    dim: int = 64,
    layers: int = 2,
    heads: int = 4,
    max_words: int = 8192,
    seed: int = 0,
) -> int:
    """Write config.json, model.safetensors and the tokenizer's files to the new folder ``out``; returns its words.

    captions: cleaned here; their ``max_words`` most frequent words (and signs) become tokens. The same captions and
    numbers give the same files, and are not made again. dim: a multiple of ``heads``. Raises UserError where there is
    no word, or ``out`` holds something else.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    split = pre_tokenizers.Whitespace()  # and signs apart from words
    counts = Counter(word for caption in captions for word, _ in split.pre_tokenize_str(clean(caption)))
    words = sorted(counts, key=lambda word: (-counts[word], word))[:max_words]
    if not words:
        raise UserError("there is no word in the captions, after cleaning; a text encoder needs some")
    made_from = {
        "made_by": "make_small_text_encoder",
        "cleaning": CLEANING,
        "words": len(words),
        "words_sha256": hashlib.sha256("\n".join(words).encode()).hexdigest(),
        "dim": dim,
        "layers": layers,
        "heads": heads,
        "seed": seed,
    }
    numbers = {word: number for number, word in enumerate([*_SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    output = OutputFolder(out, made_from, "made_from.json", what="a text encoder")
    if output.finished() is None:
        output.begin(path for path in out.glob("*") if path != output.parts)
        _write(out, tokenizer, len(numbers), dim, layers, heads, seed)
        output.finish({})
    return len(words)


def _write(folder: Path, tokenizer: Any, vocabulary: int, dim: int, layers: int, heads: int, seed: int) -> None:
    import torch
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel
    from transformers.utils import logging

    config = T5Config(
        vocab_size=vocabulary,
        d_model=dim,
        d_kv=dim // heads,
        d_ff=2 * dim,
        num_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5EncoderModel(config)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        fast.save_pretrained(folder)
        model.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.text_encoder",
        description="An untrained T5 that knows the words of these captions.",
    )
    parser.add_argument("shards", metavar="SHARDS", help="image shards with captions, made by llamagen pack")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the encoder")
    parser.add_argument("--dim", type=int, default=64, metavar="N", help="width of the features (default: 64)")
    parser.add_argument("--layers", type=int, default=2, metavar="N", help="default: 2")
    args = parser.parse_args(argv)
    if args.dim < 8 or args.dim % 8:
        raise UserError(f"--dim {args.dim}: must be a multiple of 8")
    if args.layers < 1:
        raise UserError(f"--layers {args.layers}: must be at least 1")
    shards = open_shards(args.shards, "images")
    if CAPTION_MEMBER not in shards.manifest.members:
        raise UserError(f"{args.shards}: has no captions ({CAPTION_MEMBER}); pack a .jsonl file with captions")
    captions = (
        shards.read(sample, member).decode("utf-8", "replace")
        for sample in range(len(shards))
        for member in shards.parts(sample)
        if member in (CAPTION_MEMBER, SHORT_CAPTION_MEMBER)
    )
    words = make_small_text_encoder(captions, args.out, args.dim, args.layers, heads=8)
    LOG.info(f"{args.out}: an untrained T5 encoder of width {args.dim} that knows {words:,} words")


if __name__ == "__main__":
    run_program(main)
