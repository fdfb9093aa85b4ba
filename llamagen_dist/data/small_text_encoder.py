"""A text encoder for trying things out: T5's architecture, one token per word, weights as they are drawn.

Untrained it still tells captions apart: every word has a vector of its own, and two layers of attention mix in the
others and their order. It knows nothing of words that it was not made for; real captions want a trained T5.
"""

import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from llamagen_dist.config import UserError
from llamagen_dist.data.captions import clean

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
    numbers give the same files. Raises UserError where there is no word, or ``out`` exists.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel
    from transformers.utils import logging

    if out.exists():
        raise UserError(f"{out}: exists already; choose another folder, or delete it")
    split = pre_tokenizers.Whitespace()  # and signs apart from words
    counts = Counter(word for caption in captions for word, _ in split.pre_tokenize_str(clean(caption)))
    words = sorted(counts, key=lambda word: (-counts[word], word))[:max_words]
    if not words:
        raise UserError("there is no word in the captions, after cleaning; a text encoder needs some")
    numbers = {word: number for number, word in enumerate([*_SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    config = T5Config(
        vocab_size=len(numbers),
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
    aside = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        )
        fast.save_pretrained(aside)
        model.save_pretrained(aside)
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if shown:
            logging.enable_progress_bar()
    return len(words)
