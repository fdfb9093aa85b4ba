"""The shipped tokenizer recipes: what they build, in published numbers (fact sheets of the reference system)."""

from pathlib import Path

import pytest

from llamagen_dist.build import vq_parameters
from llamagen_dist.config import TokenizerConfigFile, load

CONFIGS = Path(__file__).parent.parent.parent / "configs" / "tokenizer"


@pytest.mark.parametrize(("name", "parameters", "grid"), [("VQ-16", 71_883_403, 16), ("VQ-8", 70_109_835, 32)])
def test_llamagens_recipes(name, parameters, grid):
    config: TokenizerConfigFile = load(CONFIGS / f"{name}.yaml", kind="tokenizer")
    assert vq_parameters(config.model) == parameters
    vq = config.model.vq()
    assert config.data.image_size // vq.downsampling == grid
    assert (vq.codebook_size, vq.codebook_dim, vq.l2_norm, vq.quantizer) == (16384, 8, True, "vq")
    assert config.train.global_batch == 128
    assert config.train.images == 40 * (1_281_167 // 128) * 128, "each epoch's incomplete batch is dropped"
    assert (config.data.image_size, config.data.random_crop, config.data.horizontal_flip) == (256, True, True)
    assert (config.optim.lr, config.optim.betas, config.optim.eps, config.optim.clip) == (1e-4, (0.9, 0.95), 1e-8, 1.0)
    assert config.optim.schedule == "constant"
    assert config.optim.weight_decay == 0.0, "the code's, not the paper's 0.05"
    loss = config.loss
    assert (loss.reconstruction, loss.reconstruction_weight, loss.perceptual_weight) == ("l2", 1.0, 1.0)
    assert (loss.codebook_weight, loss.commitment_weight, loss.entropy_weight) == (1.0, 0.25, 0.0)
    assert loss.perceptual == "lpips"
    gan = loss.discriminator
    assert (gan.kind, gan.weight, gan.channels, gan.layers, gan.norm) == ("patchgan", 0.5, 64, 3, "batch")
    assert (gan.loss, gan.generator_loss, gan.adaptive_weight, gan.lr) == ("hinge", None, False, None)
    assert (gan.ramp_images, gan.r1_weight, gan.lecam_weight) == (0, 0.0, 0.0)
    assert gan.start_images == 20_000 * 128
    assert not config.codebook.statistics
    assert (config.model.codebook_init, config.codebook.revive_after_steps) == ("random", 0)


def test_the_colour_recipe():
    config: TokenizerConfigFile = load(CONFIGS / "colour.yaml", kind="tokenizer")
    vq = config.model.vq()
    assert (config.data.image_size, config.data.image_size // vq.downsampling, vq.codebook_size) == (64, 16, 1024)
    tokens = config.train.global_batch * 16 * 16
    assert tokens >= vq.codebook_size, "the first batch has a latent for every code"
    assert config.codebook.revive_after_steps * tokens >= 16 * vq.codebook_size, "a rare code is not a dead one"
    assert config.optim.ends_at == config.train.images
