"""What a tiny model is called with: token ids, and what its class wants beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

TOKENS = 9
NEW_TOKENS = 6
SIDE, PATCH = 32, 8  # of images, in pixels
IMAGE_TOKEN, START_TOKEN = 93, 91

Inputs = dict[str, Any]
# Tokens that an image of 4 x 4 patches takes, by model type.
_PLACES = {
    "gemma3": 4,
    "idefics3": 4,
    "internvl": 4,
    "llava": 16,
    "llava_next": 36,
    "llava_onevision": 36,
    "vipllava": 16,
    "mistral3": 4,
    "paligemma": 16,
    "smolvlm": 4,
}
_IMAGES_OF_A_SEQUENCE = ("idefics3", "smolvlm", "mllama")  # pixels [sequences, images, ...] and not [images, ...]
_GRIDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def ids(batch: int, seed: int = 0) -> Tensor:
    """Token ids [batch, TOKENS], none of them special."""
    return torch.randint(3, 90, (batch, TOKENS), generator=torch.Generator().manual_seed(seed))


def inputs(model: PreTrainedModel, batch: int, images: bool = True) -> Inputs:
    """Arguments of a forward pass over `batch` sequences that differ, each with an image where the class takes them."""
    kind = model.config.model_type
    codebooks = getattr(model.config, "num_codebooks", 1) if kind.startswith("musicgen") else 1
    given: Inputs = {"input_ids": ids(batch * codebooks)}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids(batch, 1)
    if images and kind in _GRIDS:
        return _with_grids(given["input_ids"])
    if images and (kind in _PLACES or kind == "mllama"):
        return _with_pixels(kind, given["input_ids"])
    return given


def prompt(model: PreTrainedModel, batch: int, images: bool = True) -> Inputs:
    """Arguments of `generate` for the same sequences."""
    given = inputs(model, batch, images)
    given.pop("decoder_input_ids", None)
    return given


def _pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def _with_pixels(kind: str, text: Tensor) -> Inputs:
    """An image of one size for each sequence, before its text."""
    batch = len(text)
    places = _PLACES.get(kind, 1)
    images = torch.full((batch, places), IMAGE_TOKEN)
    given: Inputs = {"input_ids": torch.cat([images, text], 1), "pixel_values": _pixels(batch, 3, SIDE, SIDE)}
    if kind in _IMAGES_OF_A_SEQUENCE:
        given["pixel_values"] = given["pixel_values"][:, None]
    if kind in ("llava_next", "llava_onevision"):  # the whole image, and its one tile
        given["pixel_values"] = _pixels(batch, 2, 3, SIDE, SIDE)
    if kind in ("llava_next", "llava_onevision", "mistral3"):
        given["image_sizes"] = torch.tensor([[SIDE, SIDE]] * batch)
    if kind in ("gemma3", "paligemma"):
        given["token_type_ids"] = (given["input_ids"] == IMAGE_TOKEN).long()
    if kind == "mllama":
        tiles = torch.tensor([[[1, 0, 0, 0]]] * batch)
        given["pixel_values"] = _pixels(batch, 1, 4, 3, SIDE, SIDE)
        given["aspect_ratio_ids"], given["aspect_ratio_mask"] = torch.ones(batch, 1, dtype=torch.long), tiles
        given["cross_attention_mask"] = tiles[:, None].expand(-1, given["input_ids"].shape[1], -1, -1).clone()
    return given


def _with_grids(text: Tensor) -> Inputs:
    """Images of unequal sizes: the first sequence's is twice as large, and its text is shorter by as much."""
    batch = len(text)
    grids = [(1, 4, 8 if row == 0 else 4) for row in range(batch)]  # frames, rows and columns of patches
    longest = 8 + TOKENS
    rows = []
    for row, (_, high, wide) in enumerate(grids):
        places = high * wide // 4  # four patches are merged into a token
        images = torch.tensor([START_TOKEN, *[IMAGE_TOKEN] * places])
        rows.append(torch.cat([images, text[row].repeat(2)])[: longest + 1])
    tokens = torch.stack(rows)
    patches = sum(high * wide for _, high, wide in grids)
    return {
        "input_ids": tokens,
        "pixel_values": _pixels(patches, 3 * 2 * PATCH * PATCH),
        "image_grid_thw": torch.tensor(grids),
        "mm_token_type_ids": (tokens == IMAGE_TOKEN).long(),
    }
