"""Decoding with a static cache: rows side by side, each under its own mix, a step without a wait for the device."""

from alignvec.decoding.decoder import Decoder
from alignvec.decoding.sampling import Sampling

__all__ = ["Decoder", "Sampling"]
