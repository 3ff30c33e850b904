"""Configurations as frozen dataclasses: of the model, of sampling, of training."""

from fastgpt2.config.model import LEARNED_ACTIVATIONS, PRESETS, GPT2Config
from fastgpt2.config.sampling import SamplingConfig
from fastgpt2.config.train import TrainConfig

__all__ = ["LEARNED_ACTIVATIONS", "PRESETS", "GPT2Config", "SamplingConfig", "TrainConfig"]
