"""What a decoder is given to read: token ids of its model, and room for them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alignvec.errors import AlignvecError
from alignvec.printable import quoted

if TYPE_CHECKING:
    from alignvec.decoding.runner import Runner


def flat(input_ids: Any) -> list[Any]:
    """One prompt: a tensor, an array or a sequence [tokens], or a batch [1, tokens] of it.

    Raises:
        AlignvecError: several prompts.
    """
    values = input_ids.tolist() if hasattr(input_ids, "tolist") else input_ids
    values = list(values) if hasattr(values, "__iter__") else [values]
    if len(values) == 1 and hasattr(values[0], "__len__") and not isinstance(values[0], str | Tensor):
        return list(values[0])
    if values and isinstance(values[0], list | tuple):
        raise AlignvecError(f"input_ids holds {len(values)} prompts; a row reads one, so join each by itself")
    return values


def token_ids(prompt: Sequence[Any], vocabulary: int) -> list[int]:
    """The prompt as Python's integers.

    Raises:
        AlignvecError: no tokens, what is no integer (truth values are none), or an id outside of the vocabulary.
    """
    ids: list[Any] = list(prompt)
    if not ids:
        raise AlignvecError("a prompt has no tokens; begin it with the model's bos token")
    if set(map(type, ids)) != {int}:
        ids = [_integer(token, vocabulary) for token in ids]
    for token in (min(ids), max(ids)):
        if not 0 <= token < vocabulary:
            raise _no_token(token, vocabulary)
    return ids


def _integer(token: Any, vocabulary: int) -> int:
    try:
        if isinstance(token, bool) or getattr(token, "dtype", None) == torch.bool:
            raise TypeError
        return operator.index(token)
    except TypeError:
        raise _no_token(token, vocabulary) from None


def _no_token(token: Any, vocabulary: int) -> AlignvecError:
    return AlignvecError(
        f"{quoted(token)} is no token id of this model, whose vocabulary has {vocabulary}; give integers from 0 to "
        f"{vocabulary - 1}, of this model's tokenizer"
    )


def whole(limit: Any) -> int:
    """The most new tokens as an integer, which may be out of range.

    Raises:
        AlignvecError: it is none.
    """
    try:
        return operator.index(limit)
    except TypeError:
        raise AlignvecError(f"max_new_tokens={quoted(limit)} must be an integer of at least 1") from None


def require_room(prompt: Sequence[int], limit: int, runner: Runner, max_length: int) -> None:
    """Refuse a prompt that a row has no room for with `limit` new tokens.

    Raises:
        AlignvecError: it does not fit `max_length`, or what the model itself has room for.
    """
    room, short = runner.room, runner.short
    if len(prompt) > room or len(prompt) + limit > room + 1:
        what = f"{len(prompt)} tokens{f' and {limit} new ones' if limit > 0 else ''} do not fit"
        if short is not None:
            raise AlignvecError(f"{what} the {room} tokens of a row of {type(runner.model).__name__}: {short}")
        raise AlignvecError(
            f"{what} max_length={max_length}, of which the last needs no place; make a decoder with more"
        )
