"""Models and tokenizers by transformers, which neither runs code of their folders nor asks whether it may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignvec.errors import AlignvecError
from alignvec.untrusted import brief


def load_model(source: str | Path, **options: Any) -> Any:
    """A causal language model by transformers' `from_pretrained`, with these options of it.

    Raises:
        AlignvecError: transformers has no class for the model, or cannot read the folder.
    """
    from transformers import AutoModelForCausalLM

    try:
        load_config(source)
        return AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False, **options)
    except AlignvecError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise AlignvecError(
            f"{source} holds no causal language model that transformers loads by itself: {brief(error, 300)}"
        ) from error


def load_config(source: str | Path, **options: Any) -> Any:
    """A model's configuration by transformers' `from_pretrained`.

    Raises:
        AlignvecError: it asks for kernels of the hub, which are code that transformers would fetch and run. What
            transformers itself raises for a configuration that it cannot read is passed on.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    for part in parts:
        for option in ("_attn_implementation", "_experts_implementation"):
            if "/" in str(getattr(part, option, None)):
                raise AlignvecError(
                    f"config.json of {source} has {option[1:]} {str(getattr(part, option))[:60]!r}, which is code of "
                    "the hub: take it out of the file"
                )
    return config


def load_tokenizer(source: str | Path) -> Any:
    """A tokenizer by transformers' `from_pretrained`.

    Raises:
        AlignvecError: transformers has no class for the tokenizer, or cannot read the folder.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise AlignvecError(
            f"{source} holds no tokenizer that transformers loads by itself: {brief(error, 300)}"
        ) from error
