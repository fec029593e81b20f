"""Compare encoders on labelled recordings: metrics, pairs, baselines, figures and the report page.

May import output, engine, catalog, audio, model, storage and errors.
"""
