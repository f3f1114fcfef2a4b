"""PEFT's LoRA adapters as low-rank alignment vectors, and low-rank vectors as adapters that PEFT loads.

A LoRA module adds `scale * B A` to its weight, which is a low-rank delta as it stands, with
`scale = lora_alpha / r`, or `lora_alpha / sqrt(r)` with rsLoRA (arXiv 2106.09685, 2312.03732).
"""

from alignvec.peft.load import from_peft
from alignvec.peft.save import to_peft

__all__ = ["from_peft", "to_peft"]
