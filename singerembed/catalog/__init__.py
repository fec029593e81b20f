"""Read a catalogue of recordings as tracks, cut it into work units, and make one of a folder.

May import storage and errors.
"""
