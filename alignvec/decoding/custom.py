"""A decoder as the `custom_generate` of transformers' `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from alignvec.decoding.generate import Blend, Stop, padded, sequences, until
from alignvec.decoding.mixes import Schedule
from alignvec.decoding.sampling import from_transformers
from alignvec.errors import AlignvecError

if TYPE_CHECKING:
    from alignvec.decoding.decoder import Decoder

# Of what `generate` hands over, what a decoder does not need: it has a cache and positions of its own.
_IGNORED = {"position_ids", "cache_position", "use_cache", "logits_to_keep"}
_UNSUPPORTED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def custom_generate(
    decoder: Decoder,
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any,
    mixes: Sequence[Schedule | None] | None,
    blend: Blend | None,
    recompute: bool,
    model_kwargs: dict[str, Any],
) -> Any:
    """What `generate` returns for its prepared arguments.

    Raises:
        AlignvecError: another model, or an option that the decoder has not.
    """
    if model is not decoder.model:
        raise AlignvecError("the decoder was made for another model; call generate on the one it was given")
    if generation_config.num_beams != 1:
        raise AlignvecError(f"num_beams={generation_config.num_beams} is not supported by the decoder; leave it at 1")
    for name in _UNSUPPORTED:
        if getattr(generation_config, name, False):
            raise AlignvecError(f"{name}=True is not supported by the decoder; leave it out")
    cache = model_kwargs.pop("past_key_values", None)
    if cache is not None and cache.get_seq_length():
        raise AlignvecError("past_key_values is not supported by the decoder; it has a cache of its own (prefix_bytes)")
    mask = model_kwargs.pop("attention_mask", None)
    for name, value in model_kwargs.items():
        if name not in _IGNORED and value is not None:
            raise AlignvecError(f"{name} is not supported by the decoder; leave it out")
    sampling = from_transformers(generation_config, logits_processor)
    limit = generation_config.max_length - input_ids.shape[1]
    batch = input_ids.shape[0]
    if mixes is not None and batch % len(mixes) == 0:  # num_return_sequences repeats each prompt in place
        mixes = [mix for mix in mixes for _ in range(batch // len(mixes))]
    stop = _stop(stopping_criteria)
    answers = sequences(decoder, input_ids, mask, mixes, blend, sampling, limit, stop, streamer, recompute)
    ids = padded(input_ids, answers, generation_config.pad_token_id)
    if generation_config.return_dict_in_generate:
        from transformers.generation import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(sequences=ids)  # type: ignore[arg-type]
    return ids


def _stop(criteria: Any) -> Stop:
    """transformers' stopping criteria on one sequence; its length is the decoder's own affair."""
    from transformers import EosTokenCriteria, MaxLengthCriteria  # with which transformers imports triton

    own = [each for each in criteria if not isinstance(each, MaxLengthCriteria)]
    eos: set[int] = set()
    for each in own:
        if isinstance(each, EosTokenCriteria):
            eos.update(each.eos_token_id.reshape(-1).tolist())
    return until(eos, [each for each in own if not isinstance(each, EosTokenCriteria)])
