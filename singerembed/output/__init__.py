"""What an output is on disk: its schema, the part files of a run, and a finished output as a reader sees it.

May import catalog, model, storage and errors.
"""
