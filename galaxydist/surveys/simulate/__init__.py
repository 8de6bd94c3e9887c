"""Simulated surveys in Galaxy10's schema: the ten classes as the Legacy Surveys image them."""

from galaxydist.surveys.simulate.survey import simulate_survey

__all__ = ["simulate_survey"]
