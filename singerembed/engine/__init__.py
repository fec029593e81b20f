"""Engines: build one from a checkpoint, load it, and map crops of PCM to embeddings on a CPU or a GPU.

May import audio, model, storage and errors.
"""
