"""Judges of generated text: what level is an answer of? A trained classifier, or a language model behind an endpoint.

A judge has `judge(queries, texts)`, which gives each text a level, or None where it cannot say.
"""

from alignvec.evaluate.judge.classifier import ClassifierJudge
from alignvec.evaluate.judge.endpoint import EndpointJudge

__all__ = ["ClassifierJudge", "EndpointJudge"]
