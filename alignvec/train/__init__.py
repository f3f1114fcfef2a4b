"""Training: preference pairs to alignment vectors (DPO), and the scales of low-bit vectors (distillation)."""

from alignvec.train.distil import distil
from alignvec.train.dpo import train_dpo
from alignvec.train.pairs import load_pairs, pairs_from_questions

__all__ = ["distil", "load_pairs", "pairs_from_questions", "train_dpo"]
