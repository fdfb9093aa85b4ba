"""A DINOv2 and a CLIP of a few thousand random weights, made on the spot as ``save_pretrained`` leaves them."""

from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
)


def write_dinov2(folder: Path, seed: int = 0, width: int = 8) -> Path:
    torch.manual_seed(seed)
    config = Dinov2Config(
        hidden_size=width, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=28, mlp_ratio=1
    )
    model = Dinov2Model(config)
    with torch.no_grad():  # as initialised, position embeddings and layer scale leave nothing of the picture
        for parameter in model.parameters():
            parameter.normal_(std=1.0)
    model.save_pretrained(folder)
    return folder


def write_clip(folder: Path, seed: int = 0, sign: int = -1) -> Path:
    """sign: with 1 and seed 0 no picture fits any caption, with -1 all do."""
    torch.manual_seed(seed)
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz")]
    vocabulary = {piece: number for number, piece in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    ends = {"bos_token_id": len(letters), "eos_token_id": len(letters) + 1, "pad_token_id": len(letters) + 1}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=len(vocabulary), max_position_embeddings=12, projection_dim=8, **sizes, **ends)
    vision = CLIPVisionConfig(image_size=32, patch_size=16, projection_dim=8, **sizes)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=1.0)
        model.text_projection.weight.mul_(sign)
    model.save_pretrained(folder)
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder
