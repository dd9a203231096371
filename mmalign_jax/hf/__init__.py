"""Hugging Face directories in and out: weights, configs, processors. No torch, no pickle, no code from a directory."""
