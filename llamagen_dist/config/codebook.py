"""``codebook`` of a tokenizer's training: how evenly the codes are used, and what is done about it."""

from collections.abc import Iterator

from llamagen_dist.config.section import CountInt, Probability, Section


class CodebookSection(Section):
    """How evenly the codes are used while training, and what is done about it. All of it is off by default."""

    statistics: bool = False
    """Say in every training line how many codes all ranks together have used since the last: ``train_usage`` (share),
    ``train_perplexity``, and what the quantizer adds."""
    revive_after_steps: CountInt = 0
    """Every so many steps, put codes that were not used in any of them on latents of the batch; 0: never."""
    warn_below_usage: Probability = 0.0
    """One sentence in the log when less than this share of the codes is in use; 0: never."""
    warn_below_perplexity: Probability = 0.0
    """The same of the perplexity, as a share of ``codebook_size``."""

    def rules(self) -> Iterator[str]:
        for key in ("warn_below_usage", "warn_below_perplexity"):
            if getattr(self, key) and not self.statistics:
                yield f"{key}: needs the counts; set statistics: true beside it"


def misfits(quantizer: str, entropy_weight: float, codebook: CodebookSection) -> Iterator[str]:
    """What is asked of a quantizer that cannot do it, a sentence each."""
    if entropy_weight and quantizer in ("fsq", "ifsq"):
        yield f"loss.entropy_weight: {quantizer} has no entropy loss; set it to 0"
    if codebook.revive_after_steps and quantizer in ("fsq", "ifsq", "lfq"):
        yield f"codebook.revive_after_steps: {quantizer} has no table of codes to move; set it to 0"
