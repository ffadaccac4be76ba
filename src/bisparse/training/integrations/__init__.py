"""Callbacks for trainers: Lightning and transformers."""
