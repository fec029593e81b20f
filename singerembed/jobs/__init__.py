"""Carry a run through the stages: on threads, on several GPUs, on a Ray cluster; resume it, log it, survive crashes.

May import output, engine, catalog, audio, model, storage and errors.
"""
