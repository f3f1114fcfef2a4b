"""Measuring what a mix prefers: rates over stored responses, and judges of generated text."""

from alignvec.evaluate.questions import Question, load_questions, save_questions
from alignvec.evaluate.scorer import Scorer
from alignvec.evaluate.scores import Scores
from alignvec.evaluate.sensitivity import sensitivity

__all__ = ["Question", "Scorer", "Scores", "load_questions", "save_questions", "sensitivity"]
