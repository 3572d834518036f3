"""Prediction, scores, intervals, grounding and the evaluation page."""
