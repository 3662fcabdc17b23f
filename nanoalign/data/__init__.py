"""Data sources -> the rows of a run: files, formats of records, templates, what is held out."""
