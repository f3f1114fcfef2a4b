"""Measuring what a mix prefers: rates over stored responses, and judges of generated text."""

from alignvec.evaluate.questions import Question, load_questions, save_questions
from alignvec.evaluate.scores import Scores

__all__ = ["Question", "Scores", "load_questions", "save_questions"]
