"""The keys of ``loss.discriminator``: which network, its losses, when it joins, what keeps it in bounds."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from llamagen_dist.config.section import CountFloat, CountInt, Images, PositiveFloat, PositiveInt, Section

AdversarialLoss = Literal["hinge", "vanilla", "non_saturating"]


class DiscriminatorSection(Section):
    kind: Literal["patchgan", "stylegan", "none"] = "patchgan"
    """``patchgan`` judges overlapping patches (LlamaGen's choice), ``stylegan`` (StyleGAN2's) the whole image."""
    loss: AdversarialLoss = "hinge"
    """``hinge``: margins of 1; ``vanilla``: cross-entropy, against which the generator plays its exact negative;
    ``non_saturating``: cross-entropy, and the generator maximises log D."""
    generator_loss: AdversarialLoss | None = None
    """Empty: the same as ``loss``. LlamaGen's ``vanilla`` is ``loss: vanilla, generator_loss: hinge``."""
    start_images: Images = 20000 * 128
    """The discriminator's own training begins here, and with it (see ``warmup_images``) the adversarial loss (LlamaGen:
    step 20,000)."""
    warmup_images: Images = 0
    """After ``start_images`` the discriminator learns alone over so many images: the generator trains on as before,
    and is not judged by a network that has seen nothing yet."""
    ramp_images: Images = 0
    """The weight of the adversarial loss grows linearly over so many images after ``start_images`` and
    ``warmup_images``; 0: at once."""
    weight: CountFloat = 0.5
    adaptive_weight: bool = False
    """Multiply ``weight`` by the ratio of the gradients of reconstruction (with the perceptual loss) and adversarial
    loss at the decoder's last layer, over one micro-batch of all ranks (VQGAN, arXiv 2012.09841, equation 7)."""
    channels: PositiveInt = 64
    """``patchgan``: of the first layer. ``stylegan``: at 256 pixels; they double with every halving, up to 8 times as
    many."""
    layers: PositiveInt = 3
    """Of ``patchgan``."""
    norm: Literal["batch", "group"] = "batch"
    """Of ``patchgan``. ``batch`` is LlamaGen's, over one micro-batch of all ranks; ``group`` looks at one image at a
    time. Neither depends on the number of ranks; ``batch`` depends on the images of a micro-batch over all of them."""
    minibatch_stddev: CountInt = 4
    """Of ``stylegan``: it sees how much so many consecutive images of the global batch differ; 0: it does not."""
    r1_weight: CountFloat = 0.0
    """Half of it times the squared gradient of an image's mean logit by its pixels is added on real images (R1,
    arXiv 1801.04406)."""
    r1_every: PositiveInt = 16
    """Steps between two penalties, each with so many times the weight (lazy, arXiv 1912.04958, section 3.1)."""
    lecam_weight: CountFloat = 0.0
    """Pulls logits towards the moving average of the other kind's logits (LeCAM, arXiv 2104.03310)."""
    lecam_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Of that average, per step."""
    lr: PositiveFloat | None = None
    """Empty: the tokenizer's own learning rate."""

    @property
    def takes_part(self) -> bool:
        return self.kind != "none" and self.weight > 0

    @property
    def joins_at(self) -> int:
        """The image from which on the generator is trained against it."""
        return self.start_images + self.warmup_images

    def misfits(self, image_size: int) -> Iterator[str]:
        """What is wrong with images of this size (pixels), a sentence each."""
        if not self.takes_part:
            return
        # every layer halves the image, and two more convolutions take one pixel each
        smallest = 3 * 2 ** min(self.layers, 62)
        if self.kind == "patchgan" and image_size < smallest:
            yield (
                f"discriminator.layers: {self.layers} layers need at least {smallest} pixels, and data.image_size is "
                f"{image_size}; use fewer layers"
            )
        if self.kind == "stylegan" and (image_size < 8 or image_size % (1 << (image_size.bit_length() - 3))):
            yield (
                "discriminator.kind: stylegan halves the image until 4 to 7 pixels are left, which data.image_size "
                f"{image_size} cannot be; use a size like 64, 96 or 256, or patchgan"
            )
