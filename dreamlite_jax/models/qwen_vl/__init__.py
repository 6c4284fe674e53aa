"""Qwen vision-language towers: the prompt encoder of the released weights, and the backbone of the reward models."""
