"""Answers from finished outputs: an index of vectors, search, verification of credits, and groups.

May import evaluation's metrics and scoring, output, engine, catalog, audio, model, storage and errors.
"""
